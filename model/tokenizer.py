"""Tokenizers: bytes by default, or a Hugging Face ``tokenizer.json``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Protocol

from model.errors import ConfigError

FILE_NAME = "tokenizer.json"
BYTE = "byte"


class Tokenizer(Protocol):
    """Interface of a tokenizer. ``encode`` adds no special tokens and ``decode`` omits them."""

    vocab_size: int
    bos_id: int
    eos_id: int
    bos_token: str
    eos_token: str

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` into ``folder``, readable by :func:`load_tokenizer`."""


class ByteTokenizer:
    """UTF-8 bytes shifted by two; IDs 0 and 1 are BOS and EOS, as in DeepSeek-V4's vocabulary."""

    bos_id = 0
    eos_id = 1
    bos_token = "<｜begin▁of▁sentence｜>"
    eos_token = "<｜end▁of▁sentence｜>"
    vocab_size = 258

    def encode(self, text: str) -> list[int]:
        return [byte + 2 for byte in text.encode("utf-8")]

    def decode(self, ids: list[int]) -> str:
        return bytes(i - 2 for i in ids if 2 <= i < 258).decode("utf-8", errors="replace")

    def save(self, folder: str | Path) -> None:
        """Write a byte-level vocabulary without merges, which any reader of ``tokenizer.json`` understands."""
        special = {
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        content = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": self.bos_id, "content": self.bos_token, **special},
                {"id": self.eos_id, "content": self.eos_token, **special},
            ],
            "normalizer": None,
            "pre_tokenizer": level,
            "post_processor": None,
            "decoder": level,
            "model": {"type": "BPE", "vocab": _byte_vocabulary(), "merges": []},
        }
        (Path(folder) / FILE_NAME).write_text(json.dumps(content, ensure_ascii=False) + "\n", encoding="utf-8")


def _byte_vocabulary() -> dict[str, int]:
    """Return token IDs by character. In byte-level vocabularies a printable Latin-1 character stands for its own code,
    and the other bytes map in order to characters from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    vocabulary = {ByteTokenizer.bos_token: ByteTokenizer.bos_id, ByteTokenizer.eos_token: ByteTokenizer.eos_id}
    for byte in range(256):
        vocabulary[chr(byte if byte in printable else next(others))] = byte + 2
    return vocabulary


class HuggingFaceTokenizer:
    """A ``tokenizer.json`` file read by the ``tokenizers`` library. Nothing is downloaded."""

    _BOS_NAMES = ("<s>", "<bos>", "<|begin_of_text|>", "<|begin_of_sentence|>", "<｜begin▁of▁sentence｜>", "[CLS]")
    _EOS_NAMES = ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "[SEP]")

    def __init__(self, path: str | Path):
        from tokenizers import Tokenizer as Backend

        self.path = Path(path)
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ConfigError(f"{path}: not a readable tokenizer.json ({error})") from error
        self.vocab_size = self._backend.get_vocab_size(with_added_tokens=True)
        self.eos_token, self.eos_id = self._find(self._EOS_NAMES, "end-of-sequence")
        try:
            self.bos_token, self.bos_id = self._find(self._BOS_NAMES, "begin-of-sequence")
        except ConfigError:  # GPT-2 style vocabularies use one token for both
            self.bos_token, self.bos_id = self.eos_token, self.eos_id

    def _find(self, names: tuple[str, ...], role: str) -> tuple[str, int]:
        for name in names:
            token = self._backend.token_to_id(name)
            if token is not None:
                return name, token
        raise ConfigError(f"{self.path}: has no {role} token (looked for {', '.join(names)})")

    def encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def save(self, folder: str | Path) -> None:
        shutil.copyfile(self.path, Path(folder) / FILE_NAME)


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Load ``"byte"``, a ``tokenizer.json`` file, or a folder with one. Raises ConfigError."""
    if str(source) == BYTE:
        return ByteTokenizer()
    path = Path(source)
    if path.is_dir():
        path = path / FILE_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"tokenizer {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"tokenizer {path}: not valid JSON ({error})") from error
    model = content.get("model") if isinstance(content, dict) else None
    if isinstance(model, dict) and model.get("vocab") == _byte_vocabulary():
        return ByteTokenizer()  # unlike the library, it never parses text as a special token
    return HuggingFaceTokenizer(path)
