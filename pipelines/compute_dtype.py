"""Data types of matrix products, where a recipe leaves them to the machine that trains (``auto``).

The machine of rank 0 chooses when a run begins. The choice is stored in every checkpoint, and a resumed run keeps it
wherever it goes on: other products would make it another run.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from kernels.hardware import multiplies_bf16_fast
from model.errors import CheckpointError
from model.files import write_text
from pipelines.config import Recipe, with_overrides
from pipelines.ranks import from_first

FILE = "compute_dtype.json"
Choice = dict[str, str]
"""A data type for each dotted key of the recipe that may be ``auto``."""
BF16: Choice = {"train.autocast": "bfloat16", "train.optimizer.ns_dtype": "bfloat16"}
FLOAT32: Choice = {"train.autocast": "none", "train.optimizer.ns_dtype": "float32"}


def choose(device: torch.device | str) -> Choice:
    """Return the faster data types on rank 0's ``device``; every rank must call it."""
    return BF16 if from_first(multiplies_bf16_fast(device), device) else FLOAT32


def of(recipe: Recipe) -> Choice:
    """Return the settings of ``recipe``, ``auto`` among them."""
    return {"train.autocast": recipe.train.autocast, "train.optimizer.ns_dtype": recipe.train.optimizer.ns_dtype}


def resolve(recipe: Recipe, choice: Choice) -> Recipe:
    """Return ``recipe`` with the types of ``choice`` in place of ``auto``."""
    return with_overrides(recipe, {key: choice[key] for key, value in of(recipe).items() if value == "auto"})


def notice(asked: Recipe, resolved: Recipe, device: torch.device | str, resumed: bool) -> str | None:
    """Return a sentence on what ``auto`` became and on BF16 that is emulated; None where there is neither."""
    found, fast = of(resolved), multiplies_bf16_fast(device)
    parts = []
    chosen = [f"{key} is {found[key]}" for key, value in of(asked).items() if value == "auto"]
    if chosen:
        why = "kept from the checkpoint" if resumed else f"BF16 products are {'' if fast else 'not '}faster here"
        parts.append(f"{', '.join(chosen)} (auto: {why})")
    if "bfloat16" in found.values() and not fast:
        parts.append("BF16 products are emulated on this processor, several times slower than float32")
    return "; ".join(parts) or None


def write(folder: Path, choice: Choice) -> None:
    write_text(folder / FILE, json.dumps(choice) + "\n")


def read(folder: Path) -> Choice:
    """Return what :func:`write` left in ``folder``. Raises CheckpointError."""
    path = folder / FILE
    try:
        found = json.loads(path.read_text())
        choice = {key: str(found[key]) for key in BF16}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: not the data types of a training ({error})") from error
    for key, value in choice.items():
        if value not in (BF16[key], FLOAT32[key]):
            raise CheckpointError(f"{path}: {key} is '{value}', expected {BF16[key]} or {FLOAT32[key]}")
    return choice
