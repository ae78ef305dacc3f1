"""DeepSeek-V4 checkpoints in the formats of Hugging Face transformers and of DeepSeek's release.

:func:`import_pretrained` reads three kinds of tensor names: those of transformers' modules, those that transformers
saves by default, and the released ones (with FP8 and FP4 weights and their scales). :func:`export_pretrained` writes
the first and the last. Nothing in a folder is executed or unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from model.atomic_files import atomic_folder
from model.checkpoint import check_replaceable
from model.config import CACHE_FORMATS
from model.errors import CheckpointError, ConfigError
from model.hf import release_format
from model.hf.config import OWN_KEY, ExpertFormat, check_expressible, read_config, write_config
from model.hf.names import Layout, Source, WeightFormat, canonical_name, detect_layout, sources
from model.hf.safetensors_folder import TensorHeader, iterate_tensors, list_tensors, read_json, write_shards
from model.precision import Precision
from model.tokenizer import Tokenizer
from model.tokenizer.side_files import CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG
from model.transformer import Transformer

_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}


def import_pretrained(folder: str | Path, device: str | torch.device = "cpu", **overrides: Any) -> Transformer:
    """Return the network of a DeepSeek-V4 checkpoint folder, in float32 and eval mode.

    ``overrides`` replace fields of ModelConfig. Folders of :func:`export_pretrained` record the cache formats and
    ``qat``. For other folders they follow the weights: unquantized weights select ``fp32`` for every cache format and
    ``qat=False``; quantized weights select ModelConfig's default formats, and ``qat=True`` if the experts are FP4,
    whose rounding then changes nothing. A multi-token prediction module is built if the folder has its tensors
    (``mtp.*``, which transformers never saves), unless ``mtp_layers=0`` is given.

    Checks names, shapes and dtypes of all tensors before reading any. Reads one tensor at a time, so peak memory is
    close to the network's size. Raises CheckpointError naming the file, the key or tensor, and the expected value.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    content = read_json(folder / CONFIG)
    config = read_config(folder / CONFIG, content, **overrides)
    found = list_tensors(folder)
    layout = detect_layout(found)
    real_name: dict[str, str] = {}
    for real in found:
        name = canonical_name(real)
        if name in real_name:
            raise CheckpointError(f"{folder}: tensors '{real_name[name]}' and '{real}' are two names of one tensor")
        real_name[name] = real
    stored = {name: found[real] for name, real in real_name.items()}
    if "mtp_layers" in overrides and not config.mtp_layers:
        stored = {name: tensor for name, tensor in stored.items() if not name.startswith("mtp.")}
    elif "mtp_layers" not in overrides and not any(name.startswith("mtp.") for name in stored):
        config = config.replace(mtp_layers=0)

    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    expected = {canonical_name(name): source for name, source in sources(config, shapes, layout).items()}
    quantized = _check_tensors(folder, expected, stored, real_name)
    if quantized and content.get("quantization_config") is None:
        name = next(iter(quantized))
        raise CheckpointError(
            f"{folder / CONFIG}: key 'quantization_config' is missing, but tensor '{name}' is {stored[name].dtype}"
        )
    if OWN_KEY not in content:
        policy: dict[str, Any] = {} if quantized else dict.fromkeys(CACHE_FORMATS, "fp32")
        policy["qat"] = "fp4" in quantized.values()
        config = config.replace(**{key: value for key, value in policy.items() if key not in overrides})
    with torch.device("meta"):
        model = Transformer(config)
    model.to_empty(device=device)
    for buffer in model.buffers():
        buffer.zero_()
    _load_tensors(model, expected, quantized, {name: (real_name[name], stored[name]) for name in stored})
    model.place_weights()
    return model.eval()


