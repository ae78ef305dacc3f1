"""Route of OpenAI's completions API."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response

from model.errors import FiftyfoldError
from model.tokenizer import Tokenizer
from serve.api.errors import CLIENT_CLOSED_REQUEST, error_response
from serve.api.event_stream import EventStreamResponse, format_event, obfuscation, with_keep_alive
from serve.api.prompts import encode_text
from serve.api.schemas import Choice, Completion, CompletionRequest, Extension, Logprobs, Usage
from serve.api.served_model import ServedModel
from serve.engine import Delta
from serve.engine.detokenizer import finished_text


def add_routes(app: FastAPI, served: ServedModel, keep_alive_seconds: float) -> None:
    @app.post("/v1/completions", response_model=Completion)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        served.check_name(body.model)
        served.engine.check_size(len(body.prompt) * body.n)  # before a million prompts are encoded
        # Run in a thread: encoding many megabytes of text must not block other streams.
        prompts = await asyncio.to_thread(_encode, body, served.engine.tokenizer)
        run = _CompletionRun(body, prompts, served)
        if body.stream:
            return EventStreamResponse(with_keep_alive(run.events(), keep_alive_seconds), close=run.stream.abort)
        response = asyncio.ensure_future(run.response())
        disconnected = asyncio.ensure_future(_wait_for_disconnect(request))
        try:
            await asyncio.wait({response, disconnected}, return_when=asyncio.FIRST_COMPLETED)
            if not response.done():
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            content = response.result().model_dump_json(exclude_unset=True)
            return Response(content, media_type="application/json")
        finally:  # also if this handler is cancelled, which is how some servers signal a disconnect
            run.stream.abort()
            response.cancel()
            disconnected.cancel()


def _encode(body: CompletionRequest, tokenizer: Tokenizer) -> list[list[int]]:
    """Return token IDs: text is encoded with BOS in front, token IDs are unchanged."""
    return [encode_text(tokenizer, p, body.parse_special) if isinstance(p, str) else p for p in body.prompt]


class _CompletionRun:
    """One request in the engine. The constructor submits it, so that refusals come before any output."""

    def __init__(self, body: CompletionRequest, prompts: list[list[int]], served: ServedModel):
        self._body = body
        self._formatter = served.token_formatter
        self._choices_per_prompt = body.n
        tokenizer = served.engine.tokenizer
        choices = range(self._choices_per_prompt)
        self.stream = served.engine.submit([(tokens, body.sampling_params(i)) for tokens in prompts for i in choices])
        self._echo: list[str] | None = None
        """Prompt text to prepend, per choice."""
        if body.echo:
            texts = [p if isinstance(p, str) else finished_text(tokenizer, p) for p in body.prompt]
            self._echo = [text for text in texts for _ in choices]
        self._started: set[int] = set()
        self._common_fields: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": served.name,
        }

    async def response(self) -> Completion:
        """Return the complete JSON response."""
        chunks: list[list[Choice]] = [[] for _ in self.stream.sequences]
        async for index, delta in self.stream:
            chunks[index].append(self._choice(index, delta))
        choices = [_merge(parts) for parts in chunks]
        return Completion(**self._common_fields, choices=choices, usage=self._usage(), fiftyfold=self._extension())

    async def events(self) -> AsyncIterator[str]:
        """Yield the response as server-sent events. The chunks' texts concatenate to the JSON response's text."""
        include_usage = self._body.stream_options.include_usage
        optional: dict[str, Any] = {"usage": None} if include_usage else {}
        try:
            async for index, delta in self.stream:
                if self.stream.finished and not include_usage:
                    optional["fiftyfold"] = self._extension()
                yield self._event(choices=[self._choice(index, delta)], **optional)
            if include_usage:
                yield self._event(choices=[], usage=self._usage(), fiftyfold=self._extension())
        except FiftyfoldError as error:
            yield format_event(json.dumps(error_response(error)[1]))
        yield format_event("[DONE]")

    def _event(self, **fields: Any) -> str:
        chunk = Completion(**self._common_fields, **fields)
        content = chunk.model_dump_json(exclude_unset=True)
        if self._body.stream_options.include_obfuscation:
            chunk.obfuscation = obfuscation(content)
            content = chunk.model_dump_json(exclude_unset=True)
        return format_event(content)

    def _choice(self, index: int, delta: Delta) -> Choice:
        """Convert ``delta`` to a chunk. The first chunk of a choice starts with the echoed prompt."""
        sequence = self.stream.sequences[index]
        echo = self._echo[index] if self._echo is not None else ""
        first = index not in self._started
        self._started.add(index)
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = self._formatter.logprobs(delta.logprobs, offset=len(echo))
            if first:
                prompt = self._formatter.logprobs(sequence.prompt_logprobs, end=len(echo))
                logprobs = Logprobs.concatenate([prompt, logprobs])
        text = echo + delta.text if first else delta.text
        return Choice(index=index, text=text, logprobs=logprobs, finish_reason=delta.finish_reason)

    def _usage(self) -> Usage:
        """Return token counts. Each prompt counts once, regardless of its number of completions."""
        sequences = self.stream.sequences
        prompt = sum(len(sequence.prompt) for sequence in sequences[:: self._choices_per_prompt])
        completion = sum(sequence.completion_tokens for sequence in sequences)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

    def _extension(self) -> Extension:
        return Extension(cache_nbytes=sum(sequence.cache_nbytes for sequence in self.stream.sequences))


def _merge(chunks: list[Choice]) -> Choice:
    """Merge the chunks of one choice."""
    logprobs = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
    return Choice(
        index=chunks[0].index,
        text="".join(chunk.text for chunk in chunks),
        logprobs=Logprobs.concatenate(logprobs) if logprobs else None,
        finish_reason=chunks[-1].finish_reason,
    )


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
