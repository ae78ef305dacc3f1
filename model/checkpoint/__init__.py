"""Checkpoints: a folder of safetensors and JSON files, replaced atomically. Nothing is pickled.

``model.safetensors`` holds every parameter and persistent buffer under its own name, ``config.json`` the
:class:`ModelConfig` and the format version, ``tokenizer.json`` the tokenizer, if given. Sharded training writes one
safetensors file per rank instead (:mod:`model.checkpoint.rank_shards`) and describes them in ``config.json``; readers
accept both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.atomic_files import atomic_folder
from model.checkpoint.rank_shards import RankShard, RowLookup, ShardSet, read_shapes, read_shards
from model.config import ModelConfig
from model.distributed.dtensor import local_ranges
from model.distributed.fsdp import local_state, set_local_state
from model.errors import MALFORMED, CheckpointError, ConfigError, unknown_key
from model.finite import is_finite
from model.regular_files import check_regular
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from model.wording import quote_json

FORMAT_VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"
_CONFIG_KEYS = ("format_version", "model", "shards", "parts")
"""Keys of ``config.json``. Earlier releases wrote ``parts`` for ``shards``."""


def save(model: Transformer, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write a checkpoint to ``folder``, atomically replacing a checkpoint that exists there. Raises CheckpointError if
    ``folder`` holds anything else."""
    check_replaceable(folder)
    with atomic_folder(folder) as scratch:
        write(model.state_dict(), model.config, scratch, tokenizer)


def check_replaceable(folder: str | Path) -> None:
    """Raise CheckpointError if ``folder`` holds files and is not a checkpoint."""
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists and is not a checkpoint folder, so it is not replaced")


def write(
    state: Mapping[str, Tensor], config: ModelConfig, folder: str | Path, tokenizer: Tokenizer | None = None
) -> None:
    """Write the files of a checkpoint into an existing folder, without replacing it atomically. ``state`` is the
    network's ``state_dict``."""
    folder = Path(folder)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _write_config(folder, config, tokenizer)


def write_shard(
    state: Mapping[str, Tensor],
    find_rows: RowLookup,
    shard: RankShard,
    config: ModelConfig,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
) -> None:
    """Write one rank's file of a sharded checkpoint and, on rank 0, ``config.json`` and the tokenizer.

    The checkpoint is complete once every rank has written. ``state`` is the network's
    :func:`model.distributed.fsdp.local_state`, contiguous and on the CPU.
    """
    folder = Path(folder)
    shard.write(folder / WEIGHTS, state, find_rows)
    if shard.rank == 0:
        _write_config(folder, config, tokenizer, shard.shards)


def _write_config(
    folder: Path, config: ModelConfig, tokenizer: Tokenizer | None, shards: ShardSet | None = None
) -> None:
    content: dict[str, Any] = {"format_version": FORMAT_VERSION, "model": config.to_dict()}
    if shards is not None:
        content["shards"] = {"count": shards.count, "save_id": shards.save_id}
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(folder)


def load_config(folder: str | Path) -> ModelConfig:
    """Return the configuration of a checkpoint folder. Raises CheckpointError."""
    return _read_config(Path(folder))[0]


def require_folder(folder: str | Path) -> Path:
    """Return the path of an existing checkpoint folder. Raises CheckpointError."""
    folder = Path(folder)
    if not folder.is_dir():
        wrong = f"is not a folder, expected the checkpoint folder that holds {CONFIG}"
        raise CheckpointError(f"{folder}: {wrong if os.path.lexists(folder) else 'no such checkpoint folder'}")
    return folder


def _read_config(folder: Path) -> tuple[ModelConfig, ShardSet | None]:
    """Return the configuration of a checkpoint folder, and its rank shards if it has any."""
    path = require_folder(folder) / CONFIG
    try:
        check_regular(path)
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and "model_type" in content:
            raise CheckpointError(
                f"{folder}: a checkpoint of model_type '{content['model_type']}' in another format; convert it with "
                "the export step and --format fiftyfold"
            )
        if isinstance(content, dict) and "format_version" not in content:
            raise CheckpointError(
                f"{path}: has neither 'format_version', as here, nor 'model_type', as in transformers"
            )
        version, values = content["format_version"], content["model"]
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except MALFORMED as error:
        raise CheckpointError(f"{path}: not a checkpoint configuration ({error})") from error
    if type(version) is not int or version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {quote_json(version)} is not the supported {FORMAT_VERSION}")
    for key in content:
        if key not in _CONFIG_KEYS:
            raise CheckpointError(f"{path}: {unknown_key(key, key, _CONFIG_KEYS)}")
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: 'model': expected an object, found {quote_json(values)}")
    shards = _read_shard_set(path, content)
    try:
        return ModelConfig.from_dict(values), shards
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _read_shard_set(path: Path, content: dict[str, Any]) -> ShardSet | None:
    # Earlier releases wrote 'writing' for 'save_id', too, and files without 'rank-' in their names.
    legacy = "shards" not in content
    key, id_key = ("parts", "writing") if legacy else ("shards", "save_id")
    values = content.get(key)
    if values is None:
        return None
    count, save_id = (values.get("count"), values.get(id_key)) if isinstance(values, dict) else (None, None)
    if type(count) is not int or not isinstance(save_id, str):
        raise CheckpointError(f"{path}: '{key}' is not an object of 'count' and '{id_key}'")
    for name in values:
        if name not in ("count", id_key):
            raise CheckpointError(f"{path}: {unknown_key(f'{key}.{name}', name, ('count', id_key))}")
    if count < 1:
        raise CheckpointError(f"{path}: '{key}.count' is {count}, expected at least 1")
    return ShardSet(count, save_id, legacy)


