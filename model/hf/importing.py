"""Reading of checkpoint folders of other tools."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import require_folder
from model.config import CACHE_FORMATS, ModelConfig
from model.errors import CheckpointError, ConfigError
from model.finite import is_finite
from model.hf import release_format
from model.hf.config_reader import ConfigReader
from model.hf.family import OWN_KEY, Family
from model.hf.registry import family_of_file
from model.hf.safetensors_folder import CONFIG, TensorHeader, iterate_tensors, list_tensors, read_json
from model.hf.tensor_check import Plan, TensorCheck
from model.hf.tensors import Layout, Source, WeightFormat, split_name
from model.transformer import Transformer


def import_pretrained(
    folder: str | Path,
    device: str | torch.device = "cpu",
    report: Callable[[str], None] = print,
    **overrides: Any,
) -> Transformer:
    """Return the network of a checkpoint folder of a known family, in float32 and eval mode.

    ``overrides`` replace fields of ModelConfig. Folders of :func:`export_pretrained` record the cache formats and
    ``qat``. For other folders they follow the weights: unquantized weights select ``fp32`` for every cache format and
    ``qat=False``; quantized weights select ModelConfig's default formats, and ``qat=True`` if the experts are FP4,
    whose rounding then changes nothing. A multi-token prediction module is built if the folder has its tensors
    (``mtp.*``, which transformers never saves), unless ``mtp_layers=0`` is given. Draft modules of another kind are
    left out. ``report`` receives a line about everything in the folder that is not read.

    Checks names, shapes and dtypes of all tensors before reading any. Reads one tensor at a time, so peak memory is
    close to the network's size. Raises CheckpointError naming the file, the key or tensor, and the expected value.
    """
    folder = require_folder(folder)
    r = ConfigReader(folder / CONFIG, read_json(folder / CONFIG))
    family = family_of_file(r)
    config = family.read_config(r, **overrides)
    found = list_tensors(folder, report)
    _check_experts(r, family, config, found)
    layout = family.detect_layout(found)
    stored = _by_canonical_name(folder, family, found)
    if config.tie_word_embeddings and (copy := stored.pop(family.head, None)) is not None:
        report(f"{folder}: not read: {copy.name}, because 'tie_word_embeddings' is true")
    drafts = {name: stored[name] for name in sorted(family.drafts(stored, config))}
    if "mtp_layers" not in overrides:
        modules = 0
        if drafts:
            modules = _fitting_modules(family, config, layout, drafts, lambda line: report(f"{folder}: {line}"))
        overrides = {**overrides, "mtp_layers": modules}
        config = config.replace(mtp_layers=modules)
    if not config.mtp_layers:
        stored = {name: header for name, header in stored.items() if name not in drafts}

    def plan_of(content: dict[str, Any], place: str) -> Plan:
        return _plan(family, family.read_config(ConfigReader(r.path, content), **overrides), layout, place)

    try:
        expected = _plan(family, config, layout)
    except ConfigError as error:
        raise r.error(str(error)) from error
    quantized = TensorCheck(folder, r.content, plan_of, expected, stored).run()
    if quantized and not r.has("quantization_config"):
        name = next(iter(quantized))
        raise r.error(f"key 'quantization_config' is missing, but tensor '{name}' is {stored[name].dtype}")
    if OWN_KEY not in r.content:
        policy: dict[str, Any] = {} if quantized else dict.fromkeys(CACHE_FORMATS, "fp32")
        policy["qat"] = "fp4" in quantized.values()
        config = config.replace(**{key: value for key, value in policy.items() if key not in overrides})
    model = Transformer.on_meta(config)
    model.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()
    _load_tensors(model, expected, quantized, stored)
    model.place_weights()
    return model.eval()


def read_pretrained_config(folder: str | Path) -> ModelConfig:
    """Return the configuration of a folder's ``config.json``. Raises CheckpointError."""
    path = require_folder(folder) / CONFIG
    r = ConfigReader(path, read_json(path))
    return family_of_file(r).read_config(r)


def is_pretrained(folder: str | Path) -> bool:
    """Return whether the folder's ``config.json`` has a model type, as in transformers and the release."""
    path = Path(folder) / CONFIG
    return path.is_file() and "model_type" in read_json(path)


