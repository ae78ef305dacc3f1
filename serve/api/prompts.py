"""Encoding of prompts."""

from __future__ import annotations

from model.errors import ConfigError
from model.tokenizer import Tokenizer
from serve.engine import RequestError


def encode_text(
    tokenizer: Tokenizer, text: str, parse_special: bool, add_bos: bool = True, field: str = "prompt"
) -> list[int]:
    """Return the token IDs of ``text``, by default with BOS in front.

    Spellings of special tokens are text unless ``parse_special``. Raises RequestError naming ``field``, a dotted
    name, for text that the tokenizer cannot encode.
    """
    try:
        return (tokenizer.encode_prompt if add_bos else tokenizer.encode)(text, parse_special)
    except ConfigError as error:
        raise RequestError.about(field, str(error)) from error
