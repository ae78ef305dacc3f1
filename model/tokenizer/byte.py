"""The tokenizer of UTF-8 bytes."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from types import MappingProxyType
from typing import Any

from model.tokenizer.base import MAX_UNFINISHED_TOKENS, REPLACEMENT, Tokenizer
from model.tokenizer.side_files import SideFiles

_SPECIAL_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes shifted by two; IDs 0 and 1 are BOS and EOS, as in DeepSeek-V4's vocabulary."""

    bos_id = 0
    eos_id = 1
    bos_token = "<｜begin▁of▁sentence｜>"
    eos_token = "<｜end▁of▁sentence｜>"
    vocab_size = 258
    special_tokens = MappingProxyType({bos_token: bos_id, eos_token: eos_id})
    continuation_ids = (0x80 + 2, 0xBF + 2)
    _spelling = re.compile("|".join(map(re.escape, (bos_token, eos_token))))

    def __init__(self, side_files: SideFiles | None = None):
        self.side_files = side_files or SideFiles()
        self.extra_stop_ids = frozenset(self.side_files.ids("eos_token_id")) & {*range(self.vocab_size)} - {self.eos_id}

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        ids, start = [], 0
        for match in self._spelling.finditer(text) if parse_special else ():
            ids += [*self.encode(text[start : match.start()]), self.special_tokens[match[0]]]
            start = match.end()
        return ids + [byte + 2 for byte in text[start:].encode("utf-8")]

    def decode(self, ids: list[int]) -> str:
        return bytes([i - 2 for i in ids if 2 <= i < 258]).decode("utf-8", errors="replace")

    def is_text(self, token_id: int) -> bool:
        return 2 <= token_id < 258

    def ends_inside_character(self, ids: list[int], text: str) -> bool:
        if not text.endswith(REPLACEMENT):
            return False
        tail = bytes([i - 2 for i in ids if 2 <= i < 258][-MAX_UNFINISHED_TOKENS:])
        unfinished = tail[codecs.utf_8_decode(tail, "replace")[1] :]
        # Python also waits for the end of a surrogate, which UTF-8 excludes.
        return bool(unfinished) and not (unfinished[0] == 0xED and unfinished[1:] >= b"\xa0")

    def _write_vocabulary(self, path: Path) -> None:
        """Write a byte-level vocabulary without merges, which any reader of ``tokenizer.json`` understands."""
        path.write_text(json.dumps(_content(), ensure_ascii=False) + "\n", encoding="utf-8")


def is_byte_tokenizer(content: dict[str, Any], side_files: SideFiles) -> bool:
    """Return whether the content of a ``tokenizer.json`` and the files beside it describe :class:`ByteTokenizer`."""
    declared = {"bos_token": ByteTokenizer.bos_token, "eos_token": ByteTokenizer.eos_token}
    expected = _content()
    model = content.get("model")
    return (
        isinstance(model, dict)
        and all(model.get(key) == value for key, value in expected["model"].items())
        and all(content.get(key) == expected[key] for key in ("added_tokens", "normalizer", "pre_tokenizer", "decoder"))
        and all(side_files.names(role) in ([], [name]) for role, name in declared.items())  # type: ignore[arg-type]
    )


def byte_character(byte: int) -> str:
    """Return the character for a byte in byte-level vocabularies. A printable Latin-1 character stands for its own
    code, and the other bytes map in order to characters from 256 on."""
    return _BYTE_CHARACTERS[byte]


def _map_bytes() -> list[str]:
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


_BYTE_CHARACTERS = _map_bytes()


def _bos_first() -> dict[str, Any]:
    """Return the template by which other readers begin a text with BOS, as the models were trained."""
    name = ByteTokenizer.bos_token
    bos, text = {"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, text],
        "pair": [bos, text, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [ByteTokenizer.bos_id], "tokens": [name]}},
    }


def _content() -> dict[str, Any]:
    """Return the content of the byte tokenizer's ``tokenizer.json``."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = dict(ByteTokenizer.special_tokens)
    vocabulary = special | {byte_character(byte): byte + 2 for byte in range(256)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, "content": name, **_SPECIAL_FLAGS} for name, token in special.items()],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": _bos_first(),
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
