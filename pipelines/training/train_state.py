"""The state of a training at one step, in memory and in a checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model import checkpoint
from model.checkpoint.rank_shards import RankShard, RowLookup
from model.config import ModelConfig
from model.distributed.dtensor import RowRange
from model.finite import is_finite
from model.tokenizer import Tokenizer
from pipelines.training import compute_dtype

OPTIMIZER, STATE = "optimizer.safetensors", "trainer.json"
RANDOM = "random/"


@dataclass(frozen=True)
class TrainState:
    """A copy of the state, which can be written while training continues. Under sharding, one rank's share of it."""

    state: dict[str, Any]
    """Plain values, for JSON."""
    model: dict[str, Tensor]
    config: ModelConfig
    tensors: dict[str, Tensor]
    """State of the optimizer and the random number generators."""
    tokenizer: Tokenizer
    spans: dict[str, RowRange]
    """This rank's rows of each sharded parameter."""
    shard: RankShard | None
    """None without sharding."""
    dtypes: compute_dtype.Dtypes

    def write(self, folder: Path) -> None:
        """Write the model's checkpoint and the state to resume from, or this rank's share, into an existing folder."""
        if self.shard is None:
            checkpoint.write(self.model, self.config, folder, self.tokenizer)
            save_file(self.tensors, folder / OPTIMIZER)
        else:
            find_rows = span_lookup(self.spans)
            checkpoint.write_shard(self.model, find_rows, self.shard, self.config, folder, self.tokenizer)
            self.shard.write(folder / OPTIMIZER, self.tensors, find_rows)
        if self.shard is None or self.shard.rank == 0:
            (folder / STATE).write_text(json.dumps(self.state) + "\n")
            compute_dtype.write(folder, self.dtypes)


def span_lookup(spans: Mapping[str, RowRange]) -> RowLookup:
    """Return a function from the name of a parameter, or of its optimizer state ``<parameter>/<slot>``, to its span."""
    return lambda name: spans.get(name.partition("/")[0])


def copy_to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU copies that share no memory with ``tensors``."""
    return {name: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for name, t in tensors.items()}


def find_nonfinite(tensors: dict[str, Tensor]) -> str | None:
    """Return the name of the first tensor with a NaN or an infinity, or None."""
    return next((name for name, tensor in tensors.items() if not is_finite(tensor)), None)


# --- random number generators


def random_state() -> dict[str, Tensor]:
    """Return the states of torch's generators as uint8 tensors."""
    states = {f"{RANDOM}cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"{RANDOM}cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(tensors: dict[str, Tensor]) -> None:
    """Restore the generators from :func:`random_state`; other tensors are ignored."""
    if f"{RANDOM}cpu" in tensors:
        torch.set_rng_state(tensors[f"{RANDOM}cpu"])
    if f"{RANDOM}cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"{RANDOM}cuda"])
