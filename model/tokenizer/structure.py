"""Structure of a ``tokenizer.json``, checked before its values are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from model.errors import ConfigError
from model.wording import quote_json

UNUSED = ("truncation", "padding")
"""Settings of one use of a vocabulary, with other lengths than ours."""


def without_settings(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Return the content of a ``tokenizer.json`` without truncation, padding and BPE dropout, which draws another
    tokenization of a text on every call.

    Raises ConfigError, naming file and key, for added tokens or a vocabulary of another structure than the library's.
    """
    model = content.get("model")
    if not isinstance(model, dict):
        raise _wrong(path, "model", "an object", model)
    _check_added_tokens(path, content.get("added_tokens"))
    _check_vocabulary(path, model.get("vocab"))
    if "dropout" in model:
        model = {**model, "dropout": None}
    return {**content, **dict.fromkeys(UNUSED), "model": model}


def _check_added_tokens(path: Path, tokens: Any) -> None:
    if tokens is None:
        return
    if not isinstance(tokens, list):
        raise _wrong(path, "added_tokens", "a list", tokens)
    for place, token in enumerate(tokens):
        key = f"added_tokens[{place}]"
        if not isinstance(token, dict):
            raise _wrong(path, key, "an object", token)
        if not isinstance(token.get("content"), str):
            raise _wrong(path, f"{key}.content", "a string", token.get("content"))
        if type(token.get("id")) is not int or token["id"] < 0:
            raise _wrong(path, f"{key}.id", "a token ID", token.get("id"))


def _check_vocabulary(path: Path, vocabulary: Any) -> None:
    """Check a mapping of tokens to IDs, or a list of tokens and their scores."""
    if isinstance(vocabulary, dict):
        for token, token_id in vocabulary.items():
            if type(token_id) is not int or token_id < 0:
                raise _wrong(path, f"model.vocab[{quote_json(token)}]", "a token ID", token_id)
    elif isinstance(vocabulary, list):
        for place, item in enumerate(vocabulary):
            if not (
                isinstance(item, list) and len(item) == 2 and isinstance(item[0], str) and type(item[1]) in (int, float)
            ):
                raise _wrong(path, f"model.vocab[{place}]", "a token and its score", item)
    else:
        raise _wrong(path, "model.vocab", "an object or a list", vocabulary)


def _wrong(path: Path, key: str, expected: str, found: Any) -> ConfigError:
    return ConfigError(f"{path}: {key}: expected {expected}, found {quote_json(found)}")
