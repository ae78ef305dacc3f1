"""Writing of checkpoint folders for other tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from model.atomic_files import atomic_folder
from model.checkpoint import check_replaceable
from model.errors import CheckpointError, ConfigError
from model.finite import is_finite
from model.hf import release_format
from model.hf.family import ExpertFormat
from model.hf.registry import family_of_network
from model.hf.safetensors_folder import CONFIG, write_shards
from model.hf.tensors import Layout, Source, WeightFormat
from model.precision import Precision
from model.tokenizer import Tokenizer
from model.tokenizer.side_files import GENERATION_CONFIG, ID_KEYS, TOKENIZER_CONFIG
from model.transformer import Transformer

_PIECE = 1 << 22
"""Elements compared at a time."""
_NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}


def export_pretrained(
    model: Transformer,
    folder: str | Path,
    format: Layout = "transformers",
    tokenizer: Tokenizer | None = None,
    experts: ExpertFormat | None = None,
    max_shard_bytes: int = 5 << 30,
) -> dict[WeightFormat, float]:
    """Write a checkpoint to ``folder``, atomically replacing a checkpoint that exists there.

    Returns the formats that rounded weights, each with the largest absolute change of a weight.

    The mixers of the network decide its family (:mod:`model.hf.registry`). ``format`` is one of:

    * ``transformers``: float32 under names that transformers reads. With ``qat``, routed experts are rounded to FP4,
      as in the forward pass. Tensors of ``mtp.*`` are included; transformers ignores them.
    * ``released`` (DeepSeek-V4 only): DeepSeek's names and dtypes: FP8 for attention, shared experts and prediction
      projections, FP4 or FP8 for routed experts, FP32 for mixing weights, BF16 for all others. ``experts`` is the
      routed experts' format; by default the format they were read from, else FP4 with ``qat`` and FP8 without. Tensors
      that were read quantized and have not changed are written bit for bit.

    Chat templates, special tokens and generation settings that came with the tokenizer are written as well.

    Both formats record the cache formats and ``qat`` under the key ``fiftyfold`` for :func:`import_pretrained`.
    transformers ignores it and does not quantize its cache.

    Raises ConfigError if the format is unknown or cannot express the network, and CheckpointError if it cannot
    represent a value.
    """
    if experts not in (None, *get_args(ExpertFormat)):
        raise ConfigError(f"'{experts}' is not one of {', '.join(get_args(ExpertFormat))}", "experts")
    family = family_of_network(model.config)
    if format not in family.layouts:
        raise ConfigError(f"'{format}' is not one of {', '.join(family.layouts)}, which {family.title} has", "format")
    family.check_expressible(model.config, format)
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
        ids = {key: value for key, value in generation.items() if key in ID_KEYS}
        dtype = {"dtype": "float32"} if format == "transformers" else {}
        for file, content in (
            (CONFIG, family.write_config(model.config, format, experts) | ids | dtype),
            (GENERATION_CONFIG, generation),
        ):
            (scratch / file).write_text(json.dumps(content, indent=2) + "\n")
    return {fmt: change for fmt, change in writer.changes.items() if change > 0}


class _TransformersWriter:
    """Tensors in transformers' layout, in float32. ``plan`` maps the names to be written to their sources."""

    def __init__(self, model: Transformer, plan: dict[str, Source]):
        self.model, self.plan, self.state = model, plan, model.state_dict()
        self.changes: dict[WeightFormat, float] = {}
        """Largest absolute change of a weight so far by the format it was rounded to."""

    def entries(self, source: Source) -> list[tuple[str, int]]:
        """Return name and size in bytes of the tensors written for a source."""
        dtype = torch.int64 if source.format == "int64" else torch.float32
        return [(source.name, release_format.nbytes(source.shape, dtype))]

    def get_tensor(self, name: str) -> Tensor:
        source = self.plan[name]
        values = self.values(source)
        if source.format != "fp4":
            return values
        rounded = Precision(self.model.config).round_expert(values)
        self.record(source.format, values, rounded)
        return rounded

    def record(self, fmt: WeightFormat, values: Tensor, rounded: Tensor) -> None:
        """Add the difference of two contiguous tensors to :attr:`changes`."""
        pieces = (tensor.reshape(-1).split(_PIECE) for tensor in (values, rounded))
        changes = ((a - b.float()).abs().max().item() for a, b in zip(*pieces, strict=True))
        self.changes[fmt] = max(self.changes.get(fmt, 0.0), *changes)

    def values(self, source: Source) -> Tensor:
        """Assemble a source's tensor from ours, on the CPU: float32, or int64 for expert tables."""
        found = []
        for part in source.parts:
            tensor = self.state[part.ours].detach()
            tensor = tensor if part.expert is None else tensor[part.expert]
            found.append((tensor if part.our_rows is None else tensor[slice(*part.our_rows)]).cpu())
        tensor = found[0].reshape(source.shape) if len(found) == 1 else torch.cat(found, dim=-2)
        if not is_finite(tensor):
            raise CheckpointError(f"tensor '{source.name}' holds values that are not finite")
        return tensor if source.format == "int64" else tensor.float()


def _writer(model: Transformer, format: Layout, experts: ExpertFormat) -> tuple[_TransformersWriter, dict[str, int]]:
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    plan = family_of_network(model.config).sources(model.config, shapes, format)
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
            stored = values.to(release_format.STORED[fmt])
            if fmt == "bf16":
                if not is_finite(stored):
                    raise CheckpointError(f"tensor '{source.name}' holds values that are too large for BF16")
                self.record(fmt, values, stored)
            return stored
        if source.format == "fp4" and fmt == "fp8" and self.model.config.qat:
            weight, scales = release_format.encode_fp4_as_fp8(self.model, source, values)
        else:
            weight, scales = release_format.encode(self.model, source, values, fmt)
        self.record(fmt, values, release_format.decode(weight, scales.view(torch.uint8), fmt))
        self.encoded[release_format.scale_name(name)] = scales
        return weight
