"""Reading of training rows in this process, without Ray."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.data.manifest import Kind, Manifest, Split, read_manifest
from pipelines.data.packing import Row, cut_rows
from pipelines.data.shards import read_shard


def local_rows(
    folder: str | Path,
    split: Split,
    sequence_length: int,
    kinds: Iterable[Kind] | None = None,
    limit: int | None = None,
    seed: int | None = None,
) -> Iterator[Row]:
    """Read rows one shard at a time: {"tokens": int32 [L + 1], "target_kind": uint8 [L], "positions": int32 [L]} each.

    Raises DataError for a missing or damaged folder or shard.

    Args:
        kinds: Keep only documents of these kinds.
        limit: Maximum number of rows.
        seed: Seed of a permutation of the shards, and of the rows within each shard. None keeps their order.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    wanted = None if kinds is None else pa.array(list(kinds))
    paths = [folder / shard.file for shard in manifest.splits[split].shards]
    rows = _read_rows(paths, manifest, sequence_length, wanted, seed)
    return itertools.islice(rows, limit)


def _read_rows(
    paths: list[Path], manifest: Manifest, sequence_length: int, wanted: pa.Array | None, seed: int | None
) -> Iterator[Row]:
    rng = np.random.default_rng(seed)
    if seed is not None:
        paths = [paths[i] for i in rng.permutation(len(paths))]
    for path in paths:
        documents = read_shard(path, manifest.vocab_size)
        if wanted is not None:
            documents = documents.filter(pc.is_in(documents["kind"], wanted))
        rows = cut_rows(documents, sequence_length, manifest.packing)
        count = len(rows["tokens"])
        for i in range(count) if seed is None else rng.permutation(count):
            yield {name: values[i] for name, values in rows.items()}