def load(folder: str | Path, device: str | torch.device = "cpu") -> Transformer:
    """Return the model of a checkpoint folder, in eval mode. Raises CheckpointError naming the file or tensor.

    The shapes of all tensors are compared with the configuration before the network takes memory.
    """
    config, shards = _read_config(Path(folder))
    path = Path(folder) / WEIGHTS
    try:
        expected = Transformer.on_meta(config).state_dict()
    except ConfigError as error:
        raise CheckpointError(f"{path.with_name(CONFIG)}: {error}") from error
    _check_shapes(path, expected, read_shapes(path, shards))
    model = Transformer(config)
    load_weights(model, folder)
    model = model.to(device).eval()
    model.place_weights()
    return model


def load_weights(model: Transformer, folder: str | Path) -> None:
    """Load the weights of a checkpoint folder into ``model``. A sharded model reads this rank's rows; the number of
    ranks may differ from the checkpoint's. Raises CheckpointError and leaves the model unchanged if a tensor does not
    fit."""
    found = read_tensors(folder, WEIGHTS, local_ranges(model.state_dict().items()).get)
    _load_state(model, Path(folder) / WEIGHTS, found)


def _check_shapes(path: Path, expected: Mapping[str, Tensor], found: Mapping[str, Sequence[int]]) -> None:
    """Raise CheckpointError unless ``found``, shapes by name, are those of the ``expected`` tensors."""
    for name, tensor in expected.items():
        if name not in found:
            raise CheckpointError(f"{path}: tensor '{name}' is missing")
        if list(found[name]) != list(tensor.shape):
            raise CheckpointError(
                f"{path}: tensor '{name}' has shape {list(found[name])}, expected {list(tensor.shape)}"
            )
    for name in found:
        if name not in expected:
            raise CheckpointError(f"{path}: tensor '{name}' is not part of this model")


def _load_state(model: Transformer, path: Path, found: dict[str, Tensor]) -> None:
    expected = local_state(model)
    _check_shapes(path, expected, {name: tensor.shape for name, tensor in found.items()})
    for name, tensor in expected.items():
        if found[name].dtype != tensor.dtype:
            raise CheckpointError(f"{path}: tensor '{name}' is {found[name].dtype}, expected {tensor.dtype}")
        if not is_finite(found[name]):
            raise CheckpointError(f"{path}: tensor '{name}' holds values that are not finite")
        experts = model.config.num_experts
        if name.endswith("tid2eid") and not 0 <= found[name].min() <= found[name].max() < experts:
            raise CheckpointError(f"{path}: tensor '{name}' names experts outside 0..{experts - 1}")
    set_local_state(model, found)


def warm_start(model: Transformer, folder: str | Path) -> list[str]:
    """Load the weights of a network that may have other compression ratios and no multi-token prediction module.

    Return the names of tensors that keep their initial values: position biases (zeros) of layers with another ratio,
    and tensors of a module that the checkpoint lacks. Raises CheckpointError if any other tensor does not fit.
    """
    found, expected = read_tensors(folder, WEIGHTS), model.state_dict()
    if not model.config.mtp_layers:
        found = {name: tensor for name, tensor in found.items() if not name.startswith("mtp.")}
    fresh = [
        name
        for name, tensor in expected.items()
        if (name.startswith("mtp.") and name not in found)
        or (name.endswith(".ape") and name in found and found[name].shape != tensor.shape)
    ]
    _load_state(model, Path(folder) / WEIGHTS, {**found, **{name: expected[name] for name in fresh}})
    return fresh


def read_tensors(folder: str | Path, file: str, find_rows: RowLookup = lambda name: None) -> dict[str, Tensor]:
    """Return the tensors of a safetensors ``file`` in a checkpoint folder, sharded by rank or not. ``find_rows`` limits
    tensors to a row range. Raises CheckpointError if a file is missing or damaged."""
    _, shards = _read_config(Path(folder))
    return read_shards(Path(folder) / file, shards, find_rows)


def weight_files(folder: str | Path) -> list[Path]:
    """Return the files with a checkpoint's weights. Raises CheckpointError."""
    path = Path(folder) / WEIGHTS
    _, shards = _read_config(path.parent)
    return [path] if shards is None else list(shards.files(path))
