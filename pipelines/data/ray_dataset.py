"""Training rows as a Ray dataset. Ray's read tasks import this module, so it must not import torch."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipelines.data.manifest import read_manifest
from pipelines.data.packing import Row, cut_rows
from pipelines.data.shards import read_shard

if TYPE_CHECKING:
    import ray.data


def train_dataset(folder: str | Path, sequence_length: int, seed: int = 0) -> ray.data.Dataset:
    """Return the training rows as a lazy dataset, for ``datasets={"train": ...}`` of a Ray Train trainer.

    Shards are shuffled with ``seed``; rows keep the order of their shard, and each comes exactly once. Raises DataError
    for a missing shard or one of another size. Their SHA-256 is not checked: the step has done that.
    """
    import ray.data

    folder = Path(folder).absolute()  # workers run in their own folders
    manifest = read_manifest(folder)
    paths = [str(folder / shard.file) for shard in manifest.splits["train"].shards]
    random.Random(seed).shuffle(paths)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    # Packing needs whole shards, which Ray's own Parquet reader may split into blocks. So tasks get paths.
    shards = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=len(paths))
    cut = functools.partial(
        _cut_shards, sequence_length=sequence_length, packing=manifest.packing, vocab_size=manifest.vocab_size
    )
    return shards.map_batches(cut, batch_size=1, batch_format="numpy")


def _cut_shards(shards: dict[str, np.ndarray], sequence_length: int, packing: bool, vocab_size: int) -> Iterator[Row]:
    for path in shards["path"]:
        yield cut_rows(read_shard(Path(path), vocab_size), sequence_length, packing)
