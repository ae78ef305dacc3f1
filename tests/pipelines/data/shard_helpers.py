"""Helpers of the tests on token shards."""

from pathlib import Path

import numpy as np
import torch

LENGTH = 128


def as_bytes(rows) -> list[bytes]:
    return [row["tokens"].tobytes() + row["target_kind"].tobytes() + row["positions"].tobytes() for row in rows]


def rows_of(batch: dict[str, torch.Tensor]) -> list[bytes]:
    return as_bytes(
        {"tokens": tokens.astype(np.int32), "target_kind": kinds, "positions": positions.astype(np.int32)}
        for tokens, kinds, positions in zip(*(batch[name].numpy() for name in ("tokens", "target_kind", "positions")))
    )


def first_shard(folder: Path) -> Path:
    return folder / "train/00000.parquet"


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


def single(rows):
    return [{name: values[i] for name, values in rows.items()} for i in range(len(rows["tokens"]))]
