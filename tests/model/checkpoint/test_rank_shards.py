"""Tensors in several files, each with some of their rows."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file

from model.checkpoint.rank_shards import Part, Parts, read
from model.distributed.dtensor import RowRange, range_of
from model.errors import CheckpointError

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


def mine(spans):
    return {name: t[slice(*spans[name][:2])] if name in spans else t for name, t in TENSORS.items()}


def written(path, world, writing="a"):
    parts = Parts(world, writing)
    for rank in range(world):
        spans = rows_of(rank, world)
        Part(rank, parts).write(path, mine(spans), spans.get)
    return parts


@pytest.mark.parametrize("writers", [1, 2, 3, 8])
@pytest.mark.parametrize("readers", [1, 2, 3, 8])
def test_any_number_of_readers_find_their_rows(tmp_path, writers, readers):
    parts = written(tmp_path / "model.safetensors", writers)
    assert len(list(tmp_path.iterdir())) == writers
    for rank in range(readers):
        spans = rows_of(rank, readers)
        found = read(tmp_path / "model.safetensors", parts, spans.get)
        assert set(found) == set(TENSORS)
        for name, expected in mine(spans).items():
            assert torch.equal(found[name], expected) and found[name].dtype == expected.dtype, name


def test_rows_of_a_single_file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    found = read(tmp_path / "model.safetensors", None, {"wide": RowRange(2, 4, 7)}.get)
    assert torch.equal(found["wide"], TENSORS["wide"][2:4]) and torch.equal(found["norm"], TENSORS["norm"])
    with pytest.raises(CheckpointError, match=r"'wide' has 7 rows, expected 9"):
        read(tmp_path / "model.safetensors", None, {"wide": RowRange(2, 4, 9)}.get)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([3, 7, 7], "tensor 'wide': some of its 7 rows are in no part, or in two"),
        ([5, 7, 7], "tensor 'wide': some of its 7 rows are in no part, or in two"),
        ([4, 6, 6], "tensor 'wide': some of its 7 rows are in no part, or in two"),
        ([4], "says not which rows of its tensors it holds"),
    ],
)
def test_rows_that_make_no_whole_are_refused(tmp_path, rows, message):
    parts = written(tmp_path / "model.safetensors", 2)
    header = {"writing": "a", "rows": json.dumps({**rows_of(1, 2), "wide": rows})}
    tensors = {name: mine(rows_of(1, 2))[name] for name in SHARDED}
    tensors["wide"] = TENSORS["wide"][slice(*rows[:2])].clone()
    save_file(tensors, parts.file(tmp_path / "model.safetensors", 1), metadata=header)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read(tmp_path / "model.safetensors", parts)
