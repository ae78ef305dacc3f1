import json
import re
import shutil
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import DataError
from model.tokenizer import ByteTokenizer
from pipelines.data.batches import stack_rows, train_batches
from pipelines.data.local_reader import local_rows
from pipelines.data.manifest import file_sha256, read_manifest
from pipelines.data.packing import TargetKind, count_rows, cut_rows
from pipelines.data.ray_dataset import train_dataset
from pipelines.data.shards import SHARD_SCHEMA
from pipelines.recipe.loading import recipe_from_dict
from pipelines.steps import prepare

LENGTH = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A prepared corpus of several train shards. Read only."""
    root = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": f"record {i} holds this sentence. " * (5 + i % 60)}) for i in range(300)]
    (root / "in.jsonl").write_text("\n".join(lines))
    data = {
        "sources": [str(root / "in.jsonl")],
        "sequence_length": LENGTH,
        "pairs": 4,
        "validation_share": 0.2,
        "retrieval_validation_documents": 30,
        "shard_tokens": 100_000,
    }
    return prepare.run(recipe_from_dict({"run": {"folder": str(root)}, "data": data})).folder


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def as_bytes(rows) -> list[bytes]:
    return [row["tokens"].tobytes() + row["target_kind"].tobytes() + row["positions"].tobytes() for row in rows]


def rows_of(batch: dict[str, torch.Tensor]) -> list[bytes]:
    return as_bytes(
        {"tokens": tokens.astype(np.int32), "target_kind": kinds, "positions": positions.astype(np.int32)}
        for tokens, kinds, positions in zip(*(batch[name].numpy() for name in ("tokens", "target_kind", "positions")))
    )


def first_shard(folder: Path) -> Path:
    return folder / "train/00000.parquet"


# --- rows


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


def single(rows):
    return [{name: values[i] for name, values in rows.items()} for i in range(len(rows["tokens"]))]


@st.composite
def document(draw):
    tokens = draw(st.lists(st.integers(1, 1000), max_size=70))
    if draw(st.booleans()) or len(tokens) < 4:
        return "text", tokens, []
    edges = draw(st.lists(st.integers(1, len(tokens)), max_size=6, unique=True).map(sorted))
    return draw(st.sampled_from(["mqar", "needle"])), tokens, list(zip(edges[::2], edges[1::2]))


@settings(max_examples=150, deadline=None)
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


@settings(max_examples=300, deadline=None)
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


def test_local_rows_select_limit_and_shuffle(folder):
    manifest = read_manifest(folder)
    assert len(manifest.splits["train"].shards) > 2
    everything = as_bytes(local_rows(folder, "train", LENGTH))
    assert len(everything) == sum(manifest.splits["train"].rows.values())
    for kind, count in manifest.splits["train"].rows.items():
        assert sum(1 for _ in local_rows(folder, "train", LENGTH, kinds=[kind])) == count
    assert as_bytes(local_rows(folder, "train", LENGTH, limit=10)) == everything[:10]
    shuffled = as_bytes(local_rows(folder, "train", LENGTH, shuffle=True, seed=1))
    assert shuffled != everything and Counter(shuffled) == Counter(everything)
    assert as_bytes(local_rows(folder, "train", LENGTH, shuffle=True, seed=1)) == shuffled
    assert as_bytes(local_rows(folder, "train", LENGTH, shuffle=True, seed=2)) != shuffled
    with pytest.raises(DataError, match="kinds: 'poem' is not one of"):
        local_rows(folder, "train", LENGTH, kinds=["poem"])


# --- batches


def test_batches_stack_rows(folder):
    rows = list(local_rows(folder, "validation", LENGTH, limit=10))
    made = list(stack_rows(rows, 4))
    assert [len(batch["tokens"]) for batch in made] == [4, 4, 2]
    assert made[0]["tokens"].dtype == made[0]["positions"].dtype == torch.int64
    assert made[0]["target_kind"].dtype == torch.uint8
    assert made[0]["tokens"].shape == (4, LENGTH + 1)
    assert made[0]["target_kind"].shape == made[0]["positions"].shape == (4, LENGTH)
    assert [row for batch in made for row in rows_of(batch)] == as_bytes(rows)
    assert len(list(stack_rows(rows, 4, drop_last=True))) == 2


def test_an_epoch_holds_each_row_once_and_the_next_is_shuffled_anew(folder):
    everything = Counter(as_bytes(local_rows(folder, "train", LENGTH)))
    stream = train_batches(folder, LENGTH, 16, seed=3)
    epochs: dict[int, list[bytes]] = {}
    per_epoch = everything.total() // 16
    for _ in range(2 * per_epoch):
        batch = next(stream)
        epochs.setdefault(stream.epoch, []).extend(rows_of(batch))
    assert [len(rows) for rows in epochs.values()] == [16 * per_epoch] * 2
    for rows in epochs.values():
        assert not Counter(rows) - everything
    assert epochs[0] != epochs[1]
    assert rows_of(next(train_batches(folder, LENGTH, 16, seed=4))) != epochs[0][:16]


def resumes(open_stream, steps: int, stops: tuple[int, ...]) -> None:
    """Check that resuming from the stored position after any of ``stops`` steps changes nothing."""
    stream = open_stream(0, 0)
    expected, positions = [], [(0, 0)]
    for _ in range(steps):
        expected.append(rows_of(next(stream)))
        positions.append((stream.epoch, stream.batch))
    stream.close()
    assert positions[-1][0] >= 1, "the test must reach a second epoch"
    for step in stops:
        resumed = open_stream(*positions[step])
        assert rows_of(next(resumed)) == expected[step]
        resumed.close()


def test_a_stream_resumes_where_it_stopped(folder):
    per_epoch = sum(read_manifest(folder).splits["train"].rows.values()) // 16
    resumes(
        lambda epoch, skip: train_batches(folder, LENGTH, 16, epoch=epoch, skip=skip), per_epoch + 5, (1, per_epoch + 3)
    )
    counted = train_batches(folder, LENGTH, 16, skip=per_epoch + 3)
    direct = train_batches(folder, LENGTH, 16, epoch=1, skip=3)
    assert rows_of(next(counted)) == rows_of(next(direct))


def test_a_batch_larger_than_the_epoch_is_refused(folder):
    with pytest.raises(DataError, match=r"fewer rows than train\.batch_rows"):
        next(train_batches(folder, LENGTH, 1_000_000))


# --- Ray


def test_ray_reads_the_same_rows_shard_by_shard(folder, ray_cluster):
    columns = train_dataset(folder, LENGTH, seed=1).iter_batches(batch_size=None, batch_format="numpy")
    found = [row for batch in columns for row in split_rows(batch)]
    expected = as_bytes(local_rows(folder, "train", LENGTH))
    assert Counter(found) == Counter(expected)
    assert found != expected  # the seed shuffles the shards
    size = len(cut_rows(pq.read_table(first_shard(folder)), LENGTH)["tokens"])
    start = found.index(expected[0])
    assert found[start : start + size] == expected[:size]


def split_rows(columns: dict[str, np.ndarray]) -> list[bytes]:
    assert columns["tokens"].dtype == columns["positions"].dtype == np.int32
    assert columns["target_kind"].dtype == np.uint8
    return as_bytes(single(columns))


def test_a_worker_s_stream_resumes_where_it_stopped(folder, ray_cluster):
    per_epoch = sum(read_manifest(folder).splits["train"].rows.values()) // 64
    shard = train_dataset(folder, LENGTH).streaming_split(1, equal=True)[0]

    def open_stream(epoch: int, skip: int):
        return train_batches(shard, LENGTH, 64, seed=7, epoch=epoch, skip=skip)

    resumes(open_stream, per_epoch + 3, (per_epoch + 1,))


def test_two_workers_share_an_epoch(folder, ray_cluster):
    everything = Counter(as_bytes(local_rows(folder, "train", LENGTH)))
    per_worker = everything.total() // 2 // 8
    rows: list[list[bytes]] = [[], []]

    def work(rank: int, shard) -> None:
        stream = train_batches(shard, LENGTH, 8)
        for _ in range(per_worker):
            rows[rank] += rows_of(next(stream))
        assert stream.epoch == 0
        stream.close()

    shards = train_dataset(folder, LENGTH).streaming_split(2, equal=True)
    threads = [threading.Thread(target=work, args=item) for item in enumerate(shards)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert len(rows[0]) == len(rows[1]) == per_worker * 8
    assert not Counter(rows[0] + rows[1]) - everything


# --- damage


def _cut_short(folder: Path) -> Path:
    shard = first_shard(folder)
    shard.write_bytes(shard.read_bytes()[:-100])
    return shard


def _remove(folder: Path) -> Path:
    first_shard(folder).unlink()
    return first_shard(folder)


def _break_json(folder: Path) -> Path:
    (folder / "manifest.json").write_text('{"format": 2,')
    return folder / "manifest.json"


def _change_manifest(**changes: object):
    def change(folder: Path) -> Path:
        path = folder / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return path

    return change


def _no_manifest(folder: Path) -> Path:
    (folder / "manifest.json").unlink()
    return folder / "manifest.json"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_cut_short, "damaged token shard .* bytes, the manifest says"),
        (_remove, "No such file"),
        (_break_json, "damaged manifest"),
        (_change_manifest(format=99), "has format 99, this version reads format 2"),
        (_change_manifest(vocab_size="many"), "damaged manifest .vocab_size: "),
        (_change_manifest(splits={}), "no 'train' split"),
        (_no_manifest, "No such file or directory; run the prepare step first"),
    ],
)
def test_damage_is_named_by_every_reader(copy, damage, named):
    path = damage(copy)
    for read in (
        lambda: read_manifest(copy),
        lambda: local_rows(copy, "train", LENGTH),
        lambda: next(train_batches(copy, LENGTH, 4)),
        lambda: train_dataset(copy, LENGTH),
    ):
        with pytest.raises(DataError, match=named) as caught:
            read()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_flipped_bit_is_named(copy):
    path = first_shard(copy)
    metadata = pq.read_metadata(path).row_group(0)
    tokens = next(metadata.column(i) for i in range(7) if metadata.column(i).path_in_schema.startswith("tokens"))
    content = bytearray(path.read_bytes())
    content[tokens.data_page_offset + tokens.total_compressed_size // 2] ^= 0x10
    path.write_bytes(content)
    read_manifest(copy)  # the size is unchanged
    for read in (
        lambda: read_manifest(copy, verify=True),
        lambda: train_dataset(copy, LENGTH),
        lambda: list(local_rows(copy, "train", LENGTH)),
        lambda: list(local_rows(copy, "train", LENGTH, shuffle=True)),
    ):
        with pytest.raises(DataError, match="damaged token shard") as caught:
            read()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_shard_that_is_no_parquet_is_named(copy):
    path = first_shard(copy)
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(DataError, match="damaged token shard") as caught:
        list(local_rows(copy, "train", LENGTH))
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tokens", "type", "named"),
    [
        ([1, 2, None], pa.int32(), "damaged token shard .token ids outside 0 to"),
        ([1, 2, -1], pa.int32(), "damaged token shard .token ids outside 0 to"),
        ([1, 2, 10**6], pa.int32(), "damaged token shard .token ids outside 0 to"),
        ([1, 2, float("nan")], pa.float64(), "not a token shard .column 'tokens' is not of type list"),
    ],
)
def test_a_shard_of_other_things_than_tokens_is_named(copy, tokens, type, named):
    """Also with a consistent manifest, as custom-made shards may have."""
    path = first_shard(copy)
    documents = pq.read_table(path)
    column = pa.array([tokens, *documents["tokens"].to_pylist()[1:]], pa.list_(type))
    at = documents.schema.get_field_index("tokens")
    pq.write_table(documents.set_column(at, "tokens", column), path)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["splits"]["train"]["shards"][0] |= {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=named) as caught:
        list(local_rows(copy, "train", LENGTH))
    assert str(path) in str(caught.value)
