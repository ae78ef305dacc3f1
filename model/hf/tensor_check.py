"""Comparison of a folder's tensors with those of the network that its ``config.json`` describes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from model.errors import CheckpointError, FiftyfoldError
from model.hf import release_format
from model.hf.safetensors_folder import CONFIG, TensorHeader
from model.hf.tensors import Source, WeightFormat, split_name

Plan = dict[str, Source]
"""The tensors of a checkpoint by canonical name."""
_LAYER = re.compile(r"(?:\w+\.)?layers\.(\d+)\.")


class TensorCheck:
    """Checks names, shapes and dtypes. ``plan_of`` returns the expected tensors for the content of a config.json,
    in one layer or outside of all (:func:`model.hf.tensors.split_name`)."""

    def __init__(
        self,
        folder: Path,
        content: dict[str, Any],
        plan_of: Callable[[dict[str, Any], str], Plan],
        expected: Plan,
        stored: dict[str, TensorHeader],
    ):
        self.folder, self.content, self.plan_of = folder, content, plan_of
        self.expected, self.stored = expected, stored

    def run(self) -> dict[str, WeightFormat]:
        """Return the formats of quantized tensors by name. Raises CheckpointError unless all tensors fit."""
        quantized: dict[str, WeightFormat] = {}
        scales: set[str] = set()
        self._check_layers()
        for name, source in self.expected.items():
            if name not in self.stored:
                raise self._missing(source.name, source.shape)
            fmt = release_format.format_of(source, self.stored[name])
            self._check_shape(name, self.stored[name], release_format.weight_shape(source, fmt))
            if fmt is not None:
                quantized[name] = fmt
                scales.add(self._check_scale(name, source, fmt))
        for name, header in self.stored.items():
            if name not in self.expected and name not in scales:
                raise CheckpointError(f"{header.shard}: tensor '{header.name}' is not part of this model")
        return quantized

    def _missing(self, name: str, shape: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(f"{self.folder}: tensor '{name}' is missing, expected shape {list(shape)}")

    def _check_scale(self, weight: str, source: Source, fmt: WeightFormat) -> str:
        """Check the scales of a quantized weight and return their name."""
        name, shape = release_format.scale_name(weight), release_format.scale_shape(source, fmt)
        if name not in self.stored:
            raise self._missing(release_format.scale_name(self.stored[weight].name), shape)
        header = self.stored[name]
        self._check_shape(None, header, shape)
        if header.dtype != "F8_E8M0":
            raise CheckpointError(f"{header.shard}: tensor '{header.name}' is {header.dtype}, expected F8_E8M0")
        return name

    def _check_layers(self) -> None:
        """Check that the folder has the number of layers that config.json gives, and all of them."""
        found, expected = _layers(self.stored), _layers(self.expected)
        if found and found != expected:
            raise CheckpointError(
                f"{self.folder / CONFIG}: key 'num_hidden_layers' is {len(expected)}, but the folder has tensors of "
                f"{len(found)} layers, {min(found)} to {max(found)}"
            )

    def _check_shape(self, name: str | None, header: TensorHeader, expected: tuple[int, ...]) -> None:
        """Compare shapes. The error for a weight, which has a ``name``, gives the keys that decide its shape."""
        if header.shape == tuple(expected):
            return
        keys = [] if name is None else self._keys_of(name, header.shape)
        cause = " by " + ", ".join(f"'{key}' {self.content[key]}" for key in keys) + f" of {CONFIG}" if keys else ""
        raise CheckpointError(
            f"{header.shard}: tensor '{header.name}' has shape {list(header.shape)}, expected {list(expected)}{cause}"
        )

    def _keys_of(self, name: str, found: tuple[int, ...]) -> list[str]:
        """Return the keys of config.json on which the dims that differ depend: those whose change changes them."""
        source = self.expected[name]
        shape, place = source.shape, split_name(source.parts[0].ours)[0]
        differing = [dim for dim, (a, b) in enumerate(zip(shape, found)) if len(shape) != len(found) or a != b]
        keys = []
        for key, value in self.content.items():
            if type(value) is not int:
                continue
            for other in (2 * value, value // 2, 1):  # the first that is a valid configuration
                try:
                    changed = self.plan_of({**self.content, key: other}, place).get(name)
                except FiftyfoldError:
                    continue
                if changed is not None and any(changed.shape[dim] != shape[dim] for dim in differing):
                    keys.append(key)
                break
        return keys


def _layers(names: dict[str, Any]) -> set[int]:
    return {int(match[1]) for name in names if (match := _LAYER.match(name))}
