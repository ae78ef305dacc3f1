"""Checkpoints: a folder of safetensors and JSON. Nothing is pickled, nothing half-written is ever visible.

``model.safetensors`` holds every parameter and persistent buffer under its own name, ``config.json`` the
:class:`ModelConfig` and the format version, ``tokenizer.json`` the tokenizer where one was given. A sharded training
writes the tensors in parts (:mod:`model.checkpoint.rank_shards`), which ``config.json`` counts; such a folder is read
like any other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.atomic_files import atomic_folder
from model.checkpoint.rank_shards import Part, Parts, SpanOf, read
from model.config import ModelConfig
from model.distributed.dtensor import local_ranges
from model.distributed.fsdp import local_state, set_local_state
from model.errors import CheckpointError, ConfigError
from model.tokenizer import Tokenizer
from model.transformer import Transformer

FORMAT_VERSION = 1
WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save(model: Transformer, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:
    """Write ``folder``, replacing the checkpoint that is there once the new one is complete. Raises CheckpointError
    when what is there is something else."""
    check_replaceable(folder)
    with atomic_folder(folder) as scratch:
        write(model.state_dict(), model.config, scratch, tokenizer)


def check_replaceable(folder: str | Path) -> None:
    """Raise CheckpointError when ``folder`` holds files and is not a checkpoint."""
    folder = Path(folder)
    if folder.exists() and not (folder / CONFIG).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(f"{folder}: exists and is not a checkpoint folder, so it is not replaced")


def write(
    state: Mapping[str, Tensor], config: ModelConfig, folder: str | Path, tokenizer: Tokenizer | None = None
) -> None:
    """Write the checkpoint's files into an existing folder, for callers that make the folder appear themselves.
    ``state`` is the network's ``state_dict``."""
    folder = Path(folder)
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _write_config(folder, config, tokenizer)


def write_part(
    state: Mapping[str, Tensor],
    span_of: SpanOf,
    part: Part,
    config: ModelConfig,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
) -> None:
    """One rank's share of the same; the folder is a checkpoint once every rank's share is there. ``state`` is
    :func:`model.distributed.local_state` in contiguous memory of the CPU."""
    folder = Path(folder)
    part.write(folder / WEIGHTS, state, span_of)
    if part.number == 0:
        _write_config(folder, config, tokenizer, part.parts)


def _write_config(folder: Path, config: ModelConfig, tokenizer: Tokenizer | None, parts: Parts | None = None) -> None:
    content = {"format_version": FORMAT_VERSION, "model": config.to_dict()}
    if parts is not None:
        content["parts"] = asdict(parts)
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(folder)


def load_config(folder: str | Path) -> ModelConfig:
    """The configuration of a checkpoint folder. Raises CheckpointError."""
    return _read_config(Path(folder))[0]


def _read_config(folder: Path) -> tuple[ModelConfig, Parts | None]:
    """The configuration, and the parts that the folder's tensors are in."""
    path = folder / CONFIG
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and "model_type" in content:
            raise CheckpointError(
                f"{folder}: a checkpoint of model_type '{content['model_type']}', not of ours; the export step with "
                "--format fiftyfold carries it over"
            )
        version, values = content["format_version"], content["model"]
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a checkpoint configuration ({error})") from error
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format version {version!r} is not the supported {FORMAT_VERSION}")
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: 'model' is not a mapping")
    parts = content.get("parts")
    if parts is not None:
        try:
            parts = Parts(int(parts["count"]), str(parts["writing"]))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: 'parts' is not a count and a writing") from error
    try:
        return ModelConfig.from_dict(values), parts
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def load(folder: str | Path, device: str | torch.device = "cpu") -> Transformer:
    """The model of a checkpoint folder, in eval mode. Raises CheckpointError naming the file or tensor."""
    config = load_config(folder)
    model = Transformer(config)
    load_weights(model, folder)
    model = model.to(device).eval()
    model.place_weights()
    return model


def load_weights(model: Transformer, folder: str | Path) -> None:
    """Fill ``model`` from a checkpoint folder; it is untouched when anything does not fit. Of a sharded network, on
    any number of ranks, this rank's rows are read. Raises CheckpointError."""
    found = read_tensors(folder, WEIGHTS, local_ranges(model.state_dict().items()).get)
    _fill(model, Path(folder) / WEIGHTS, found)


def _fill(model: Transformer, path: Path, found: dict[str, Tensor]) -> None:
    expected = local_state(model)
    for name, tensor in expected.items():
        if name not in found:
            raise CheckpointError(f"{path}: tensor '{name}' is missing")
        if found[name].shape != tensor.shape:
            raise CheckpointError(
                f"{path}: tensor '{name}' has shape {list(found[name].shape)}, expected {list(tensor.shape)}"
            )
        if found[name].dtype != tensor.dtype:
            raise CheckpointError(f"{path}: tensor '{name}' is {found[name].dtype}, expected {tensor.dtype}")
        if not found[name].isfinite().all():
            raise CheckpointError(f"{path}: tensor '{name}' holds values that are not finite")
        experts = model.config.num_experts
        if name.endswith("tid2eid") and not 0 <= found[name].min() <= found[name].max() < experts:
            raise CheckpointError(f"{path}: tensor '{name}' names experts outside 0..{experts - 1}")
    for name in found:
        if name not in expected:
            raise CheckpointError(f"{path}: tensor '{name}' is not part of this model")
    set_local_state(model, found)


def warm_start(model: Transformer, folder: str | Path) -> list[str]:
    """Fill ``model`` from the checkpoint of a network that may differ in its compression ratios and in having a
    multi-token prediction module.

    Returns the names of the tensors that stay as drawn: position biases (zeros) whose ratio changed, and those of a
    module that the checkpoint does not have. Every other tensor must fit; raises CheckpointError.
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
    _fill(model, Path(folder) / WEIGHTS, {**found, **{name: expected[name] for name in fresh}})
    return fresh


def read_tensors(folder: str | Path, file: str, span_of: SpanOf = lambda name: None) -> dict[str, Tensor]:
    """The tensors of a safetensors ``file`` of a checkpoint folder, which may be there in parts; of those with a span
    these rows only. Raises CheckpointError when a file is missing or damaged."""
    _, parts = _read_config(Path(folder))
    return read(Path(folder) / file, parts, span_of)


def weight_files(folder: str | Path) -> list[Path]:
    """The files of a checkpoint's weights. Raises CheckpointError."""
    path = Path(folder) / WEIGHTS
    _, parts = _read_config(path.parent)
    return [path] if parts is None else parts.files(path)
