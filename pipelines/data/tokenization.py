"""Text chunks to hashes and token arrays."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np

from model.tokenizer import ByteTokenizer, Tokenizer
from model.wording import count


def truncate(chunks: Iterator[str], max_bytes: int | None) -> Iterator[str]:
    """Yield the first ``max_bytes`` UTF-8 bytes of a text, cut between characters. None yields everything."""
    left = max_bytes
    for chunk in chunks:
        if left is not None:
            encoded = chunk.encode()
            chunk, left = encoded[:left].decode(errors="ignore"), max(0, left - len(encoded))
        if chunk:
            yield chunk
        if left == 0:
            return


class LostCharacters:
    """Characters of texts that a tokenizer does not have. Shards hold unknown tokens in their place, or nothing."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._seen: set[str] = set()
        self.found: set[str] = set()

    def watch(self, chunks: Iterable[str]) -> Iterator[str]:
        """Yield the chunks of a text and note characters that would be lost."""
        for chunk in chunks:
            if not isinstance(self._tokenizer, ByteTokenizer):
                new = set(chunk) - self._seen
                self._seen |= new
                self.found |= self._tokenizer.lost_characters("".join(new))
            yield chunk

    def report(self) -> None:
        """Print how many characters were lost, if any, and the first of them."""
        if self.found:
            first, number = " ".join(sorted(self.found)[:20]), count(len(self.found), "character")
            print(f"data.tokenizer: does not have {number} of the text, among them {first}")


def skip(chunks: Iterable[str], start: int) -> Iterator[str]:
    """Yield a text from the UTF-8 byte ``start`` on, which must be the first byte of a character."""
    for chunk in chunks:
        encoded = chunk.encode()
        if start < len(encoded):
            yield encoded[start:].decode()
        start = max(0, start - len(encoded))


def line_start(chunks: Iterable[str], limit: int) -> int:
    """Return the UTF-8 byte at which to cut a text in two, at or before ``limit``.

    That is the last start of a line, or of a character if the line starts before half of ``limit``.
    """
    offset = line = character = 0
    for chunk in chunks:
        before = chunk.encode()[: limit - offset]
        if b"\n" in before:
            line = offset + before.rindex(b"\n") + 1
        character = offset + len(before.decode(errors="ignore").encode())
        offset += len(before)
        if offset == limit:
            break
    return line if line > limit // 2 else character


def fingerprint(chunks: Iterable[str]) -> tuple[bytes, int]:
    """Return the SHA-256 and the length of a text's UTF-8 bytes."""
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        encoded = chunk.encode()
        digest.update(encoded)
        size += len(encoded)
    return digest.digest(), size


def encode(tokenizer: Tokenizer, text: str, first: bool = True) -> np.ndarray:
    """Encode the ``first`` or a later part of a document: int32 [tokens]. Byte tokens skip Python lists, which is ten
    times as fast."""
    if isinstance(tokenizer, ByteTokenizer):
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) + np.int32(tokenizer.encode("\0")[0])
    return np.array(tokenizer.encode(text) if first else tokenizer.encode_inside(text), dtype=np.int32)


def encode_pieces(tokenizer: Tokenizer, chunks: Iterable[str], piece_tokens: int) -> Iterator[np.ndarray]:
    """Encode a document as pieces of BOS and ``piece_tokens`` tokens; the last holds the remainder and EOS."""
    pending = np.empty(0, dtype=np.int32)
    for number, chunk in enumerate(chunks):
        pending = np.concatenate([pending, encode(tokenizer, chunk, first=number == 0)])
        while len(pending) > piece_tokens:
            yield np.concatenate([[tokenizer.bos_id], pending[:piece_tokens]], dtype=np.int32)
            pending = pending[piece_tokens:]
    yield np.concatenate([[tokenizer.bos_id], pending, [tokenizer.eos_id]], dtype=np.int32)
