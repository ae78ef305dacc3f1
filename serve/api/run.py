"""A request in the engine, and its HTTP response."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel

from model.errors import FiftyfoldError
from serve.api.errors import CLIENT_CLOSED_REQUEST, error_response, wait_for_disconnect
from serve.api.event_stream import (
    DONE,
    EventStreamResponse,
    Pace,
    format_event,
    in_batches,
    obfuscation,
    with_keep_alive,
)
from serve.api.formats import ResponseFormat
from serve.api.schemas.generation import GenerationRequest
from serve.api.schemas.usage import Extension, PromptTokensDetails, Usage
from serve.api.served_model import ServedModel
from serve.engine import Delta


async def respond(run: Run, request: Request, pace: Pace) -> Response:
    """Return the response of a run: JSON, or an event stream if the request asks for one."""
    if run.body.stream:
        return EventStreamResponse(with_keep_alive(run.events(pace.interval), pace.keep_alive), close=run.stream.abort)
    response = asyncio.ensure_future(run.response())
    disconnected = asyncio.ensure_future(wait_for_disconnect(request))
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


class Run:
    """One request in the engine. The constructor submits it, so that refusals come before any output."""

    def __init__(self, body: GenerationRequest, prompts: list[list[int]], served: ServedModel, format: ResponseFormat):
        self.body = body
        self._format = format
        self._candidates = body.candidates
        engine = served.engine
        body.check_token_ids(engine.tokenizer, engine.vocab_size)
        requests = []
        for tokens in prompts:
            limit = body.token_limit
            if limit is None:
                limit = max(1, engine.max_sequence_tokens - max(1, len(tokens)))
            requests += [(tokens, body.sampling_params(i, limit)) for i in range(self._candidates)]
        self.stream = engine.submit(requests)
        self._common_fields: dict[str, Any] = {
            "id": f"{format.id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": served.name,
        }

    async def response(self) -> BaseModel:
        """Return the complete JSON response."""
        deltas: list[list[Delta]] = [[] for _ in self.stream.sequences]
        async for index, delta in self.stream:
            deltas[index].append(delta)
        outputs = [Delta.join(parts) for parts in deltas]
        choices = [
            self._format.choice(index, chosen // self._candidates, self.stream.sequences[chosen], outputs[chosen])
            for index, chosen in enumerate(self._choose(outputs))
        ]
        return self._message(self._format.response, choices=choices, usage=self._usage(), fiftyfold=self._extension())

    def _choose(self, outputs: list[Delta]) -> list[int]:
        """Return the completions to report: of each prompt all in order, or the ``n`` best, the best one first."""
        if self._candidates == self.body.n:
            return list(range(len(outputs)))
        chosen: list[int] = []
        for start in range(0, len(outputs), self._candidates):
            group = range(start, start + self._candidates)
            chosen += sorted(group, key=lambda i: -outputs[i].mean_logprob)[: self.body.n]
        return chosen

    async def events(self, interval: float) -> AsyncIterator[str]:
        """Yield the response as server-sent events, in batches at least ``interval`` seconds apart.

        The chunks' texts concatenate to the JSON response's text.
        """
        include_usage = self.body.stream_options.include_usage
        optional: dict[str, Any] = {"usage": None} if include_usage else {}
        started: set[int] = set()
        unfinished = len(self.stream.sequences)
        try:
            async for batch in in_batches(self.stream, interval):
                parts: dict[int, list[Delta]] = {}
                for index, part in batch:
                    parts.setdefault(index, []).append(part)
                for index, deltas in parts.items():
                    delta, sequence, first = Delta.join(deltas), self.stream.sequences[index], index not in started
                    started.add(index)
                    unfinished -= delta.final
                    choices = self._format.chunk_choices(index, index // self._candidates, sequence, delta, first)
                    for number, choice in enumerate(choices, 1):
                        if not unfinished and number == len(choices) and not include_usage:
                            optional["fiftyfold"] = self._extension()
                        yield self._event(choices=[choice], **optional)
            if include_usage:
                yield self._event(choices=[], usage=self._usage(), fiftyfold=self._extension())
        except FiftyfoldError as error:
            yield format_event(json.dumps(error_response(error)[1]))
        yield DONE

    def _event(self, **fields: Any) -> str:
        chunk = self._message(self._format.chunk, **fields)
        content = chunk.model_dump_json(exclude_unset=True)
        if self.body.stream_options.include_obfuscation:
            chunk = self._message(self._format.chunk, **fields, obfuscation=obfuscation(content))
            content = chunk.model_dump_json(exclude_unset=True)
        return format_event(content)

    def _message(self, schema: type[BaseModel], **fields: Any) -> BaseModel:
        return schema(object=schema.model_fields["object"].default, **self._common_fields, **fields)

    def _usage(self) -> Usage:
        """Return token counts. Each prompt counts once, regardless of its number of completions."""
        sequences = self.stream.sequences
        prompts = sequences[:: self._candidates]
        prompt = sum(sequence.prompt_length for sequence in prompts)
        completion = sum(sequence.completion_tokens for sequence in sequences)
        details = PromptTokensDetails(cached_tokens=sum(sequence.cached_tokens for sequence in prompts))
        return Usage(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=details,
        )

    def _extension(self) -> Extension:
        return Extension(cache_nbytes=sum(sequence.cache_nbytes for sequence in self.stream.sequences))
