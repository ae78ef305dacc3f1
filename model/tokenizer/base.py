"""Interface of a tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from model.tokenizer.side_files import SideFiles

FILE_NAME = "tokenizer.json"
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_UNFINISHED_TOKENS = 3
"""A UTF-8 character has at most four bytes, so an unfinished one has at most three."""
_ANCHORS = ("\n", " ", "a", ".")
"""Prefixes for encoding a text as part of a longer one. The first one that stays a token of its own is used."""


class Tokenizer(ABC):
    """Text to token IDs and back.

    IDs run from 0 to ``vocab_size`` - 1; a vocabulary may leave some of them unused. The spelling of a special token in
    text is encoded in ordinary tokens, unless the caller asks for ``parse_special``.
    """

    vocab_size: int
    """Largest ID plus 1."""
    bos_id: int
    eos_id: int
    """Ends a document."""
    bos_token: str
    eos_token: str
    special_tokens: Mapping[str, int]
    """IDs of special tokens by spelling. :meth:`decode` omits them."""
    extra_stop_ids: frozenset[int] = frozenset()
    """Tokens that end generation besides ``eos_id``."""
    continuation_ids: tuple[int, ...] = ()
    """Tokens of the UTF-8 continuation bytes 0x80 and 0xBF, if the vocabulary has tokens of single bytes."""
    side_files: SideFiles

    @property
    def stop_ids(self) -> frozenset[int]:
        """All tokens that end generation."""
        return self.extra_stop_ids | {self.eos_id}

    @abstractmethod
    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Return the token IDs of ``text``, without BOS and EOS. ``parse_special`` maps spellings of special tokens to
        their IDs. Raises ConfigError for text that the vocabulary cannot express."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Return the text of ``ids``. Special tokens and unused IDs have none. Bytes that are not UTF-8 become U+FFFD,
        one for each maximal part of a character."""

    @abstractmethod
    def is_text(self, token_id: int) -> bool:
        """Return whether a token takes part in decoding: it is neither special nor unused."""

    def ends_inside_character(self, ids: list[int], text: str) -> bool:
        """Return whether further bytes may complete the last character of ``text``, the decoding of ``ids``."""
        return text.endswith(REPLACEMENT) and any(
            not self.decode([*ids, *[byte] * count]).startswith(text)
            for byte in self.continuation_ids
            for count in range(1, MAX_UNFINISHED_TOKENS + 1)
        )

    def encode_inside(self, text: str, parse_special: bool = False) -> list[int]:
        """Return the token IDs of ``text`` as it stands inside a longer text, without the space that some tokenizers
        put in front of their input."""
        for anchor in _ANCHORS:
            before, whole = self.encode(anchor), self.encode(anchor + text, parse_special)
            if before and whole[: len(before)] == before:
                return whole[len(before) :]
        return self.encode(text, parse_special)

    def decode_inside(self, ids: list[int]) -> str:
        """Return the text of ``ids`` as it stands inside a longer text, with a space in front that decoding strips at
        the start of a text."""
        anchor = next(filter(None, map(self.encode, _ANCHORS[::-1])), [])
        return self.decode(anchor + ids)[len(self.decode(anchor)) :]

    def lost_characters(self, text: str) -> set[str]:
        """Return the characters of ``text``, spaces aside, that the vocabulary does not have."""
        return {c for c in set(text) if not c.isspace() and self._loses(c)}

    def _loses(self, character: str) -> bool:
        return not self.encode_inside(character)

    def encode_prompt(self, text: str, parse_special: bool = False) -> list[int]:
        """Return BOS and the token IDs of ``text``. A BOS that ``parse_special`` finds at the start is not doubled."""
        ids = self.encode(text, parse_special)
        return ids if parse_special and ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def save(self, folder: str | Path) -> None:
        """Write ``tokenizer.json`` and the files that belong to it into ``folder``, readable by
        :func:`model.tokenizer.load_tokenizer`."""
        self._write_vocabulary(Path(folder) / FILE_NAME)
        self.side_files.write(folder)

    @abstractmethod
    def _write_vocabulary(self, path: Path) -> None:
        """Write ``tokenizer.json``."""

    def tokenizer_config(self) -> dict[str, Any]:
        """Return the content of ``tokenizer_config.json``, which transformers' AutoTokenizer reads."""
        defaults = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        return {**defaults, **self.side_files.with_tokens(self.bos_token, self.eos_token).tokenizer_config}

    def generation_config(self) -> dict[str, Any]:
        """Return the content of ``generation_config.json``, with every token that ends generation."""
        declared = self.side_files.ids("eos_token_id")
        stops = declared if self.eos_id in declared else [self.eos_id, *declared]
        return {
            **self.side_files.generation_config,
            "bos_token_id": self.bos_id,
            "eos_token_id": stops[0] if len(stops) == 1 else stops,
        }
