"""Tokenizers: bytes by default, or a Hugging Face ``tokenizer.json``. Nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path

from model.errors import ConfigError
from model.tokenizer.base import FILE_NAME, Tokenizer
from model.tokenizer.byte import ByteTokenizer, is_byte_tokenizer
from model.tokenizer.hugging_face import HuggingFaceTokenizer
from model.tokenizer.side_files import SideFiles, read_object

__all__ = ["BYTE", "FILE_NAME", "ByteTokenizer", "HuggingFaceTokenizer", "Tokenizer", "load_tokenizer"]

BYTE = "byte"


def load_tokenizer(
    source: str | Path,
    bos_token: str | None = None,
    eos_token: str | None = None,
    model_vocab_size: int | None = None,
) -> Tokenizer:
    """Load ``"byte"``, a ``tokenizer.json`` file, or a folder with one, and the files beside it.

    ``bos_token`` and ``eos_token`` replace the declared tokens (see docs/text.md). ``model_vocab_size`` is the size of
    the vocabulary that the tokenizer's IDs must lie in. Raises ConfigError, with the field ``bos_token`` or
    ``eos_token`` where that argument is wrong or missing.
    """
    if str(source) == BYTE:
        tokenizer = _load_byte(bos_token, eos_token)
    else:
        tokenizer = _load_file(Path(source), bos_token, eos_token)
    if model_vocab_size is not None and tokenizer.vocab_size > model_vocab_size:
        raise ConfigError(
            f"{source}: has token IDs up to {tokenizer.vocab_size - 1}, but the model has a vocabulary of "
            f"{model_vocab_size}"
        )
    return tokenizer


def _load_byte(bos_token: str | None, eos_token: str | None) -> Tokenizer:
    for role, name, own in (
        ("bos_token", bos_token, ByteTokenizer.bos_token),
        ("eos_token", eos_token, ByteTokenizer.eos_token),
    ):
        if name not in (None, own):
            raise ConfigError(f"'{name}' is not a token of the byte tokenizer, which has its own '{own}'", role)
    return ByteTokenizer()


def _load_file(path: Path, bos_token: str | None, eos_token: str | None) -> Tokenizer:
    if path.is_dir():
        path = path / FILE_NAME
    if not os.path.lexists(path):
        raise ConfigError(f"{path}: No such file or directory")
    content, side_files = read_object(path), SideFiles.read(path.parent)
    if is_byte_tokenizer(content, side_files) and bos_token is None and eos_token is None:
        return ByteTokenizer(side_files)
    return HuggingFaceTokenizer(path, content, side_files, bos_token, eos_token)
