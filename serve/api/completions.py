"""Route of OpenAI's completions API."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI, Request, Response

from model.tokenizer import Tokenizer
from model.tokenizer.streaming import finished_text
from serve.api.formats import CompletionFormat
from serve.api.prompts import encode_text
from serve.api.run import Run, respond
from serve.api.schemas.completions import Completion, CompletionRequest
from serve.api.served_model import ServedModel
from serve.engine import Pace

_LARGE_PROMPT = 1 << 14
"""Characters or token IDs from which prompts are encoded in a thread, so that other streams go on."""


def add_routes(app: FastAPI, served: ServedModel, pace: Pace) -> None:
    tokenizer = served.engine.tokenizer

    @app.post("/v1/completions", response_model=Completion)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        served.check_name(body.model)
        served.engine.check_size(len(body.prompt) * body.candidates)  # before a million prompts are encoded
        if sum(map(len, body.prompt)) < _LARGE_PROMPT:
            prompts, echoes = _encode(body, tokenizer)
        else:
            prompts, echoes = await asyncio.to_thread(_encode, body, tokenizer)
        run = Run(body, prompts, served, CompletionFormat(body, served.token_formatter, echoes))
        return await respond(run, request, pace)


def _encode(body: CompletionRequest, tokenizer: Tokenizer) -> tuple[list[list[int]], list[str] | None]:
    """Return the prompts' token IDs, and their texts if they are to be echoed. Text is encoded with BOS in front, token
    IDs are unchanged."""
    prompts = [
        encode_text(tokenizer, prompt, body.parse_special, field=field) if isinstance(prompt, str) else prompt
        for prompt, field in zip(body.prompt, body.prompt_fields)
    ]
    if not body.echo:
        return prompts, None
    return prompts, [prompt if isinstance(prompt, str) else finished_text(tokenizer, prompt) for prompt in body.prompt]
