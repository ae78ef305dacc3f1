"""Tile settings of kernels, and the choice among the few that an architecture has.

The first launch of a kernel for a shape on a GPU times every setting. The choice is stored on disk, keyed by the GPU,
the versions of torch and triton and the kernels' sources. The interpreter and CUDA graph captures never time anything.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from kernels.cache_folder import cache_folder
from kernels.triton_support.platform import architecture, is_interpreting

T = TypeVar("T")
_log = logging.getLogger("fiftyfold")
_ROUNDS = 5


@dataclass(frozen=True)
class Tile:
    """Compile-time settings of one kernel."""

    warps: int
    stages: int
    sizes: dict[str, int] = field(default_factory=dict, hash=False)
    """Compile-time constants, by the names of the kernel's arguments."""

    @property
    def options(self) -> dict[str, int]:
        """The settings as keyword arguments of a launch."""
        return {**self.sizes, "num_warps": self.warps, "num_stages": self.stages}

    def __str__(self) -> str:
        sizes = " ".join(f"{name.lower()} {value}" for name, value in self.sizes.items())
        return ", ".join(filter(None, (sizes, f"{self.warps} warps", f"{self.stages} stages")))


Tiles = dict[str, tuple[Tile, ...]]
"""Settings by architecture, the default first."""

INTERPRETED = "sm_90"
"""Architecture whose settings :func:`launch_best` names to the interpreter if a kernel has none of its own."""


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def padded_dim(size: int) -> int:
    """Return a width of a block of products: ``size`` rounded up to a power of two of at least 16."""
    return max(16, power_of_two(size))


def settings_for(tiles: Tiles, device: torch.device) -> tuple[Tile, ...]:
    """Return the settings for the architecture of a device, or those of the interpreter."""
    if is_interpreting():
        return tiles["interpreter" if "interpreter" in tiles else INTERPRETED]
    name = architecture(device)
    assert name is not None, device
    return tiles[name]


def launch_best(kernel: str, tiles: Tiles, shape: Hashable, device: torch.device, launch: Callable[[Tile], T]) -> T:
    """Call ``launch`` with the best setting and return its result.

    ``launch`` allocates its own outputs: it is called several times while settings are timed.

    Args:
        kernel: Name of the kernel, as in its plan.
        tiles: Settings by architecture. ``interpreter`` names small ones for the interpreter.
        shape: Everything that the choice depends on. Sizes above 64 share a choice up to the next power of two.
        device: Device of the tensors.
        launch: Launches the kernel with a setting.
    """
    if device.type != "cuda":
        return _launch_best(kernel, tiles, shape, device, launch)
    with torch.cuda.device(device):  # Triton launches on the current device
        return _launch_best(kernel, tiles, shape, device, launch)


def _launch_best(kernel: str, tiles: Tiles, shape: Hashable, device: torch.device, launch: Callable[[Tile], T]) -> T:
    choices = settings_for(tiles, device)
    if is_interpreting() or len(choices) == 1:
        return launch(choices[0])
    key = f"{kernel} {_bucket(shape)}"
    cache = _cache(device)
    best = cache.get(key)
    if best is None or best >= len(choices):
        if torch.cuda.is_current_stream_capturing():
            return launch(choices[0])
        best = cache.put(key, _fastest(choices, launch))
        _log.info("%s: fastest setting %s", key, choices[best])
    return launch(choices[best])


def _bucket(shape: Hashable) -> Hashable:
    """Round integers above 64 up to powers of two, so that lengths of similar size share a choice."""
    if isinstance(shape, tuple):
        return tuple(_bucket(part) for part in shape)
    return power_of_two(shape) if isinstance(shape, int) and shape > 64 else shape


def _fastest(choices: Sequence[Tile], launch: Callable[[Tile], object]) -> int:
    """Return the index of the setting with the smallest median time. Times include the launch."""
    medians = []
    for tile in choices:
        launch(tile)  # compiles
        times = []
        for _ in range(_ROUNDS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            launch(tile)
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        medians.append(statistics.median(times))
    return medians.index(min(medians))


class TileCache:
    """Choices in a JSON file, which several processes may write: the last one wins, and a damaged file is ignored."""

    def __init__(self, path: Path):
        self.path = path
        self._choices: dict[str, int] = self._read()

    def get(self, key: str) -> int | None:
        return self._choices.get(key)

    def put(self, key: str, choice: int) -> int:
        """Store a choice and return it. A folder that cannot be written keeps it for this process only."""
        self._choices = {**self._read(), **self._choices, key: choice}
        content = json.dumps(self._choices, indent=1, sort_keys=True)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.path.parent) as folder:
                written = Path(folder) / self.path.name
                written.write_text(content)
                os.replace(written, self.path)
        except OSError as error:
            _log.warning("%s: tile choices are not stored (%s)", self.path, error.strerror)
        return choice

    def _read(self) -> dict[str, int]:
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        if not isinstance(found, dict):
            return {}
        return {key: value for key, value in found.items() if isinstance(value, int) and value >= 0}


@functools.cache
def _cache(device: torch.device) -> TileCache:
    triton = importlib.import_module("triton")  # its distribution has another name for AMD GPUs
    versions = f"{torch.cuda.get_device_name(device)} {torch.__version__} {triton.__version__} {_sources()}"
    return TileCache(cache_folder("triton") / f"{hashlib.sha256(versions.encode()).hexdigest()[:16]}.json")


def _sources() -> str:
    """Return a digest of all kernels and their settings."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].glob("*/triton*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
