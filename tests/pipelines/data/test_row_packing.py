"""Packing of documents into rows, against a slow reference."""

import re
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shard_helpers import LENGTH, as_bytes, single

from model.tokenizer import ByteTokenizer
from pipelines.data.local_reader import local_rows
from pipelines.data.manifest import read_manifest
from pipelines.data.packing import TargetKind, count_rows, cut_rows
from pipelines.data.shards import SHARD_SCHEMA


def table(documents: list[tuple[str, list[int], list[tuple[int, int]]]]) -> pa.Table:
    """Documents of (kind, tokens, answer spans) as a table of two chunks with an offset."""
    rows = [
        {
            "document_id": str(i),
            "piece": 0,
            "source": "",
            "kind": kind,
            "tokens": tokens,
            "answer_starts": [start for start, _ in spans],
            "answer_ends": [end for _, end in spans],
        }
        for i, (kind, tokens, spans) in enumerate([("mqar", [9] * 20, [(3, 5)]), *documents])
    ]
    whole = pa.Table.from_pylist(rows, schema=SHARD_SCHEMA)
    return pa.concat_tables([whole.slice(1, len(documents) // 2), whole.slice(1 + len(documents) // 2)])


def fitting(documents, length):
    """Drop retrieval documents that would be cut."""
    return [item for item in documents if item[0] == "text" or len(item[1]) <= length + 1]


def plain_pieces(documents, length):
    """Reference splitting, token by token: segments of (kind, tokens, kind of every token)."""
    for kind, tokens, spans in fitting(documents, length):
        answer = [any(begin <= i < end for begin, end in spans) for i in range(len(tokens))]
        kinds = [TargetKind.TEXT if kind == "text" else 2 if a else 3 for a in answer]
        for start in range(0, max(len(tokens) - 1, 0), length):
            yield kind, tuple(tokens[start : start + length + 1]), tuple(kinds[start + 1 : start + length + 1])


def plain_rows(documents, length):
    """Reference rows without packing: one segment and padding."""
    for _, tokens, kinds in plain_pieces(documents, length):
        pad = length + 1 - len(tokens)
        positions = [*range(len(tokens)), *[-1] * pad][:length]
        yield [*tokens, *[0] * pad], [*kinds, *[0] * pad], positions


def segments(row):
    """Return the segments of a row, as (tokens, kinds of their targets), from its positions alone."""
    tokens, kinds, positions = (row[name].tolist() for name in ("tokens", "target_kind", "positions"))
    starts = [i for i, position in enumerate(positions) if position == 0]
    used = positions.index(-1) if -1 in positions else len(positions)
    assert starts[0] == 0 and positions[used:] == [-1] * (len(positions) - used)
    for start, end in zip(starts, [*starts[1:], used]):
        assert positions[start:end] == list(range(end - start))
        if end == len(positions) and kinds[-1]:  # a segment that reaches the row's end predicts its last token
            yield tuple(tokens[start:]), tuple(kinds[start:])
        else:
            assert kinds[end - 1] == TargetKind.PADDING  # followed by another document or padding
            yield tuple(tokens[start:end]), tuple(kinds[start : end - 1])
    assert not any(kinds[used:]) and not any(tokens[used + 1 :])


@st.composite
def document(draw):
    tokens = draw(st.lists(st.integers(1, 1000), max_size=70))
    if draw(st.booleans()) or len(tokens) < 4:
        return "text", tokens, []
    edges = draw(st.lists(st.integers(1, len(tokens)), max_size=6, unique=True).map(sorted))
    return draw(st.sampled_from(["mqar", "needle"])), tokens, list(zip(edges[::2], edges[1::2]))


@settings(max_examples=150)
@given(st.lists(document(), max_size=8), st.integers(8, 40))
def test_rows_without_packing_equal_the_reference(documents, length):
    rows = cut_rows(table(documents), length, packing=False)
    expected = list(plain_rows(documents, length))
    assert [rows[name].dtype for name in ("tokens", "target_kind", "positions")] == [np.int32, np.uint8, np.int32]
    assert rows["tokens"].shape == (len(expected), length + 1)
    for name, column in zip(("tokens", "target_kind", "positions"), zip(*expected)):
        assert rows[name].tolist() == list(column), name
    lengths = [len(tokens) for _, tokens, _ in fitting(documents, length)]
    assert count_rows(lengths, length, packing=False) == len(expected)


@settings(max_examples=300)
@given(st.lists(document(), max_size=24), st.integers(8, 40))
def test_packed_rows_hold_every_segment_once_and_no_two_rows_fit_into_one(documents, length):
    pieces = list(plain_pieces(documents, length))
    rows = single(cut_rows(table(documents), length))
    found = [list(segments(row)) for row in rows]
    assert Counter(segment for row in found for segment in row) == Counter((t, k) for _, t, k in pieces)
    group = {0: "text", 1: "retrieval"}
    for row in found:
        assert len({group[TargetKind.TEXT not in kinds] for _, kinds in row}) == 1  # one kind per row
    for kind in ("text", "mqar", "needle"):
        of_kind = [item for item in fitting(documents, length) if item[0] == kind]
        alone = single(cut_rows(table(of_kind), length))
        assert len(alone) == count_rows([len(tokens) for _, tokens, _ in of_kind], length)
        assert not Counter(as_bytes(alone)) - Counter(as_bytes(rows))  # equal rows among the others
        sizes = sorted(sum(len(tokens) for tokens, _ in segments(row)) for row in alone)
        assert len(sizes) < 2 or sizes[0] + sizes[1] > length + 1


def test_segments_go_where_they_leave_the_least_room():
    sizes = (3, 6, 7, 5, 5)
    documents = [("text", list(range(100 * i, 100 * i + size)), []) for i, size in enumerate(sizes, 1)]
    rows = cut_rows(table(documents), 9)
    assert rows["tokens"].tolist() == [
        [*range(100, 103), *range(300, 307)],  # ordered by first document
        [*range(200, 206), 0, 0, 0, 0],
        [*range(400, 405), *range(500, 505)],
    ]
    assert rows["positions"].tolist() == [
        [0, 1, 2, 0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5, -1, -1, -1],
        [0, 1, 2, 3, 4, 0, 1, 2, 3],
    ]
    text, none = TargetKind.TEXT, TargetKind.PADDING
    assert rows["target_kind"].tolist() == [
        [text] * 2 + [none] + [text] * 6,
        [text] * 5 + [none] * 4,
        [text] * 4 + [none] + [text] * 4,
    ]


def test_the_end_of_a_long_document_is_packed_and_its_full_rows_stand_alone():
    rows = cut_rows(table([("text", list(range(1, 42)), []), ("text", list(range(100, 105)), [])]), 16)
    assert rows["tokens"][:, 0].tolist() == [1, 17, 33]
    assert rows["tokens"][:2].tolist() == [list(range(1, 18)), list(range(17, 34))]
    assert rows["tokens"][2].tolist() == [*range(33, 42), *range(100, 105), 0, 0, 0]
    assert rows["positions"][2].tolist() == [*range(9), *range(5), -1, -1]


@pytest.mark.parametrize("length", [LENGTH, 37, 1000])
def test_what_fits_of_a_corpus_is_predicted_token_by_token_exactly_once(folder, length):
    for split in ("train", "validation"):
        documents = [
            (row["kind"], row["tokens"], list(zip(row["answer_starts"], row["answer_ends"])))
            for shard in read_manifest(folder).splits[split].shards
            for row in pq.read_table(folder / shard.file).to_pylist()
        ]
        expected = Counter((tokens, kinds) for _, tokens, kinds in plain_pieces(documents, length))
        rows = list(local_rows(folder, split, length))
        assert Counter(segment for row in rows for segment in segments(row)) == expected
        places = sum(len(row["target_kind"]) for row in rows)
        targets = sum(int((row["target_kind"] > 0).sum()) for row in rows)
        assert targets == sum(len(tokens) - 1 for _, tokens, _ in fitting(documents, length))
        assert targets / places > 0.9


def test_answer_targets_are_the_generator_s_answers(folder):
    tokenizer = ByteTokenizer()
    seen = 0
    for row in local_rows(folder, "validation", LENGTH, kinds=("mqar", "needle")):
        places = np.flatnonzero(row["target_kind"] == TargetKind.ANSWER)
        document = tokenizer.decode(row["tokens"].tolist())
        for place in places:
            fact = tokenizer.decode(row["tokens"][place - 1 : place + 2].tolist())
            assert re.fullmatch(r"@[A-Z][0-9]", fact)
            assert document.count(fact) == 2
        assert (row["target_kind"] == TargetKind.CONTEXT).sum() == LENGTH - 1 - len(places)
        seen += len(places)
    assert seen >= 30
