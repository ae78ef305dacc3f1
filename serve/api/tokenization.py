"""Tokenizer routes, which lm-eval's ``local-completions`` uses."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from serve.api.prompts import encode_text
from serve.api.schemas.tokenization import DetokenizeRequest, TokenizeRequest
from serve.api.served_model import ServedModel
from serve.engine import RequestError


def add_routes(app: FastAPI, served: ServedModel) -> None:
    engine = served.engine
    tokenizer = engine.tokenizer
    # The two handlers without `async` run in threads, so that streams go on beside a long text.

    @app.get("/tokenizer_info")
    async def tokenizer_info() -> dict[str, Any]:
        """Return names and IDs of the special tokens. ``/tokenize`` maps a name, sent alone, to its token."""
        return {
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "vocab_size": tokenizer.vocab_size,
        }

    @app.post("/tokenize")
    def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        served.check_name(body.model)
        special = served.token_formatter.special_token(body.prompt)
        if special is None:
            tokens = encode_text(tokenizer, body.prompt, body.parse_special, add_bos=body.add_special_tokens)
        else:
            tokens = [tokenizer.bos_id, special] if body.add_special_tokens else [special]
        return {"tokens": tokens, "count": len(tokens), "max_model_len": engine.model_config.max_positions}

    @app.post("/detokenize")
    def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        served.check_name(body.model)
        for index, token in enumerate(body.tokens):
            if not 0 <= token < tokenizer.vocab_size:
                problem = f"token ID {token} is out of range for a vocabulary of {tokenizer.vocab_size}"
                raise RequestError.about(f"tokens.{index}", problem)
        return {"prompt": tokenizer.decode(body.tokens)}
