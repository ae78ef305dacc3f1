"""Data types of matrix products where a recipe says ``auto``.

Rank 0's machine chooses them when a run begins. Every checkpoint stores the choice, and a resumed run keeps it on any
machine: other data types would change its results.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from kernels.hardware import multiplies_bf16_fast
from model.atomic_files import write_text
from model.errors import MALFORMED, CheckpointError
from pipelines.recipe.loading import with_overrides
from pipelines.recipe.schema import Recipe
from pipelines.training.collectives import broadcast_from_rank_0

FILE = "compute_dtype.json"
Dtypes = dict[str, str]
"""Data type of each dotted recipe key that may be ``auto``."""
BF16: Dtypes = {"train.autocast": "bfloat16", "train.optimizer.ns_dtype": "bfloat16"}
FLOAT32: Dtypes = {"train.autocast": "none", "train.optimizer.ns_dtype": "float32"}


def choose(device: torch.device | str) -> Dtypes:
    """Return the faster data types on rank 0's ``device``. Every rank must call it."""
    return BF16 if broadcast_from_rank_0(multiplies_bf16_fast(device), device) else FLOAT32


def settings_of(recipe: Recipe) -> Dtypes:
    """Return the settings of ``recipe``, which may be ``auto``."""
    return {"train.autocast": recipe.train.autocast, "train.optimizer.ns_dtype": recipe.train.optimizer.ns_dtype}


def resolve(recipe: Recipe, dtypes: Dtypes) -> Recipe:
    """Return ``recipe`` with ``auto`` replaced by the types in ``dtypes``."""
    return with_overrides(recipe, {key: dtypes[key] for key, value in settings_of(recipe).items() if value == "auto"})


def describe(asked: Recipe, resolved: Recipe, device: torch.device | str, resumed: bool) -> str | None:
    """Return a sentence on the types chosen for ``auto`` and on emulated BF16; None where neither applies."""
    found, fast = settings_of(resolved), multiplies_bf16_fast(device)
    parts = []
    chosen = [f"{key} is {found[key]}" for key, value in settings_of(asked).items() if value == "auto"]
    if chosen:
        why = "kept from the checkpoint" if resumed else f"BF16 products are {'' if fast else 'not '}faster here"
        parts.append(f"{', '.join(chosen)} (auto: {why})")
    if "bfloat16" in found.values() and not fast:
        parts.append("BF16 products are emulated on this processor, several times slower than float32")
    return "; ".join(parts) or None


def write(folder: Path, dtypes: Dtypes) -> None:
    """Store ``dtypes`` in ``folder``."""
    write_text(folder / FILE, json.dumps(dtypes) + "\n")


def read(folder: Path) -> Dtypes:
    """Return the data types stored in ``folder``. Raises CheckpointError."""
    path = folder / FILE
    try:
        found = json.loads(path.read_text())
        dtypes = {key: str(found[key]) for key in BF16}
    except (OSError, *MALFORMED) as error:
        raise CheckpointError(f"{path}: does not hold the data types of a training ({error})") from error
    for key, value in dtypes.items():
        if value not in (BF16[key], FLOAT32[key]):
            raise CheckpointError(f"{path}: {key} is '{value}', expected {BF16[key]} or {FLOAT32[key]}")
    return dtypes