def _check_experts(r: ConfigReader, family: Family, config: ModelConfig, found: dict[str, TensorHeader]) -> None:
    """Raise CheckpointError for more experts than the folder can hold, before anything is listed per expert."""
    stacked = [header.shape[0] for name, header in found.items() if ".experts." in name and header.shape]
    most = max([len(found), *stacked])
    if "moe" in config.block_ffn_kinds and config.num_experts > most:
        key = next(key for key, ours in family.fields.items() if ours == "num_experts")
        raise r.error(f"key '{key}' is {config.num_experts}, but the tensors of the folder hold at most {most} experts")


def _by_canonical_name(folder: Path, family: Family, found: dict[str, TensorHeader]) -> dict[str, TensorHeader]:
    stored: dict[str, TensorHeader] = {}
    for header in found.values():
        name = family.canonical_name(header.name)
        if name in stored:
            raise CheckpointError(
                f"{folder}: tensors '{stored[name].name}' and '{header.name}' are two names of one tensor"
            )
        stored[name] = header
    return stored


def _plan(family: Family, config: ModelConfig, layout: Layout, place: str | None = None) -> Plan:
    """Return the tensors of a network's checkpoint by canonical name; only those in ``place`` if given, the first part
    of :func:`model.hf.tensors.split_name`."""
    state = Transformer.on_meta(config).state_dict()
    shapes = {name: tensor.shape for name, tensor in state.items() if place in (None, split_name(name)[0])}
    return {family.canonical_name(name): source for name, source in family.sources(config, shapes, layout).items()}


def _fitting_modules(
    family: Family, config: ModelConfig, layout: Layout, drafts: dict[str, TensorHeader], report: Callable[[str], None]
) -> int:
    """Return 1 if the draft modules in the folder are one multi-token prediction module of this network, else 0.

    Tensors of another name make them another kind, as in releases for speculative decoding (DSpark).
    """
    known: set[str] = set()
    if family.has_prediction_module:
        module = config.replace(mtp_layers=1)
        known = family.drafts(_plan(family, module, layout), module)
        known |= {release_format.scale_name(name) for name in known}
    foreign = [header.name for name, header in drafts.items() if name not in known]
    if not foreign:
        return 1
    report(
        f"left out {len(drafts)} tensors of draft modules, which are not this network's multi-token prediction "
        f"module: it has no '{foreign[0]}'"
    )
    return 0


@torch.no_grad()
def _load_tensors(
    model: Transformer,
    expected: dict[str, Source],
    quantized: dict[str, WeightFormat],
    stored: dict[str, TensorHeader],
) -> None:
    """Read all scales, which the model keeps, then all weights."""
    weight_of = {release_format.scale_name(name): name for name in quantized}
    for name, header, tensor in _read({name: stored[name] for name in weight_of}):
        codes, weight = tensor.view(torch.uint8), weight_of[name]
        if (codes == 255).any():
            raise CheckpointError(f"{header.shard}: tensor '{name}' holds values that are not finite")
        release_format.keep_scales(model, expected[weight], quantized[weight], codes.to(model.embed.weight.device))
    for name, header, tensor in _read({name: stored[name] for name in expected}):
        source = expected[name]
        if name in quantized:
            scales = release_format.kept_scales(model, source, quantized[name])
            assert scales is not None
            tensor = release_format.decode(tensor, scales, quantized[name])
        _copy_into(model, source, tensor, header.shard)


def _read(stored: dict[str, TensorHeader]) -> Iterator[tuple[str, TensorHeader, Tensor]]:
    """Yield canonical name, header and content of each tensor, shard by shard."""
    names = {header.name: name for name, header in stored.items()}
    for real, tensor in iterate_tensors({header.name: header for header in stored.values()}):
        yield names[real], stored[names[real]], tensor


def _copy_into(model: Transformer, source: Source, tensor: Tensor, shard: Path) -> None:
    if source.format == "int64":
        experts = model.config.num_experts
        if tensor.min() < 0 or tensor.max() >= experts:
            raise CheckpointError(f"{shard}: tensor '{source.name}' names experts outside 0..{experts - 1}")
    elif not is_finite(tensor):
        raise CheckpointError(f"{shard}: tensor '{source.name}' holds values that are not finite")
    for part in source.parts:
        path, _, leaf = part.ours.rpartition(".")
        target = getattr(model.get_submodule(path), leaf)
        if part.expert is not None:
            target = target[part.expert]
        if part.our_rows is not None:
            target = target[part.our_rows[0] : part.our_rows[1]]
        rows = tensor if part.rows is None else tensor[..., part.rows[0] : part.rows[1], :]
        target.copy_(rows.reshape(target.shape))
