"""Folders of sharded safetensors files with an index, in Hugging Face's format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAPPED_BYTES = 16 << 20
"""Bytes after which an open shard is reopened to release its mapped memory."""


@dataclass(frozen=True)
class TensorHeader:
    """Entry of a tensor in a shard's header."""

    shard: Path
    shape: tuple[int, ...]
    dtype: str
    """Name of the dtype in safetensors: F32, BF16, F8_E4M3, F8_E8M0, I8, I64, ..."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a mapping at the top level, found {type(content).__name__}")
    return content


def list_tensors(folder: Path) -> dict[str, TensorHeader]:
    """Return the headers of all tensors of ``model.safetensors`` or, if there is none, of the shards in the index.

    Raises CheckpointError if the index does not match the shards, or if a file is damaged.
    """
    if (folder / WEIGHTS).exists():
        return _read_header(folder / WEIGHTS)
    index = folder / INDEX
    if not index.exists():
        raise CheckpointError(f"{folder}: found neither {WEIGHTS} nor {INDEX}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: key 'weight_map' is not a mapping of tensor names to files")
    found: dict[str, TensorHeader] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: shard '{shard}' is not a file name in this folder")
        if not (folder / shard).exists():
            raise CheckpointError(f"{index}: shard '{shard}' is named but missing")
        header = _read_header(folder / shard)
        for name, stored in header.items():
            if weight_map.get(name) != shard:
                expected = weight_map.get(name, "no shard")
                raise CheckpointError(f"{folder / shard}: holds tensor '{name}', which the index puts in {expected}")
            found[name] = stored
    for name, shard in weight_map.items():
        if name not in found:
            raise CheckpointError(f"{folder / shard}: tensor '{name}' is named in the index but missing here")
    return found


def iterate_tensors(tensors: dict[str, TensorHeader]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors' data on the CPU, shard by shard. A tensor is valid until the next iteration."""
    by_shard: dict[Path, list[str]] = {}
    for name, stored in tensors.items():
        by_shard.setdefault(stored.shard, []).append(name)
    for shard, names in by_shard.items():
        while names:
            read = 0
            with _open_shard(shard) as file:
                while names and read < _MAPPED_BYTES:
                    name = names.pop(0)
                    try:
                        tensor = file.get_tensor(name)
                    except SafetensorError as error:
                        raise CheckpointError(f"{shard}: tensor '{name}' cannot be read ({error})") from error
                    read += tensor.nbytes
                    yield name, tensor
                    del tensor


def write_shards(
    folder: Path,
    tensors: Iterable[tuple[str, int]],
    produce: Callable[[str], Tensor],
    max_shard_bytes: int,
) -> None:
    """Write shards and their index. ``tensors`` are names and sizes in bytes, ``produce`` returns a tensor by name.

    One shard is in memory at a time. A tensor larger than ``max_shard_bytes`` gets a shard of its own.
    """
    shards: list[list[str]] = []
    room = total = 0
    for name, nbytes in tensors:
        if not shards or nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= nbytes
        total += nbytes
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: produce(name).cpu().contiguous() for name in names}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")


def _open_shard(shard: Path) -> Any:
    try:
        return safe_open(shard, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{shard}: damaged or not a safetensors file ({error})") from error


def _read_header(shard: Path) -> dict[str, TensorHeader]:
    with _open_shard(shard) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return {name: TensorHeader(shard, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
