"""Batches of a data folder."""

from collections import Counter

import pytest
import torch
from shard_helpers import LENGTH, as_bytes, resumes, rows_of

from model.errors import DataError
from pipelines.data.batches import stack_rows, train_batches
from pipelines.data.local_reader import local_rows
from pipelines.data.manifest import read_manifest


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
