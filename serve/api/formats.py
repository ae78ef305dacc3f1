"""Response formats of a request: how the outputs of the engine become choices and chunks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import BaseModel

from serve.api.logprobs import TokenFormatter
from serve.api.schemas.chat import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
)
from serve.api.schemas.completions import Choice, Completion, CompletionRequest, Logprobs
from serve.engine import Delta
from serve.engine.sequence import Sequence


class ResponseFormat(ABC):
    """Format of a request's choices, whole or in a stream.

    ``index`` is a choice's index in the response, ``prompt`` the index of its prompt in the request.
    """

    id_prefix: ClassVar[str]
    response: ClassVar[type[BaseModel]]
    chunk: ClassVar[type[BaseModel]]

    @abstractmethod
    def choice(self, index: int, prompt: int, sequence: Sequence, output: Delta) -> BaseModel:
        """Return the choice with the whole ``output`` of a finished completion."""

    @abstractmethod
    def chunk_choices(self, index: int, prompt: int, sequence: Sequence, delta: Delta, first: bool) -> list[BaseModel]:
        """Return the choices that ``delta`` becomes, one per chunk. ``first``: it is the first of its completion."""


class CompletionFormat(ResponseFormat):
    """Format of ``/v1/completions``. ``echoes`` are the prompts' texts, to prepend to their completions."""

    id_prefix, response, chunk = "cmpl", Completion, Completion

    def __init__(self, body: CompletionRequest, formatter: TokenFormatter, echoes: list[str] | None):
        self._reports_logprobs = body.logprobs is not None
        self._parses_special, self._prompts = body.parse_special, body.prompt
        self._formatter = formatter
        self._echoes = echoes

    def choice(self, index: int, prompt: int, sequence: Sequence, output: Delta) -> Choice:
        return self._choice(index, prompt, sequence, output, first=True)

    def chunk_choices(self, index: int, prompt: int, sequence: Sequence, delta: Delta, first: bool) -> list[BaseModel]:
        return [self._choice(index, prompt, sequence, delta, first)]

    def _choice(self, index: int, prompt: int, sequence: Sequence, delta: Delta, first: bool) -> Choice:
        echo = self._echoes[prompt] if self._echoes is not None else ""
        logprobs = None
        if self._reports_logprobs:
            logprobs = self._formatter.logprobs(delta.logprobs, offset=len(echo))
            if first:
                records = sequence.prompt_logprobs
                if self._parses_special and isinstance(self._prompts[prompt], str):
                    records = self._formatter.with_spellings(records, echo)
                before = self._formatter.logprobs(records, end=len(echo))
                logprobs = Logprobs.concatenate([before, logprobs])
        text = echo + delta.text if first else delta.text
        return Choice(index=index, text=text, logprobs=logprobs, finish_reason=delta.finish_reason)


class ChatFormat(ResponseFormat):
    """Format of ``/v1/chat/completions``."""

    id_prefix, response, chunk = "chatcmpl", ChatCompletion, ChatCompletionChunk

    def __init__(self, body: ChatRequest, formatter: TokenFormatter):
        self._alternatives = body.alternatives
        self._formatter = formatter

    def choice(self, index: int, prompt: int, sequence: Sequence, output: Delta) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=ChatMessage(role="assistant", content=output.text, refusal=None),
            logprobs=self._logprobs(output),
            finish_reason=output.finish_reason or "stop",
        )

    def chunk_choices(self, index: int, prompt: int, sequence: Sequence, delta: Delta, first: bool) -> list[BaseModel]:
        """The first chunk of a choice has the role, the last one the reason why it ends, and neither has text."""
        chunks: list[BaseModel] = []
        if first:
            role = ChatDelta(role="assistant", content="")
            chunks.append(ChatChunkChoice(index=index, delta=role, logprobs=None, finish_reason=None))
        if delta.text or delta.logprobs:
            text = ChatDelta(content=delta.text)
            logprobs = self._logprobs(delta)
            chunks.append(ChatChunkChoice(index=index, delta=text, logprobs=logprobs, finish_reason=None))
        if delta.finish_reason is not None:
            reason = delta.finish_reason
            chunks.append(ChatChunkChoice(index=index, delta=ChatDelta(), logprobs=None, finish_reason=reason))
        return chunks

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        if self._alternatives is None:
            return None
        return ChatLogprobs(content=self._formatter.chat_logprobs(delta.logprobs, self._alternatives), refusal=None)
