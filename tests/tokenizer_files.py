"""Small ``tokenizer.json`` files for tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from model.tokenizer.byte import byte_character


def added_token(name: str, token_id: int, special: bool = True) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": name, "special": special, **flags}


def byte_level(
    merges: Iterable[tuple[str, str]] = (), names: tuple[str, str] = ("<s>", "</s>"), added: Iterable[str] = ()
) -> dict[str, Any]:
    """Return a byte-level vocabulary: BOS 0, EOS 1, byte b is b + 2, then merges of ASCII letters, then ``added``
    special tokens."""
    vocabulary = {name: i for i, name in enumerate(names)} | {byte_character(byte): byte + 2 for byte in range(256)}
    pairs = list(merges)
    vocabulary |= {left + right: len(vocabulary) + i for i, (left, right) in enumerate(pairs)}
    content = json.loads(Backend(models.BPE(vocab=vocabulary, merges=pairs)).to_str())
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    tokens = [*names, *added]
    ids = [*range(len(names)), *range(len(vocabulary), len(vocabulary) + len(tokens))]
    listed = [added_token(name, i) for name, i in zip(tokens, ids)]
    return {**content, "pre_tokenizer": level, "decoder": level, "added_tokens": listed}


def unigram(characters: str, unknown: bool = True) -> dict[str, Any]:
    """Return a SentencePiece-like vocabulary: unknown 0, BOS 1, EOS 2, "▁" marks spaces, one in front of all text."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((c, -3.0) for c in characters)]
    backend = Backend(models.Unigram(pieces, unk_id=0) if unknown else models.Unigram(pieces[1:]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["<unk>", "<s>", "</s>"] if unknown else ["<s>", "</s>"])
    return json.loads(backend.to_str())


def byte_fallback(characters: str) -> dict[str, Any]:
    """Return a vocabulary like Llama's: "▁" marks spaces, decoding strips the first one, unknown characters become
    bytes (token b + 2)."""
    pieces = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *characters]
    backend = Backend(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return json.loads(backend.to_str())


def letters() -> dict[str, Any]:
    """Return a byte-level vocabulary of few bytes: BOS 0, EOS 1, lower-case letters, space, and pairs of letters."""
    pieces = ["<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz", "Ġ", "th", "he", "in", "er", "an", "re", "on", "at", "en"]
    merges = [tuple(piece) for piece in pieces[29:]]
    backend = Backend(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    return json.loads(backend.to_str())


def write_files(folder: Path, content: object, **side_files: object) -> Path:
    """Write ``tokenizer.json`` and JSON files beside it, named without suffix; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in {"tokenizer": content, **side_files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder
