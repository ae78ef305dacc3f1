"""Packing of documents into training rows of ``sequence_length`` (L) predictions.

A row holds

* ``tokens`` int32 [L + 1]: inputs are ``tokens[:-1]``, targets ``tokens[1:]``; padded with id 0;
* ``target_kind`` uint8 [L]: a :class:`TargetKind` per target;
* ``positions`` int32 [L]: the position of each input in its document, -1 on padding.

A document is split into segments of at most L + 1 tokens, and consecutive segments share a token. A segment of L + 1
tokens fills a row; the last, shorter segment is packed into one row with those of other documents of the same kind and
shard, unless packing is off. In a packed row each segment counts as a document that starts at position 0.

Every token but the first of each document is thus predicted exactly once. The last input of a packed segment, which is
followed by the first token of another document, has no target. For L = 4 and two documents, a to f and x to z::

    segments: a b c d e | e f | x y z
    row 0:    tokens a b c d e, positions 0 1 2 3
    row 1:    tokens e f x y z, positions 0 1 0 1    (input f has no target)
"""

from __future__ import annotations

import bisect
from enum import IntEnum

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike

from pipelines.data.manifest import KINDS

Row = dict[str, np.ndarray]

MIN_SEGMENT = 2
"""Tokens of the shortest segment that has anything to predict."""


class TargetKind(IntEnum):
    """Kind of a target token, for weighting losses and counting metrics."""

    PADDING = 0
    TEXT = 1
    ANSWER = 2
    CONTEXT = 3
    """A token of a retrieval document outside its answers."""


def count_rows(lengths: ArrayLike, sequence_length: int, packing: bool = True) -> int:
    """Return the number of training rows of documents with ``lengths`` tokens [N], of one kind and in one shard."""
    _, _, sizes = _split_documents(np.asarray(lengths, dtype=np.int64), sequence_length)
    rows = _assign_rows(sizes, np.zeros(len(sizes), dtype=np.int64), sequence_length + 1, packing)
    return len(np.unique(rows))


def cut_rows(documents: pa.Table, sequence_length: int, packing: bool = True) -> Row:
    """Cut a shard's documents into rows, ordered by the first document of each row.

    Retrieval documents longer than a row are dropped: cutting them would separate answers from their facts.

    Returns:
        {"tokens": int32 [R, L + 1], "target_kind": uint8 [R, L], "positions": int32 [R, L]}
    """
    fits = pc.less_equal(pc.list_value_length(documents["tokens"]), sequence_length + 1)
    documents = documents.filter(pc.or_(pc.equal(documents["kind"], "text"), fits))
    tokens, lengths = _flatten(documents["tokens"])
    starts = np.cumsum(lengths) - lengths
    kind = pc.index_in(documents["kind"], pa.array(KINDS)).to_numpy()
    is_text = kind == KINDS.index("text")
    target_kinds = np.repeat(np.where(is_text, TargetKind.TEXT, TargetKind.CONTEXT).astype(np.uint8), lengths)
    answer_starts, answer_counts = _flatten(documents["answer_starts"])
    answer_ends, _ = _flatten(documents["answer_ends"])
    if len(answer_starts):
        document_starts = np.repeat(starts, answer_counts)
        edges = np.zeros(len(tokens) + 1, dtype=np.int64)
        np.add.at(edges, answer_starts + document_starts, 1)
        np.add.at(edges, answer_ends + document_starts, -1)
        target_kinds[np.cumsum(edges[:-1]) > 0] = TargetKind.ANSWER

    document, offset, sizes = _split_documents(lengths, sequence_length)
    _, first, row = np.unique(
        _assign_rows(sizes, kind[document], sequence_length + 1, packing), return_index=True, return_inverse=True
    )
    row = np.argsort(np.argsort(first))[row]
    # Rows are filled from the left, so the tokens of all segments, sorted by row, fill the used places in order.
    filled = np.bincount(row, weights=sizes, minlength=len(first))
    used = np.arange(sequence_length + 1) < filled[:, None]
    order = np.argsort(row, kind="stable")
    sizes, segment_starts = sizes[order], (starts[document] + offset)[order]
    position = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within the segment
    source = np.repeat(segment_starts, sizes) + position
    row_tokens = np.zeros(used.shape, dtype=np.int32)
    row_kinds = np.full(used.shape, TargetKind.PADDING, dtype=np.uint8)
    positions = np.full(used.shape, -1, dtype=np.int32)
    row_tokens[used] = tokens[source]
    row_kinds[used] = np.where(position == 0, np.uint8(TargetKind.PADDING), target_kinds[source])
    positions[used] = position
    return {"tokens": row_tokens, "target_kind": row_kinds[:, 1:], "positions": positions[:, :-1]}


def _split_documents(lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split documents of ``lengths`` tokens int64 [N] into segments of at most L + 1 tokens.

    A document of one token has nothing to predict and no segment.

    Returns:
        Document, offset in it, and size of every segment, int64 [P] each.
    """
    per_document = -(-np.maximum(lengths - 1, 0) // sequence_length)
    document = np.repeat(np.arange(len(lengths)), per_document)
    first = np.cumsum(per_document) - per_document
    offset = (np.arange(len(document)) - first[document]) * sequence_length
    return document, offset, np.minimum(lengths[document] - offset, sequence_length + 1)


def _assign_rows(sizes: np.ndarray, kinds: np.ndarray, capacity: int, packing: bool) -> np.ndarray:
    """Return the row of every segment, identified by the row's largest segment: int64 [P].

    Best fit decreasing: segments, in order of decreasing size, go into the row of their kind with the least sufficient
    room. Rows hold ``capacity`` tokens. A row holds one kind only, so that reading a single kind gives equal rows.
    """
    rows = np.arange(len(sizes))
    if not packing:
        return rows
    for kind in np.unique(kinds):
        small = np.flatnonzero((kinds == kind) & (sizes <= capacity - MIN_SEGMENT))
        room_left: list[tuple[int, int]] = []  # (tokens, row) in ascending order
        for segment in small[np.argsort(-sizes[small], kind="stable")].tolist():
            size = int(sizes[segment])
            best = bisect.bisect_left(room_left, (size, 0))
            room, row = room_left.pop(best) if best < len(room_left) else (capacity, segment)
            rows[segment] = row
            if room - size >= MIN_SEGMENT:
                bisect.insort(room_left, (room - size, row))
    return rows


def _flatten(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Return the flat values of a list column and the length of each list (int64)."""
    values = pc.list_flatten(column).to_numpy()
    return values, pc.list_value_length(column).to_numpy().astype(np.int64)
