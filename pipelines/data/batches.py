"""Training batches from a data folder or from a worker's shard of a Ray dataset."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from model.errors import DataError
from pipelines.data.local_reader import local_rows
from pipelines.data.packing import Row

if TYPE_CHECKING:
    import ray.data

Batch = dict[str, torch.Tensor]

SHUFFLE_BUFFER_TOKENS = 2_000_000
"""Size of the local shuffle buffer of a Ray shard. In tokens, to bound memory at any sequence length."""


def stack_rows(rows: Iterable[Row], batch_rows: int, drop_last: bool = False) -> Generator[Batch, None, None]:
    """Stack rows into {"tokens": int64 [B, L + 1], "target_kind": uint8 [B, L], "positions": int64 [B, L]}.

    The last batch may be smaller, unless ``drop_last`` drops it.
    """
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, batch_rows)):
        if len(chunk) < batch_rows and drop_last:
            return
        yield {
            "tokens": torch.from_numpy(np.stack([row["tokens"] for row in chunk])).long(),
            "target_kind": torch.from_numpy(np.stack([row["target_kind"] for row in chunk])),
            "positions": torch.from_numpy(np.stack([row["positions"] for row in chunk])).long(),
        }


class TrainBatches:
    """Endless iterator over training batches, reshuffled every epoch.

    ``epoch`` and ``batch`` are the position of the next batch. Store both in a checkpoint and pass them to
    :func:`train_batches` as ``epoch`` and ``skip`` to continue with that batch. Raises DataError when an epoch has no
    full batch.
    """

    def __init__(self, open_epoch: Callable[[int], Generator[Batch, None, None]], epoch: int, skip: int):
        self._stream = self._read_epochs(open_epoch, epoch)
        self._lookahead: deque[tuple[Batch, int, int]] = deque()
        self.epoch = epoch
        self.batch = 0
        for _ in range(skip):
            next(self)

    def __iter__(self) -> TrainBatches:
        return self

    def __next__(self) -> Batch:
        batch, self.epoch, self.batch = self._lookahead.popleft() if self._lookahead else next(self._stream)
        return batch

    def peek(self, count: int) -> list[Batch]:
        """Return the next ``count`` batches without consuming them."""
        while len(self._lookahead) < count:
            self._lookahead.append(next(self._stream))
        return [batch for batch, _, _ in itertools.islice(self._lookahead, count)]

    def close(self) -> None:
        """Stop reading. Ends the execution of a Ray shard now instead of at a later garbage collection."""
        self._stream.close()

    @staticmethod
    def _read_epochs(
        open_epoch: Callable[[int], Generator[Batch, None, None]], epoch: int
    ) -> Generator[tuple[Batch, int, int], None, None]:
        """Yield each batch with the position after it: (batch, epoch, batches read of the epoch)."""
        while True:
            count = 0
            with contextlib.closing(open_epoch(epoch)) as batches:
                for count, batch in enumerate(batches, 1):
                    yield batch, epoch, count
            if not count:
                raise DataError("train split: one epoch holds fewer rows than train.batch_rows asks of each worker")
            epoch += 1


def train_batches(
    source: ray.data.DataIterator | str | Path,
    sequence_length: int,
    batch_rows: int,
    seed: int = 0,
    epoch: int = 0,
    skip: int = 0,
) -> TrainBatches:
    """Open endless batches of ``batch_rows`` rows.

    Each epoch is shuffled from (``seed``, epoch); rows that do not fill a batch are dropped at its end. The batches of
    a Ray shard are on the worker's device, those of a folder on the CPU. Raises DataError when an epoch has no full
    batch, or for a damaged folder.

    Args:
        source: A data folder, or a worker's ``get_dataset_shard("train")``.
        skip: Batches of ``epoch`` to read and discard first.
    """
    if isinstance(source, str | Path):
        open_epoch = functools.partial(_folder_epoch, source, sequence_length, batch_rows, seed)
    else:
        open_epoch = functools.partial(_shard_epoch, source, sequence_length, batch_rows, seed)
    return TrainBatches(open_epoch, epoch, skip)


def _folder_epoch(
    folder: str | Path, sequence_length: int, batch_rows: int, seed: int, epoch: int
) -> Generator[Batch, None, None]:
    rows = local_rows(folder, "train", sequence_length, seed=_epoch_seed(seed, epoch))
    return stack_rows(rows, batch_rows, drop_last=True)


def _shard_epoch(
    shard: ray.data.DataIterator, sequence_length: int, batch_rows: int, seed: int, epoch: int
) -> Generator[Batch, None, None]:
    yield from shard.iter_torch_batches(
        batch_size=batch_rows,
        dtypes={"tokens": torch.int64, "target_kind": torch.uint8, "positions": torch.int64},
        drop_last=True,
        local_shuffle_buffer_size=max(2 * batch_rows, SHUFFLE_BUFFER_TOKENS // sequence_length),
        local_shuffle_seed=_epoch_seed(seed, epoch),
    )


def _epoch_seed(seed: int, epoch: int) -> int:
    return int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
