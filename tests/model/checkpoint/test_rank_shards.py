"""Tensors whose rows are spread over one file per rank."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from model import checkpoint
from model.checkpoint.rank_shards import RankShard, ShardSet, read_shards
from model.config import ModelConfig
from model.distributed.dtensor import RowRange, range_of
from model.errors import CheckpointError
from model.transformer import Transformer

TENSORS = {
    "wide": torch.arange(35.0).view(7, 5),
    "flat": torch.arange(6).view(2, 3),
    "stack": torch.arange(12.0).view(1, 3, 4),
    "norm": torch.arange(4.0),
    "steps": torch.tensor(3),
}
SHARDED = ("wide", "flat", "stack")


def rows_of(rank, world):
    return {name: range_of(len(TENSORS[name]), rank, world) for name in SHARDED}


def local(ranges):
    return {name: t[slice(*ranges[name][:2])] if name in ranges else t for name, t in TENSORS.items()}


def write_shards(path, world):
    shards = ShardSet(world, "a")
    for rank in range(world):
        ranges = rows_of(rank, world)
        RankShard(rank, shards).write(path, local(ranges), ranges.get)
    return shards


@pytest.mark.parametrize("writers", [1, 2, 3, 8])
@pytest.mark.parametrize("readers", [1, 2, 3, 8])
def test_any_number_of_ranks_can_read(tmp_path, writers, readers):
    shards = write_shards(tmp_path / "model.safetensors", writers)
    files = {f"model-rank-{n:05d}-of-{writers:05d}.safetensors" for n in range(1, writers + 1)}
    assert {file.name for file in tmp_path.iterdir()} == files
    for rank in range(readers):
        ranges = rows_of(rank, readers)
        found = read_shards(tmp_path / "model.safetensors", shards, ranges.get)
        assert set(found) == set(TENSORS)
        for name, expected in local(ranges).items():
            assert torch.equal(found[name], expected) and found[name].dtype == expected.dtype, name


def test_row_ranges_of_an_unsharded_file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    found = read_shards(tmp_path / "model.safetensors", None, {"wide": RowRange(2, 4, 7)}.get)
    assert torch.equal(found["wide"], TENSORS["wide"][2:4]) and torch.equal(found["norm"], TENSORS["norm"])
    with pytest.raises(CheckpointError, match=r"'wide' has 7 rows, expected 9"):
        read_shards(tmp_path / "model.safetensors", None, {"wide": RowRange(2, 4, 9)}.get)


def test_a_checkpoint_with_the_earlier_file_names_is_read(tmp_path):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(hidden_size=32, head_dim=16, rope_head_dim=8, expert_size=16))
    state = model.state_dict()
    sharded = {name: len(tensor) for name, tensor in state.items() if tensor.dim() > 1}
    shards = ShardSet(2, "a", legacy=True)
    for rank in range(2):
        ranges = {name: range_of(rows, rank, 2) for name, rows in sharded.items()}
        tensors = {name: t[slice(*ranges[name][:2])].clone() if name in ranges else t for name, t in state.items()}
        RankShard(rank, shards).write(tmp_path / "model.safetensors", tensors, ranges.get)
    content = {"format_version": 1, "model": model.config.to_dict(), "parts": {"count": 2, "writing": "a"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    files = [tmp_path / f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert checkpoint.weight_files(tmp_path) == files and all(file.is_file() for file in files)
    loaded = checkpoint.load(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


MALFORMED_SHARDS = [
    *("2", 3, [], {"count": 2}, {"count": "many", "save_id": "a"}, {"count": True, "save_id": "a"}),
    *({"count": "2", "save_id": "a"}, {"count": 2.5, "save_id": "a"}, {"count": 2, "save_id": 5}),
]


@pytest.mark.parametrize("shards", MALFORMED_SHARDS)
def test_a_malformed_list_of_shards_is_refused(tmp_path, shards):
    content = {"format_version": 1, "model": ModelConfig().to_dict(), "shards": shards}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="'shards' is not an object of 'count' and 'save_id'"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([3, 7, 7], "tensor 'wide': some of its 7 rows are missing or stored twice"),
        ([5, 7, 7], "tensor 'wide': some of its 7 rows are missing or stored twice"),
        ([4, 6, 6], "tensor 'wide': some of its 7 rows are missing or stored twice"),
        ([4], "the row ranges of its tensors are missing or invalid"),
    ],
)
def test_missing_and_duplicate_rows_are_refused(tmp_path, rows, message):
    shards = write_shards(tmp_path / "model.safetensors", 2)
    header = {"save_id": "a", "rows": json.dumps({**rows_of(1, 2), "wide": rows})}
    tensors = {name: local(rows_of(1, 2))[name] for name in SHARDED}
    tensors["wide"] = TENSORS["wide"][slice(*rows[:2])].clone()
    save_file(tensors, shards.file(tmp_path / "model.safetensors", 1), metadata=header)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_shards(tmp_path / "model.safetensors", shards)


@pytest.mark.parametrize("count", [0, -1, -(2**70)])
def test_a_count_below_one_is_refused(tmp_path, count):
    content = {"format_version": 1, "model": ModelConfig().to_dict(), "shards": {"count": count, "save_id": "a"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"config.json: 'shards.count' is {count}, expected at least 1"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("read", [checkpoint.load, checkpoint.weight_files])
def test_an_absurd_count_is_refused_at_the_first_missing_file(tmp_path, monkeypatch, read):
    write_shards(tmp_path / "model.safetensors", 2)
    first = tmp_path / "model-rank-00001-of-00002.safetensors"
    first.rename(tmp_path / f"model-rank-00001-of-{10**9}.safetensors")
    content = {"format_version": 1, "model": ModelConfig().to_dict(), "shards": {"count": 10**9, "save_id": "a"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    listed, name_of = [], ShardSet.file

    def file(self, path, rank):
        listed.append(rank)
        assert len(listed) < 9, "lists all files before it looks for them"
        return name_of(self, path, rank)

    monkeypatch.setattr(ShardSet, "file", file)
    with pytest.raises(CheckpointError, match=rf"model-rank-00002-of-{10**9}.safetensors: No such file"):
        read(tmp_path)
