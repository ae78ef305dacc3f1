"""A moment of a training, as it is kept in memory and in a checkpoint's folder."""

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
from model.config import ModelConfig
from model.parts import Part, SpanOf
from model.sharding import Span
from model.tokenizer import Tokenizer
from pipelines.training import compute_dtype

OPTIMIZER, STATE = "optimizer.safetensors", "trainer.json"
RANDOM = "random/"


@dataclass(frozen=True)
class Snapshot:
    """In memory of its own: it can be written while training goes on. Under sharding, one rank's share of it."""

    state: dict[str, Any]
    """Plain values."""
    model: dict[str, Tensor]
    config: ModelConfig
    tensors: dict[str, Tensor]
    """Of the optimizer and the random generators."""
    tokenizer: Tokenizer
    spans: dict[str, Span]
    """The rows that are here of the parameters that are sharded."""
    part: Part | None
    """None where nothing is sharded."""
    dtypes: compute_dtype.Choice

    def write(self, folder: Path) -> None:
        """The model's checkpoint plus what resuming needs, or this rank's share of them, into an existing folder."""
        if self.part is None:
            checkpoint.write(self.model, self.config, folder, self.tokenizer)
            save_file(self.tensors, folder / OPTIMIZER)
        else:
            span_of = span_in(self.spans)
            checkpoint.write_part(self.model, span_of, self.part, self.config, folder, self.tokenizer)
            self.part.write(folder / OPTIMIZER, self.tensors, span_of)
        if self.part is None or self.part.number == 0:
            (folder / STATE).write_text(json.dumps(self.state) + "\n")
            compute_dtype.write(folder, self.dtypes)


def span_in(spans: Mapping[str, Span]) -> SpanOf:
    """The rows of a parameter, which are also those of the optimizer's ``<parameter>/<slot>``."""
    return lambda name: spans.get(name.partition("/")[0])


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, contiguous, and never the same memory."""
    return {name: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for name, t in tensors.items()}


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """The name of the first tensor with a NaN or an infinity in it."""
    return next((name for name, tensor in tensors.items() if not tensor.isfinite().all()), None)


# --- random numbers


def random_state() -> dict[str, Tensor]:
    """The states of torch's generators, uint8, ready for safetensors."""
    states = {f"{RANDOM}cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"{RANDOM}cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_state(tensors: dict[str, Tensor]) -> None:
    """Inverse of :func:`random_state`; other tensors are left alone."""
    if f"{RANDOM}cpu" in tensors:
        torch.set_rng_state(tensors[f"{RANDOM}cpu"])
    if f"{RANDOM}cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"{RANDOM}cuda"])
