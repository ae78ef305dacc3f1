"""The HTTP routes: OpenAI's completions, and the tokenizer endpoints that lm-eval's ``local-completions`` uses."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from model.errors import FiftyfoldError
from model.tokenizer import Tokenizer
from serve.api import errors as http_errors
from serve.api.errors import ModelNotFoundError
from serve.api.logprobs import BOS_TEXT, EOS_TEXT, TokenTexts
from serve.api.schemas import (
    Choice,
    Completion,
    CompletionRequest,
    DetokenizeRequest,
    Extension,
    Logprobs,
    ModelCard,
    ModelList,
    TokenizeRequest,
    Usage,
)
from serve.engine import Delta, Engine, RequestError

CLIENT_CLOSED_REQUEST = 499
"""For access logs only: nobody is there to read it."""


def create_app(
    engine: Engine, model_name: str, max_body_bytes: int = 8_000_000, weights: str = "float32"
) -> FastAPI:
    """The ASGI application that answers with ``engine`` under the name ``model_name``; ``weights`` is the data type of
    its matrices, for ``/healthz``."""
    app = FastAPI(
        title="fiftyfold",
        docs_url=None,  # these pages would load scripts from elsewhere
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    http_errors.install(app)
    app.add_middleware(http_errors.BodyLimit, max_bytes=max_body_bytes)
    tokenizer = engine.tokenizer
    texts = TokenTexts(tokenizer)
    card = ModelCard(
        id=model_name,
        created=int(time.time()),
        max_model_len=engine.config.max_positions,
        cache_bytes_per_token=engine.cache_bytes_per_token(),
    )

    def check_model(name: str | None) -> None:
        if name not in (None, model_name):
            raise ModelNotFoundError(str(name), model_name)

    @app.post("/v1/completions", response_model=Completion)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        check_model(body.model)
        # In a thread: a text of many megabytes must not hold up the streams of others.
        prompts = await asyncio.to_thread(_encode, body.prompt, tokenizer)
        answer = _Answer(body, prompts, model_name, engine, texts)
        if body.stream:
            return _EventStream(answer)
        whole = asyncio.ensure_future(answer.whole())
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not whole.done():
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            content = whole.result().model_dump_json(exclude_unset=True)
            return Response(content, media_type="application/json")
        finally:  # also when this handler is cancelled, which is how some servers tell of a disconnect
            answer.stream.abort()
            whole.cancel()
            gone.cancel()

    @app.get("/v1/models")
    async def models() -> ModelList:
        return ModelList(data=[card])

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> ModelCard:
        check_model(name)
        return card

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        """200 while the engine can work, else 503."""
        try:
            engine.check_health()
        except FiftyfoldError as error:
            return JSONResponse(http_errors.error_body(str(error), "server_error"), 503)
        return JSONResponse(
            {"status": "ok", "model": model_name, "weights": weights, "unfinished": engine.unfinished}
        )

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """Names of the special tokens; ``/tokenize`` takes either, alone, for the token itself."""
        return {
            "bos_token": BOS_TEXT if tokenizer.bos_id != tokenizer.eos_id else EOS_TEXT,
            "eos_token": EOS_TEXT,
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "vocab_size": tokenizer.vocab_size,
        }

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        check_model(body.model)
        tokens = texts.encode(body.prompt)
        if body.add_special_tokens:
            tokens = [tokenizer.bos_id, *tokens]
        return {"tokens": tokens, "count": len(tokens), "max_model_len": engine.config.max_positions}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        check_model(body.model)
        for token in body.tokens:
            if not 0 <= token < tokenizer.vocab_size:
                raise RequestError(f"tokens: id {token} is not in the vocabulary of {tokenizer.vocab_size}", "tokens")
        return {"prompt": tokenizer.decode(body.tokens)}

    return app


def _encode(prompts: list[str | list[int]], tokenizer: Tokenizer) -> list[list[int]]:
    """Texts with BOS in front, token ids as they are."""
    return [[tokenizer.bos_id, *tokenizer.encode(p)] if isinstance(p, str) else p for p in prompts]


class _Answer:
    """One request on its way through the engine. Making it submits it, so refusals come before any output."""

    def __init__(
        self, body: CompletionRequest, prompts: list[list[int]], model_name: str, engine: Engine, texts: TokenTexts
    ):
        self._body = body
        self._texts = texts
        self._choices_per_prompt = body.n or 1
        tokenizer = engine.tokenizer
        choices = range(self._choices_per_prompt)
        self.stream = engine.submit([(tokens, body.sampling_params(i)) for tokens in prompts for i in choices])
        shown = [p if isinstance(p, str) else tokenizer.decode(p) for p in body.prompt] if body.echo else None
        self._echo = None if shown is None else [text for text in shown for _ in choices]
        self._begun: set[int] = set()
        self._frame: dict[str, Any] = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model_name,
        }

    async def whole(self) -> Completion:
        """The JSON answer."""
        parts: list[list[Choice]] = [[] for _ in self.stream.sequences]
        async for index, delta in self.stream:
            parts[index].append(self._choice(index, delta))
        choices = [_joined(pieces) for pieces in parts]
        return Completion(**self._frame, choices=choices, usage=self._usage(), fiftyfold=self._extension())

    async def events(self) -> AsyncIterator[str]:
        """The same as server-sent events; concatenated, the chunks' texts are the JSON answer's."""
        want_usage = self._body.stream_options is not None and self._body.stream_options.include_usage
        optional: dict[str, Any] = {"usage": None} if want_usage else {}
        try:
            async for index, delta in self.stream:
                if self.stream.finished and not want_usage:
                    optional["fiftyfold"] = self._extension()
                yield _event(Completion(**self._frame, choices=[self._choice(index, delta)], **optional))
            if want_usage:
                usage, extension = self._usage(), self._extension()
                yield _event(Completion(**self._frame, choices=[], usage=usage, fiftyfold=extension))
        except FiftyfoldError as error:
            yield f"data: {json.dumps(http_errors.describe(error)[1])}\n\n"
        yield "data: [DONE]\n\n"

    def _choice(self, index: int, delta: Delta) -> Choice:
        """``delta`` as a chunk, with the echoed prompt before the first."""
        sequence = self.stream.sequences[index]
        echo = self._echo[index] if self._echo is not None else ""
        first = index not in self._begun
        self._begun.add(index)
        logprobs = None
        if self._body.logprobs is not None:
            logprobs = self._texts.logprobs(delta.logprobs, offset=len(echo))
            if first:
                logprobs = Logprobs.joined([self._texts.logprobs(sequence.prompt_logprobs), logprobs])
        text = echo + delta.text if first else delta.text
        return Choice(index=index, text=text, logprobs=logprobs, finish_reason=delta.finish_reason)

    def _usage(self) -> Usage:
        """A prompt counts once, however many completions it gets."""
        sequences = self.stream.sequences
        prompt = sum(len(sequence.prompt) for sequence in sequences[:: self._choices_per_prompt])
        completion = sum(sequence.completion_tokens for sequence in sequences)
        return Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)

    def _extension(self) -> Extension:
        return Extension(cache_nbytes=sum(sequence.cache_nbytes for sequence in self.stream.sequences))


class _EventStream(StreamingResponse):
    """Server-sent events. However sending them ends, the request ends with it."""

    media_type = "text/event-stream"

    def __init__(self, answer: _Answer):
        super().__init__(answer.events())
        self._stream = answer.stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._stream.abort()


def _joined(pieces: list[Choice]) -> Choice:
    """The chunks of one choice as one."""
    logprobs = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    return Choice(
        index=pieces[0].index,
        text="".join(piece.text for piece in pieces),
        logprobs=Logprobs.joined(logprobs) if logprobs else None,
        finish_reason=pieces[-1].finish_reason,
    )


def _event(chunk: Completion) -> str:
    return f"data: {chunk.model_dump_json(exclude_unset=True)}\n\n"


async def _disconnected(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
