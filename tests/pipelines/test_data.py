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
from pipelines import prepare
from pipelines.config import recipe_from_dict
from pipelines.data import (
    MIN_TARGETS,
    SHARD_SCHEMA,
    TargetKind,
    batches,
    count_rows,
    cut_rows,
    local_rows,
    read_manifest,
    train_batches,
    train_dataset,
)

LENGTH = 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A prepared corpus of several train shards; read only."""
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
    return [row["tokens"].tobytes() + row["target_kind"].tobytes() for row in rows]


def rows_of(batch: dict[str, torch.Tensor]) -> list[bytes]:
    return [
        tokens.astype(np.int32).tobytes() + kinds.tobytes()
        for tokens, kinds in zip(batch["tokens"].numpy(), batch["target_kind"].numpy())
    ]


def first_shard(folder: Path) -> Path:
    return folder / "train/00000.parquet"


# --- rows


def table(documents: list[tuple[str, list[int], list[tuple[int, int]]]]) -> pa.Table:
    """Documents of (kind, tokens, answer spans), in two chunks with an offset, as a reader may meet them."""
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


def plain_rows(documents, length):
    """The slow twin of cut_rows: token by token."""
    for kind, tokens, spans in documents:
        for start in range(0, max(len(tokens) - 1, 0), length):
            row, kinds = [0] * (length + 1), [0] * length
            piece = tokens[start : start + length + 1]
            row[: len(piece)] = piece
            for i in range(len(piece) - 1):
                answer = any(begin <= start + i + 1 < end for begin, end in spans)
                kinds[i] = 1 if kind == "text" else 2 if answer else 3
            if len(piece) - 1 >= MIN_TARGETS:
                yield row, kinds


@st.composite
def document(draw):
    tokens = draw(st.lists(st.integers(1, 1000), max_size=70))
    if draw(st.booleans()) or len(tokens) < 4:
        return "text", tokens, []
    edges = draw(st.lists(st.integers(1, len(tokens)), max_size=6, unique=True).map(sorted))
    return draw(st.sampled_from(["mqar", "needle"])), tokens, list(zip(edges[::2], edges[1::2]))


@settings(max_examples=150, deadline=None)
@given(st.lists(document(), max_size=8), st.integers(8, 40))
def test_rows_are_those_of_the_slow_twin(documents, length):
    rows = cut_rows(table(documents), length)
    expected = list(plain_rows(documents, length))
    assert rows["tokens"].dtype == np.int32 and rows["target_kind"].dtype == np.uint8
    assert rows["tokens"].shape == (len(expected), length + 1)
    assert rows["tokens"].tolist() == [row for row, _ in expected]
    assert rows["target_kind"].tolist() == [kinds for _, kinds in expected]
    assert count_rows([len(tokens) for _, tokens, _ in documents], length).sum() == len(expected)


def test_every_token_but_the_first_is_predicted_once_and_rows_stay_in_their_document():
    documents = [("text", list(range(1000 * i, 1000 * i + size)), []) for i, size in enumerate((33, 17, 100, 41, 9), 1)]
    rows = cut_rows(table(documents), 16)
    predicted = rows["tokens"][:, 1:][rows["target_kind"] == TargetKind.TEXT]
    expected = [token for _, tokens, _ in documents for token in tokens[1:]]
    dropped = documents[2][1][-3:]  # 100 = 1 + 6 * 16 + 3: too few targets for a row
    assert sorted(predicted.tolist()) == sorted(set(expected) - set(dropped))
    for tokens, kinds in zip(rows["tokens"], rows["target_kind"]):
        real = tokens[: int((kinds > 0).sum()) + 1]
        assert len(set(real // 1000)) == 1 and (np.diff(real) == 1).all()
        assert not tokens[len(real) :].any() and not kinds[len(real) - 1 :].any()


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


def test_another_length_still_predicts_each_token_once(folder):
    long, short = (
        Counter(int(kind) for row in local_rows(folder, "validation", length) for kind in row["target_kind"] if kind)
        for length in (LENGTH, 37)
    )
    assert long[TargetKind.ANSWER] > 0
    rows = sum(read_manifest(folder).splits["validation"].rows.values())
    assert all(abs(long[kind] - short[kind]) < MIN_TARGETS * rows for kind in TargetKind)


# --- batches


def test_batches_stack_rows(folder):
    rows = list(local_rows(folder, "validation", LENGTH, limit=10))
    made = list(batches(rows, 4))
    assert [len(batch["tokens"]) for batch in made] == [4, 4, 2]
    assert made[0]["tokens"].dtype == torch.int64 and made[0]["target_kind"].dtype == torch.uint8
    assert made[0]["tokens"].shape == (4, LENGTH + 1) and made[0]["target_kind"].shape == (4, LENGTH)
    assert [row for batch in made for row in rows_of(batch)] == as_bytes(rows)
    assert len(list(batches(rows, 4, drop_last=True))) == 2


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
    """Stopping after any of ``stops`` steps and going on from the stored position changes nothing."""
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
    assert found != expected  # the shards' order is drawn from the seed
    size = count_rows(pq.read_table(first_shard(folder))["tokens"].combine_chunks().value_lengths(), LENGTH).sum()
    start = found.index(expected[0])
    assert found[start : start + size] == expected[:size]


def split_rows(columns: dict[str, np.ndarray]) -> list[bytes]:
    assert columns["tokens"].dtype == np.int32 and columns["target_kind"].dtype == np.uint8
    return as_bytes({"tokens": t, "target_kind": k} for t, k in zip(columns["tokens"], columns["target_kind"]))


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
    (folder / "manifest.json").write_text('{"format": 1,')
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
        (_cut_short, "damaged token shard .* bytes where the manifest says"),
        (_remove, "No such file"),
        (_break_json, "damaged manifest"),
        (_change_manifest(format=99), "has format 99, this version reads format 1"),
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
    read_manifest(copy)  # the size is right
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