def export_pretrained(
    model: Transformer,
    folder: str | Path,
    format: Layout = "transformers",
    tokenizer: Tokenizer | None = None,
    experts: ExpertFormat | None = None,
    max_shard_bytes: int = 5 << 30,
) -> None:
    """Write a DeepSeek-V4 checkpoint to ``folder``, atomically replacing a checkpoint that exists there.

    ``format`` is one of:

    * ``transformers``: float32 under the names of ``DeepseekV4ForCausalLM``'s modules. With ``qat``, routed experts are
      rounded to FP4, as in the forward pass. Tensors of ``mtp.*`` are included; transformers ignores them.
    * ``released``: DeepSeek's names and dtypes: FP8 for attention, shared experts and prediction projections, FP4 or
      FP8 for routed experts, FP32 for mixing weights, BF16 for all others. ``experts`` is the routed experts' format;
      by default the format they were read from, else FP4 with ``qat`` and FP8 without. Tensors that were read quantized
      and have not changed are written bit for bit.

    Chat templates, special tokens and generation settings that came with the tokenizer are written as well.

    Both record the cache formats and ``qat`` under the key ``fiftyfold`` for :func:`import_pretrained`. transformers
    ignores it and does not quantize its cache.

    Raises ConfigError if the format is unknown or cannot express the network, and CheckpointError if it cannot
    represent a value.
    """
    for name, value, known in (
        ("format", format, get_args(Layout)),
        ("experts", experts, (None, *get_args(ExpertFormat))),
    ):
        if value not in known:
            raise ConfigError(f"{name}: '{value}' is not one of {', '.join(filter(None, known))}")
    check_expressible(model.config, format)
    check_replaceable(folder)
    if experts is None:
        buffers = [name for name, _ in model.named_buffers()]
        read_as = [fmt for fmt in get_args(ExpertFormat) if any(name.endswith(f".w1_{fmt}_scale") for name in buffers)]
        experts = read_as[0] if read_as else "fp4" if model.config.qat else "fp8"
    writer, tensors = _writer(model, format, experts)
    with atomic_folder(folder) as scratch:
        write_shards(scratch, tensors.items(), writer.get_tensor, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(scratch)
            (scratch / TOKENIZER_CONFIG).write_text(json.dumps(tokenizer.tokenizer_config(), indent=2) + "\n")
        generation = _NO_TOKENS if tokenizer is None else tokenizer.generation_config()
        ids = {
            key: value for key, value in generation.items() if key in ("bos_token_id", "eos_token_id", "pad_token_id")
        }
        dtype = {"dtype": "float32"} if format == "transformers" else {}
        for file, content in (
            (CONFIG, write_config(model.config, format, experts, **ids, **dtype)),
            (GENERATION_CONFIG, generation),
        ):
            (scratch / file).write_text(json.dumps(content, indent=2) + "\n")


def is_pretrained(folder: str | Path) -> bool:
    """Return whether the folder's ``config.json`` has a model type, as in transformers and the release."""
    path = Path(folder) / CONFIG
    return path.is_file() and "model_type" in read_json(path)


def tensor_bytes(model: Transformer, format: Layout, experts: ExpertFormat = "fp4") -> dict[str, int]:
    """Return the size in bytes of every tensor that :func:`export_pretrained` would write. The model may be on the meta
    device."""
    return _writer(model, format, experts)[1]


def _check_tensors(
    folder: Path, expected: dict[str, Source], stored: dict[str, TensorHeader], real_name: dict[str, str]
) -> dict[str, WeightFormat]:
    """Return the formats of quantized tensors by name. Raises CheckpointError unless names, shapes and dtypes fit."""
    quantized: dict[str, WeightFormat] = {}
    scales: dict[str, tuple[str, tuple[int, int]]] = {}
    for name, source in expected.items():
        if name not in stored:
            raise CheckpointError(f"{folder}: tensor '{source.name}' is missing, expected shape {list(source.shape)}")
        fmt = release_format.format_of(source, stored[name])
        _check_shape(real_name[name], stored[name], release_format.weight_shape(source, fmt))
        if fmt is not None:
            quantized[name] = fmt
            scale = release_format.scale_name(real_name[name])
            scales[release_format.scale_name(name)] = scale, release_format.scale_shape(source, fmt)
    for name, (real, shape) in scales.items():
        if name not in stored:
            raise CheckpointError(f"{folder}: tensor '{real}' is missing, expected shape {list(shape)}")
        _check_shape(real, stored[name], shape)
        if stored[name].dtype != "F8_E8M0":
            raise CheckpointError(f"{stored[name].shard}: tensor '{real}' is {stored[name].dtype}, expected F8_E8M0")
    for name in stored:
        if name not in expected and name not in scales:
            raise CheckpointError(f"{stored[name].shard}: tensor '{real_name[name]}' is not part of this model")
    return quantized


def _check_shape(name: str, stored: TensorHeader, expected: tuple[int, ...]) -> None:
    if stored.shape != tuple(expected):
        raise CheckpointError(
            f"{stored.shard}: tensor '{name}' has shape {list(stored.shape)}, expected {list(expected)}"
        )


@torch.no_grad()
def _load_tensors(
    model: Transformer,
    expected: dict[str, Source],
    quantized: dict[str, WeightFormat],
    stored: dict[str, tuple[str, TensorHeader]],
) -> None:
    """Read all scales, which the model keeps, then all weights. ``stored`` maps our names to names on disk."""
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


def _read(stored: dict[str, tuple[str, TensorHeader]]) -> Iterator[tuple[str, TensorHeader, Tensor]]:
    """Yield our name, header and content of each tensor, shard by shard."""
    names = {real: name for name, (real, _) in stored.items()}
    for real, tensor in iterate_tensors(dict(stored.values())):
        yield names[real], stored[names[real]][1], tensor


def _copy_into(model: Transformer, source: Source, tensor: Tensor, shard: Path) -> None:
    if source.format == "int64":
        experts = model.config.num_experts
        if tensor.min() < 0 or tensor.max() >= experts:
            raise CheckpointError(f"{shard}: tensor '{source.name}' names experts outside 0..{experts - 1}")
    elif not _is_finite(tensor):
        raise CheckpointError(f"{shard}: tensor '{source.name}' holds values that are not finite")
    for part in source.parts:
        path, _, leaf = part.ours.rpartition(".")
        target = getattr(model.get_submodule(path), leaf)
        if part.expert is not None:
            target = target[part.expert]
        rows = tensor if part.rows is None else tensor[..., part.rows[0] : part.rows[1], :]
        target.copy_(rows.reshape(target.shape))


def _is_finite(tensor: Tensor) -> bool:
    """Check the extremes, which are NaN if any value is. ``isfinite`` would allocate several copies of the tensor."""
    return all(extreme.isfinite() for extreme in tensor.aminmax())


class _TransformersWriter:
    """Tensors in transformers' layout, in float32. ``plan`` maps the names to be written to their sources."""

    def __init__(self, model: Transformer, plan: dict[str, Source]):
        self.model, self.plan, self.state = model, plan, model.state_dict()

    def entries(self, source: Source) -> list[tuple[str, int]]:
        """Return name and size in bytes of the tensors written for a source."""
        dtype = torch.int64 if source.format == "int64" else torch.float32
        return [(source.name, release_format.nbytes(source.shape, dtype))]

    def get_tensor(self, name: str) -> Tensor:
        source = self.plan[name]
        values = self.values(source)
        return Precision(self.model.config).round_expert(values) if source.format == "fp4" else values

    def values(self, source: Source) -> Tensor:
        """Assemble a source's tensor from ours, on the CPU: float32, or int64 for expert tables."""
        found = []
        for part in source.parts:
            tensor = self.state[part.ours].detach()
            found.append((tensor if part.expert is None else tensor[part.expert]).cpu())
        tensor = found[0].reshape(source.shape) if len(found) == 1 else torch.cat(found, dim=-2)
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise CheckpointError(f"tensor '{source.name}' holds values that are not finite")
        return tensor if source.format == "int64" else tensor.float()


def _writer(model: Transformer, format: Layout, experts: ExpertFormat) -> tuple[_TransformersWriter, dict[str, int]]:
    plan = sources(model.config, {name: tensor.shape for name, tensor in model.state_dict().items()}, format)
    writer = _ReleasedWriter(model, plan, experts) if format == "released" else _TransformersWriter(model, plan)
    return writer, dict(entry for source in plan.values() for entry in writer.entries(source))


class _ReleasedWriter(_TransformersWriter):
    """Tensors in the released layout: quantized weights with scales, all others in the dtypes of the release."""

    def __init__(self, model: Transformer, plan: dict[str, Source], experts: ExpertFormat):
        super().__init__(model, plan)
        self.experts = experts
        self.encoded: dict[str, Tensor] = {}

    def stored_format(self, source: Source) -> WeightFormat:
        return self.experts if source.format == "fp4" else source.format

    def entries(self, source: Source) -> list[tuple[str, int]]:
        fmt = self.stored_format(source)
        shape = release_format.weight_shape(source, fmt)
        found = [(source.name, release_format.nbytes(shape, release_format.STORED[fmt]))]
        if fmt in ("fp8", "fp4"):
            size = release_format.nbytes(release_format.scale_shape(source, fmt), torch.float8_e8m0fnu)
            found.append((release_format.scale_name(source.name), size))
        return found

    def get_tensor(self, name: str) -> Tensor:
        if name in self.encoded:  # a scale, encoded with its weight
            return self.encoded.pop(name)
        source = self.plan[name]
        values, fmt = self.values(source), self.stored_format(source)
        if fmt not in ("fp8", "fp4"):
            return values.to(release_format.STORED[fmt])
        if source.format == "fp4" and fmt == "fp8" and self.model.config.qat:
            weight, scales = release_format.encode_fp4_as_fp8(self.model, source, values)
        else:
            weight, scales = release_format.encode(self.model, source, values, fmt)
        self.encoded[release_format.scale_name(name)] = scales
        return weight
