"""Saving a sequence's cache: a safetensors file with the packed rows of its entries and the rows of its rings."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.atomic_files import atomic_file
from model.cache import Cache
from model.errors import MALFORMED, CacheError
from model.regular_files import check_regular
from model.wording import count

FORMAT_VERSION = "1"


def save_cache(cache: Cache, path: str | Path) -> None:
    """Write the cache of one sequence to ``path``, atomically replacing an existing file.

    Raises CacheError if the cache has several sequences (:meth:`model.cache.Cache.split` separates them) or was damaged
    by an interrupted step.
    """
    if cache.batch_size != 1:
        raise CacheError(f"{path}: a file holds one sequence's cache, this one holds {cache.batch_size}")
    cache.check_room(1, 0)
    tensors = {name: rows.contiguous().cpu() for name, rows in _rows(cache).items()}
    metadata = {
        "format_version": FORMAT_VERSION,
        "model": json.dumps(cache.config.to_dict()),
        "length": str(cache.length),
        "rewind": str(cache.rewind),
        "written": str(cache.high_water_marks[0]),
    }
    metadata["sha256"] = _digest(metadata, tensors)
    try:
        with atomic_file(path) as scratch:
            save_file(tensors, scratch, metadata=metadata)
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path}: cannot be written ({error})") from error


def restore_cache(cache: Cache, path: str | Path) -> None:
    """Load a file of :func:`save_cache` into an empty cache of one sequence and equal model configuration.

    The file does not identify the weights that computed the entries; the caller must. Raises CacheError and leaves the
    cache empty if the configuration differs, the tokens do not fit or the file is damaged.
    """
    if cache.batch_size != 1 or cache.length:
        raise CacheError(f"{path}: only an empty cache of one sequence can be filled")
    metadata, tensors = _read(path)
    try:
        digest = metadata.pop("sha256")
        if metadata["format_version"] != FORMAT_VERSION:
            raise CacheError(f"{path}: format version {metadata['format_version']} is not {FORMAT_VERSION}")
        model = json.loads(metadata["model"])
        length, rewind, written = (int(metadata[key]) for key in ("length", "rewind", "written"))
        if not isinstance(model, dict) or not 0 <= length <= written:
            raise ValueError("inconsistent metadata")
    except MALFORMED as error:
        raise CacheError(f"{path}: not a saved cache ({error})") from error
    if _digest(metadata, tensors) != digest:
        raise CacheError(f"{path}: the checksum does not match: the file is damaged")
    ours = cache.config.to_dict()
    for key in {**ours, **model}:
        if ours.get(key) != model.get(key):
            raise CacheError(
                f"{path}: saved with another model configuration: {key} is {model.get(key)} there, {ours.get(key)} here"
            )
    if rewind != cache.rewind:
        raise CacheError(f"{path}: saved with a rewind of {count(rewind, 'token')}, the cache has {cache.rewind}")
    cache.begin(1, length)
    cache.advance()
    try:
        _load_parts(cache, tensors, path)
    except Exception:
        cache.truncate(0)
        raise
    cache.high_water_marks[0] = written


def _read(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        check_regular(Path(path))
    except FileNotFoundError:
        raise CacheError(f"{path}: no such file") from None
    except OSError as error:
        raise CacheError(f"{path}: {error.strerror}") from error
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CacheError(f"{path}: damaged or not a safetensors file ({error})") from error


def _rows(cache: Cache) -> dict[str, Tensor]:
    """Return the content of each part by name: rows of entries, written rows of rings, recurrent states."""
    return {
        f"layers.{layer}.{name}{suffix}": tensor
        for layer, parts in enumerate(cache.all_layers)
        for name, part in parts.parts.items()
        for suffix, tensor in part.saved().items()
    }


def _load_parts(cache: Cache, tensors: dict[str, Tensor], path: str | Path) -> None:
    expected = _rows(cache)
    for name in {**expected, **tensors}:
        if name not in tensors or name not in expected:
            raise CacheError(
                f"{path}: tensor '{name}' is {'missing' if name in expected else 'not part of this cache'}"
            )
        found, wanted = tensors[name], expected[name]
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            raise CacheError(
                f"{path}: tensor '{name}' is {found.dtype} {list(found.shape)}, "
                f"expected {wanted.dtype} {list(wanted.shape)}"
            )
    for layer, parts in enumerate(cache.all_layers):
        for name, part in parts.parts.items():
            full = f"layers.{layer}.{name}"
            part.load({suffix: tensors[full + suffix].to(cache.device) for suffix in part.saved()})


def _digest(metadata: dict[str, str], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
