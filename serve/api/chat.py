"""Route of OpenAI's chat completions API."""

from __future__ import annotations

import asyncio

from fastapi import FastAPI, Request, Response

from serve.api.formats import ChatFormat
from serve.api.run import Run, respond
from serve.api.schemas.chat import ChatCompletion, ChatRequest
from serve.api.served_model import ServedModel
from serve.engine import Pace


def add_routes(app: FastAPI, served: ServedModel, pace: Pace) -> None:
    @app.post("/v1/chat/completions", response_model=ChatCompletion)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        served.check_name(body.model)
        served.engine.check_size(body.candidates)
        prompt = await asyncio.to_thread(
            served.chat_template.encode,
            body.messages,
            [] if body.tool_choice == "none" else body.tools,
            body.add_generation_prompt,
            body.chat_template_kwargs,
        )
        run = Run(body, [prompt], served, ChatFormat(body, served.token_formatter))
        return await respond(run, request, pace)
