"""Tokenizers of the ``tokenizers`` library."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from model.errors import ConfigError
from model.tokenizer.base import REPLACEMENT, Tokenizer
from model.tokenizer.byte import byte_character
from model.tokenizer.side_files import Role, SideFiles
from model.tokenizer.structure import without_settings

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

MAX_TOKEN_ID = 2**24 - 1
"""Larger IDs are taken for damage: the network would have an embedding for every ID up to the largest."""
_USUAL_NAMES: dict[Role, tuple[str, ...]] = {
    "bos_token": ("<s>", "<bos>", "<|begin_of_text|>", "<|begin_of_sentence|>", "<｜begin▁of▁sentence｜>", "[CLS]"),
    "eos_token": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "<｜end▁of▁sentence｜>", "[SEP]"),
}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_MIN_BATCH_LENGTH = 1 << 14
"""Minimum length, in characters or tokens, for processing a text as a batch of one. Batch calls release the GIL, but
their overhead exceeds the cost of a short text."""


class HuggingFaceTokenizer(Tokenizer):
    """The vocabulary of a ``tokenizer.json`` with ``content``, without its truncation, padding, dropout and
    post-processor.

    Declared special tokens are those of the files beside it. ``bos_token`` and ``eos_token`` replace them.
    """

    def __init__(
        self,
        path: Path,
        content: dict[str, Any],
        side_files: SideFiles,
        bos_token: str | None = None,
        eos_token: str | None = None,
    ):
        self.path = path
        self._content = without_settings(path, content)
        self._declared_tokens = _add_missing_tokens(self._content, side_files)
        self._backend = self._load()
        self._vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self._names = self._check_ids()
        self.vocab_size = 1 + max(self._vocabulary.values())
        self.eos_token, self.eos_id = self._find("eos_token", side_files, eos_token)
        self.bos_token, self.bos_id = self._find("bos_token", side_files, bos_token)
        named = {self._vocabulary[name] for name in side_files.names("eos_token") if name in self._vocabulary}
        stops = named.union(side_files.ids("eos_token_id")) - {self.eos_id}
        self.extra_stop_ids = frozenset(token for token in stops if token < self.vocab_size)
        self.side_files = side_files.with_tokens(self.bos_token, self.eos_token)
        if named - {self.eos_id}:  # the line above keeps one name
            self.side_files = self.side_files.with_stop_ids([self.eos_id, *sorted(self.extra_stop_ids)])
        self._special_names = {self.bos_token, self.eos_token} | (side_files.special_names() & self._vocabulary.keys())
        _declare_special(self._backend, self._special_names)
        self._backend.encode_special_tokens = True  # in the library's words: encode their spellings as text
        added = self._backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: token_id for token_id, token in added.items() if token.special}
        self._unknown_id = self._find_unknown()
        self._special_ids = frozenset(self.special_tokens.values())
        self._text_ids = frozenset(self._vocabulary.values()) - self._special_ids
        self._reserved_ids = self._special_ids - {self._unknown_id}
        """IDs that no text may produce."""
        self._byte_ids = self._find_byte_ids()
        self.continuation_ids = tuple(id for byte in (0x80, 0xBF) if (id := self._byte_ids.get(byte)) is not None)

    # --- interface

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        backend = self._parsing_backend if parse_special else self._backend
        try:
            if len(text) < _MIN_BATCH_LENGTH:
                ids = backend.encode(text, add_special_tokens=False).ids
            else:
                [encoding] = backend.encode_batch_fast([text], add_special_tokens=False)
                ids = encoding.ids
        except Exception as error:  # the library raises plain Exception
            named = next(filter(self._fails, dict.fromkeys(text)), text[:40])
            raise ConfigError(f"{self.path}: cannot encode {named!r} ({error})") from error
        if parse_special or self._reserved_ids.isdisjoint(ids):
            return ids
        # The vocabulary of the model itself, not only the list of added tokens, holds the spelling.
        return [piece for token in ids for piece in (self._spell(token) if token in self._reserved_ids else (token,))]

    def decode(self, ids: list[int]) -> str:
        if len(ids) < _MIN_BATCH_LENGTH:
            text = self._backend.decode(ids, skip_special_tokens=True)
        else:
            [text] = self._backend.decode_batch([ids], skip_special_tokens=True)
        if REPLACEMENT not in text or "<0x80>" not in self._vocabulary or self._backend.decoder is None:
            return text
        # The library replaces a whole run of bytes if one of them is wrong, valid characters included.
        tokens = [self._names[token] for token in ids if self.is_text(token)]
        return self._backend.decoder.decode(list(_replace_wrong_bytes(tokens)))

    def is_text(self, token_id: int) -> bool:
        return token_id in self._text_ids

    def _loses(self, character: str) -> bool:
        if self._fails(character):
            return False  # encoding the text will fail
        ids = self.encode_inside(character)
        return not ids or self._unknown_id in ids

    def _fails(self, text: str) -> bool:
        """Return whether the library refuses a text, as it does without a token for unknown characters."""
        try:
            self._backend.encode(text, add_special_tokens=False)
        except Exception:  # the library raises plain Exception
            return True
        return False

    def _write_vocabulary(self, path: Path) -> None:
        path.write_text(json.dumps(self._content, ensure_ascii=False) + "\n", encoding="utf-8")

    # --- loading

    def _load(self, exact_spellings: bool = False) -> Backend:
        """Return the library's tokenizer. ``exact_spellings`` finds special tokens before the text is normalized: other
        texts that the normalizer changes to a spelling, such as its uppercase letters, are text."""
        from tokenizers import Tokenizer as Backend

        content = self._content
        if exact_spellings:
            tokens = [t | {"normalized": False} if t.get("special") else t for t in content.get("added_tokens") or []]
            content = {**content, "added_tokens": tokens}
        try:
            return Backend.from_str(json.dumps(content))
        except BaseException as error:  # the library raises plain Exception, and its panics derive from BaseException
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise ConfigError(f"{self.path}: not a readable tokenizer.json ({error})") from error

    @cached_property
    def _parsing_backend(self) -> Backend:
        """A second instance that parses special tokens: switching one between threads would not be safe."""
        backend = self._load(exact_spellings=True)
        _declare_special(backend, self._special_names)
        return backend

    def _check_ids(self) -> dict[int, str]:
        """Return tokens by ID. Raises ConfigError unless every token has the ID that its file declares and shares it
        with no other."""
        if not self._vocabulary:
            raise ConfigError(f"{self.path}: has no tokens")
        vocabulary = self._content["model"]["vocab"]
        if isinstance(vocabulary, list):
            vocabulary = {name: token_id for token_id, (name, _) in enumerate(vocabulary)}
        # First, because the library numbers added tokens by the size of a vocabulary.
        self._names_of({**vocabulary, **{token["content"]: token["id"] for token in self._declared_tokens}})
        for token in self._declared_tokens:
            found = self._vocabulary.get(token["content"])
            if found != token["id"]:
                raise ConfigError(
                    f"{self.path}: added token '{token['content']}' has ID {token['id']}, but the tokenizers "
                    f"library reads it as {found}; IDs of added tokens must continue those of the vocabulary"
                )
        return self._names_of(self._vocabulary)

    def _names_of(self, vocabulary: Mapping[str, int]) -> dict[int, str]:
        """Return tokens by ID. Raises ConfigError for an ID that is too large or has two tokens."""
        names: dict[int, str] = {}
        for name, token_id in vocabulary.items():
            if token_id > MAX_TOKEN_ID:
                raise ConfigError(f"{self.path}: token '{name}' has ID {token_id}, above {MAX_TOKEN_ID}")
            if token_id in names:
                raise ConfigError(f"{self.path}: tokens '{names[token_id]}' and '{name}' share ID {token_id}")
            names[token_id] = name
        return names

    def _find(self, role: Role, side_files: SideFiles, override: str | None) -> tuple[str, int]:
        """Return name and ID of BOS or EOS: as given, declared by name, declared by ID, of a usual name, or for BOS,
        EOS. GPT-2 style vocabularies use one token for both."""
        candidates = [override] if override is not None else side_files.names(role)[:1]
        for name in candidates:
            if name not in self._vocabulary:
                if override is not None:
                    raise ConfigError(f"'{name}' is not a token of {self.path}", role)
                raise ConfigError(
                    f"must be given, because the files beside {self.path} declare '{name}', which is not a token of it",
                    role,
                )
        ids = side_files.ids("bos_token_id" if role == "bos_token" else "eos_token_id")
        candidates += [self._names[token] for token in ids if token in self._names]
        candidates += [name for name in _USUAL_NAMES[role] if name in self._vocabulary]
        if candidates:
            return candidates[0], self._vocabulary[candidates[0]]
        if role == "bos_token":
            return self.eos_token, self.eos_id
        raise ConfigError(
            f"must be given, because no end-of-sequence token is declared beside {self.path} (eos_token in "
            "tokenizer_config.json, eos_token_id in generation_config.json or config.json) and its vocabulary has none "
            f"of {', '.join(_USUAL_NAMES[role])}",
            role,
        )

    def _find_unknown(self) -> int | None:
        model = self._content["model"]
        unknown = model.get("unk_id")
        if isinstance(unknown, int):
            return unknown
        name = model.get("unk_token")
        return self._vocabulary.get(name) if isinstance(name, str) else None

    def _find_byte_ids(self) -> dict[int, int]:
        """Return the tokens of single bytes, in vocabularies with byte fallback and byte-level ones."""
        if "<0x80>" in self._vocabulary:
            names = {byte: f"<0x{byte:02X}>" for byte in range(256)}
        elif '"ByteLevel"' in json.dumps([self._content.get("decoder"), self._content.get("pre_tokenizer")]):
            names = {byte: byte_character(byte) for byte in range(256)}
        else:
            names = {}
        return {byte: self._vocabulary[name] for byte, name in names.items() if name in self._vocabulary}

    # --- text

    def _spell(self, token: int) -> list[int]:
        """Return the spelling of a special token in ordinary tokens: characters, else bytes, else unknown tokens."""
        name = self._names[token]
        ids: list[int] = []
        for character in name:
            own = self._vocabulary.get(character)
            bytes_of = [self._byte_ids.get(byte) for byte in character.encode()]
            if own is not None and own not in self._reserved_ids:
                ids.append(own)
            elif None not in bytes_of:
                ids += [byte for byte in bytes_of if byte is not None]
            elif self._unknown_id is not None:
                ids.append(self._unknown_id)
            else:
                raise ConfigError(f"{self.path}: has no ordinary tokens for the text '{name}'")
        return ids


def _add_missing_tokens(content: dict[str, Any], side_files: SideFiles) -> list[dict[str, Any]]:
    """Add tokens that only ``tokenizer_config.json`` lists to ``content``. Return all added tokens."""
    listed, vocabulary = content.get("added_tokens") or [], content["model"]["vocab"]
    known = {token["content"] for token in listed}
    known |= {name for name, _ in vocabulary} if isinstance(vocabulary, list) else set(vocabulary)
    missing = [token for token in side_files.added_tokens() if token["content"] not in known]
    if missing:
        content["added_tokens"] = sorted([*listed, *missing], key=lambda token: token["id"])
    return [*listed, *missing]


def _declare_special(backend: Backend, names: Iterable[str]) -> None:
    """Mark tokens of the vocabulary as special."""
    from tokenizers import AddedToken

    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in sorted(names)])


def _replace_wrong_bytes(tokens: list[str]) -> Iterator[str]:
    """Replace bytes that are not UTF-8 with U+FFFD and keep the others as byte tokens."""
    run: list[str] = []
    for token in [*tokens, ""]:
        if _BYTE_TOKEN.fullmatch(token):
            run.append(token)
            continue
        for character in bytes(int(byte[3:5], 16) for byte in run).decode("utf-8", errors="replace"):
            yield from [character] if character == REPLACEMENT else [f"<0x{byte:02X}>" for byte in character.encode()]
        run = []
        if token:
            yield token
