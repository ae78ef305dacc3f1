"""Folders of sharded safetensors files with an index, in Hugging Face's format."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.batching import split_by_size
from model.errors import MALFORMED, CheckpointError
from model.regular_files import check_regular
from model.wording import count, json_type

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_POINTER_BYTES = 200
"""Bytes to read of a file to recognize a pointer to one that is stored elsewhere."""
_MAX_HEADER_BYTES = 100_000_000
"""Limit of the safetensors library."""
_MAPPED_BYTES = 16 << 20
"""Bytes after which an open shard is reopened to release its mapped memory."""


@dataclass(frozen=True)
class TensorHeader:
    """Entry of a tensor in a shard's header."""

    name: str
    shard: Path
    shape: tuple[int, ...]
    dtype: str
    """Name of the dtype in safetensors: F32, BF16, F8_E4M3, F8_E8M0, I8, I64, ..."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object in UTF-8, UTF-16 or UTF-32, with or without a byte order mark. Raises CheckpointError."""
    try:
        check_regular(path)
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: {_dangling(path) or error.strerror}") from error
    if fault := _not_the_file(data[:_POINTER_BYTES]):
        raise CheckpointError(f"{path}: {fault}")
    try:
        content = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected an object at the top level, found {json_type(content)}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a mapping. Raises ValueError for a repeated key, of which JSON parsers keep one or the other."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key '{key}' occurs twice")
        found[key] = value
    return found


def list_tensors(folder: Path, report: Callable[[str], None] = print) -> dict[str, TensorHeader]:
    """Return the headers of all tensors of ``model.safetensors`` or of the shards in the index.

    ``report`` receives a line about safetensors files and indexes that are not read. Raises CheckpointError if both
    or neither exist, if the index does not match the shards, or if a file is damaged.
    """
    weights, index = folder / WEIGHTS, folder / INDEX
    if not _exists(weights) and not _exists(index):
        raise CheckpointError(f"{folder}: found neither {WEIGHTS} nor {INDEX}{_found_instead(folder)}")
    if not _exists(index):
        found, read = _read_header(weights), {WEIGHTS}
    else:
        weight_map = _read_weight_map(index)
        read = {*weight_map.values(), INDEX}
        if _exists(weights) and WEIGHTS not in read:
            raise CheckpointError(
                f"{folder}: holds both {WEIGHTS} and {INDEX}, which names other files; remove the outdated one"
            )
        found = _read_shards(folder, weight_map)
    others = {path.name for pattern in ("*.safetensors", "*.safetensors.index*.json") for path in folder.glob(pattern)}
    if ignored := sorted(others - read):
        report(f"{folder}: not read: {_shortened(ignored)}")
    return found


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index}: key 'weight_map' is not an object of tensor names to files")
    return weight_map


def _read_shards(folder: Path, weight_map: dict[str, str]) -> dict[str, TensorHeader]:
    index = folder / INDEX
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{index}: shard '{shard}' is not a file name in this folder")
    if missing := [shard for shard in shards if not _exists(folder / shard)]:
        raise CheckpointError(f"{index}: names {count(len(shards), 'shard')}, of which missing: {_shortened(missing)}")
    found: dict[str, TensorHeader] = {}
    for shard in shards:
        for name, stored in _read_header(folder / shard).items():
            if weight_map.get(name) != shard:
                expected = weight_map.get(name, "no shard")
                raise CheckpointError(f"{folder / shard}: holds tensor '{name}', which the index puts in {expected}")
            found[name] = stored
    for name, shard in weight_map.items():
        if name not in found:
            raise CheckpointError(f"{folder / shard}: tensor '{name}' is named in the index but missing here")
    return found


def _found_instead(folder: Path) -> str:
    """Return what a folder without readable weights holds: shards without an index, other names, pickles."""
    names = sorted(path.name for path in folder.iterdir())
    if shards := [name for name in names if name.endswith(".safetensors")]:
        is_sharded = any(_SHARD.match(name) for name in shards)
        remedy = "the index of its shards is missing" if is_sharded else "it has weights of another name"
        return f"; {remedy}: {_shortened(shards)}"
    if pickles := [name for name in names if name.endswith(_PICKLES)]:
        return f"; pickled weights are never read, convert them to safetensors: {_shortened(pickles)}"
    return ""


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _exists(path: Path) -> bool:
    """Return whether a directory entry exists, be it a link to nowhere."""
    return os.path.lexists(path)


def _dangling(path: Path) -> str:
    """Return the fault of a link to a missing file or to itself; empty for anything else."""
    if not path.is_symlink() or path.exists():
        return ""
    return f"is a link to {os.readlink(path)}, which cannot be followed or does not exist"


def _not_the_file(start: bytes) -> str:
    """Return the fault of a file that begins with ``start``, if it is empty or stands for the content elsewhere."""
    if not start:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; run 'git lfs pull' in its repository"
    return ""


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
    sizes = dict(tensors)
    all_names = list(sizes)
    shards = [all_names[batch] for batch in split_by_size(list(sizes.values()), max_shard_bytes)]
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: produce(name).cpu().contiguous() for name in names}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")


def _open_shard(shard: Path) -> Any:
    try:
        check_regular(shard)
        return safe_open(shard, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{shard}: {_shard_fault(shard, error)}") from error


def _shard_fault(shard: Path, error: Exception) -> str:
    """Return why a shard cannot be opened."""
    if fault := _dangling(shard):
        return fault
    try:
        check_regular(shard)
        with shard.open("rb") as file:
            start = file.read(_POINTER_BYTES)
            held, needed = os.fstat(file.fileno()).st_size, _needed_bytes(file, start)
    except OSError as reason:
        return str(reason.strerror)
    if fault := _not_the_file(start):
        return fault
    if start.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "is a pickle as torch.save writes them, which is never read; convert it to safetensors"
    if held < needed:
        return f"damaged: cut short, it holds {held:,} of {needed:,} bytes"
    return f"damaged or not a safetensors file ({error})"


def _needed_bytes(file: BinaryIO, start: bytes) -> int:
    """Return the size of a safetensors file by its header; 0 if that cannot be read."""
    size = int.from_bytes(start[:8], "little")
    if size > _MAX_HEADER_BYTES:
        return 0
    file.seek(8)
    try:
        entries = json.loads(file.read(size))
        return 8 + size + max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
    except MALFORMED:
        return 0


def _read_header(shard: Path) -> dict[str, TensorHeader]:
    with _open_shard(shard) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        return {name: TensorHeader(name, shard, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
