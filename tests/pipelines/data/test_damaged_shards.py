"""Damage to a data folder is named by every reader."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shard_helpers import LENGTH, first_shard

from model.errors import DataError
from pipelines.data.batches import train_batches
from pipelines.data.local_reader import local_rows
from pipelines.data.manifest import file_sha256, read_manifest
from pipelines.data.ray_dataset import train_dataset


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
        (_change_manifest(vocab_size=10**12), "damaged manifest .vocab_size: "),
        (_change_manifest(vocab_size=0), "damaged manifest .vocab_size: "),
        (_change_manifest(sequence_length=10**12), "damaged manifest .sequence_length: "),
        (_change_manifest(settings={"window": 16}), "damaged manifest .settings: .*tokenizer_sha256 is missing"),
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
        lambda: list(local_rows(copy, "train", LENGTH)),
        lambda: list(local_rows(copy, "train", LENGTH, seed=0)),
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
