"""A request in the engine, and its HTTP response."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import Request, Response
from pydantic import BaseModel

from model.errors import FiftyfoldError
from serve.api.disconnect import run_unless_disconnected
from serve.api.errors import CLIENT_CLOSED_REQUEST, error_response
from serve.api.event_stream import (
    DONE,
    KEEP_ALIVE,
    EventStreamResponse,
    format_event,
    obfuscation,
)
from serve.api.formats import ResponseFormat
from serve.api.schemas.generation import GenerationRequest
from serve.api.schemas.usage import Extension, PromptTokensDetails, Usage
from serve.api.served_model import ServedModel
from serve.engine import Delta, Pace, RequestFields


async def respond(run: Run, request: Request, pace: Pace) -> Response:
    """Return the response of a run: JSON, or an event stream if the request asks for one."""
    if run.body.stream:
        return EventStreamResponse(run.events(pace), close=run.stream.abort)
    try:
        response = await run_unless_disconnected(request, run.response())
    finally:
        run.stream.abort()
    if response is None:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return Response(response.model_dump_json(exclude_unset=True), media_type="application/json")


class Run:
    """One request in the engine. The constructor submits it, so that refusals come before any output."""

    def __init__(self, body: GenerationRequest, prompts: list[list[int]], served: ServedModel, format: ResponseFormat):
        self.body = body
        self._format = format
        self._candidates = body.candidates
        engine = served.engine
        body.check_token_ids(engine.tokenizer, engine.vocab_size)
        requests, fields = [], []
        for tokens, prompt_field in zip(prompts, body.prompt_fields):
            limit = body.token_limit
            if limit is None:
                limit = max(1, engine.max_sequence_tokens - max(1, len(tokens)))
            requests += [(tokens, body.sampling_params(i, limit)) for i in range(self._candidates)]
            fields += [RequestFields(prompt_field, body.limit_field)] * self._candidates
        self.stream = engine.submit(requests, fields)
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

    async def events(self, pace: Pace) -> AsyncIterator[str]:
        """Yield the response as server-sent events, several of them at a time, and comments while there is none.

        The chunks' texts concatenate to the JSON response's text.
        """
        include_usage = self.body.stream_options.include_usage
        started: set[int] = set()
        left = len(self.stream.sequences)
        try:
            async with aclosing(self.stream.batches(pace)) as batches:
                async for batch in batches:
                    left -= sum(delta.final for _, delta in batch)
                    events = self._chunks(batch, started, is_last=not left and not include_usage)
                    if not left:
                        break
                    yield "".join(events) or KEEP_ALIVE
            if include_usage:
                events.append(self._event(choices=[], usage=self._usage(), fiftyfold=self._extension()))
        except FiftyfoldError as error:
            events = [format_event(json.dumps(error_response(error)[1]))]
        yield "".join(events) + DONE

    def _chunks(self, batch: list[tuple[int, Delta]], started: set[int], is_last: bool) -> list[str]:
        """Return the events of a list of outputs, the response's last one included if ``is_last``. Update ``started``,
        the completions with earlier events."""
        parts: dict[int, list[Delta]] = {}
        for index, part in batch:
            parts.setdefault(index, []).append(part)
        choices = []
        for index, deltas in parts.items():
            sequence, first = self.stream.sequences[index], index not in started
            prompt = index // self._candidates
            choices += self._format.chunk_choices(index, prompt, sequence, Delta.join(deltas), first)
        started.update(parts)
        optional: dict[str, Any] = {"usage": None} if self.body.stream_options.include_usage else {}
        events = [self._event(choices=[choice], **optional) for choice in choices[: len(choices) - is_last]]
        if is_last:
            events.append(self._event(choices=choices[-1:], **optional, fiftyfold=self._extension()))
        return events

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
