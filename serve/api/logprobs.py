"""Tokens as strings, and log-probabilities in OpenAI's format."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable

from model.tokenizer import Tokenizer
from serve.api.schemas.chat import ChatTokenLogprob, ChatTopLogprob
from serve.api.schemas.completions import Logprobs
from serve.engine import TokenLogprob


class TokenFormatter:
    """Format single tokens as strings."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._spellings: dict[int, list[str]] = {}
        for spelling, token_id in tokenizer.special_tokens.items():
            self._spellings.setdefault(token_id, []).append(spelling)
        self._special = {tokenizer.bos_id: tokenizer.bos_token, tokenizer.eos_id: tokenizer.eos_token}

    def token_string(self, token_id: int) -> str:
        """Return the token's text, or ``token_id:N`` if it has none of its own (a byte within a character)."""
        if token_id in self._special:
            return self._special[token_id]
        text = self._tokenizer.decode_inside([token_id])
        return text if text and "\N{REPLACEMENT CHARACTER}" not in text else f"token_id:{token_id}"

    def special_token(self, text: str) -> int | None:
        """Return the ID of BOS or EOS if ``text`` is its name."""
        tokenizer = self._tokenizer
        return {tokenizer.bos_token: tokenizer.bos_id, tokenizer.eos_token: tokenizer.eos_id}.get(text)

    def logprobs(self, records: Iterable[TokenLogprob], offset: int = 0, end: int | None = None) -> Logprobs:
        """Convert ``records`` to four parallel lists, with text offsets increased by ``offset``, at most ``end``.

        A tokenizer may decode a prompt to more text than was given, as if it lengthens some characters.
        """
        records = list(records)
        return Logprobs(
            tokens=[self.token_string(record.token_id) for record in records],
            token_logprobs=[record.logprob for record in records],
            top_logprobs=[self._top(record) if record.logprob is not None else None for record in records],
            text_offset=[min(offset + record.text_offset, sys.maxsize if end is None else end) for record in records],
        )

    def with_spellings(self, records: Iterable[TokenLogprob], text: str) -> list[TokenLogprob]:
        """Return the records of the tokens of ``text`` with offsets that count the spellings of special tokens in it.

        Decoding leaves these spellings out, and with them the spaces that a special token may take from its sides.
        """
        shifted, shift = [], 0
        for record in records:
            start = record.text_offset + shift
            shifted.append(record._replace(text_offset=start))
            for spelling in self._spellings.get(record.token_id, ()):
                if found := re.compile(rf"\s*{re.escape(spelling)}").match(text, start):
                    shift += found.end() - start
                    break
        return shifted

    def chat_logprobs(self, records: Iterable[TokenLogprob], alternatives: int) -> list[ChatTokenLogprob]:
        """Convert the records of generated tokens to objects, with at most ``alternatives`` per token."""
        return [
            ChatTokenLogprob(
                **self._chat_token(record.token_id, record.logprob or 0.0).model_dump(),
                top_logprobs=[self._chat_token(*pair) for pair in record.top[:alternatives]],
            )
            for record in records
        ]

    def _chat_token(self, token_id: int, logprob: float) -> ChatTopLogprob:
        token = self.token_string(token_id)
        has_text = token_id not in self._special and token == self._tokenizer.decode_inside([token_id])
        return ChatTopLogprob(token=token, logprob=logprob, bytes=list(token.encode()) if has_text else None)

    def _top(self, record: TokenLogprob) -> dict[str, float]:
        """Return {token string: logprob}. A duplicate string is replaced by ``token_id:N``."""
        top: dict[str, float] = {}
        for token_id, logprob in record.top:
            text = self.token_string(token_id)
            top[f"token_id:{token_id}" if text in top else text] = logprob
        return top
