"""DeepSeek's released weight formats: FP8 E4M3 in 128 x 128 tiles and FP4 E2M1 in groups of 32, with E8M0 scales.

Values do not determine their scale: if the largest value of a tile is half the largest code, two scales are exact. To
write unchanged weights bit for bit, modules keep the scales they were read with in non-persistent buffers, one byte per
tile or group. A tile that training has changed gets the smallest scale that fits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kernels import formats
from model.errors import CheckpointError
from model.hf.safetensors_folder import TensorHeader
from model.hf.tensors import Source, TensorSlice, WeightFormat

STORED = {
    "fp8": torch.float8_e4m3fn,
    "fp4": torch.int8,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "int64": torch.int64,
}
_FLOATS = ("F32", "BF16", "F16")


def scale_name(weight: str) -> str:
    return weight.removesuffix(".weight") + ".scale"


def format_of(source: Source, stored: TensorHeader) -> WeightFormat | None:
    """Return the format of a quantized tensor on disk, or None if it is not quantized. Raises CheckpointError for an
    unexpected dtype."""
    if source.format == "int64":
        allowed: dict[str, WeightFormat | None] = {"I64": None, "I32": None}
    else:
        allowed = dict.fromkeys(_FLOATS)
        if source.format in ("fp8", "fp4"):
            allowed["F8_E4M3"] = "fp8"
        if source.format == "fp4":
            allowed["I8"] = allowed["U8"] = "fp4"
    if stored.dtype not in allowed:
        raise CheckpointError(
            f"{stored.shard}: tensor '{source.name}' is {stored.dtype}, expected {', '.join(sorted(allowed))}"
        )
    return allowed[stored.dtype]


def weight_shape(source: Source, fmt: WeightFormat | None) -> tuple[int, ...]:
    """Return the shape on disk. FP4 packs two values per byte along the last dim."""
    return (*source.shape[:-1], source.shape[-1] // 2) if fmt == "fp4" else source.shape


def scale_shape(source: Source, fmt: WeightFormat) -> tuple[int, int]:
    rows, columns = source.shape
    if fmt == "fp4":
        return rows, columns // formats.FP4_BLOCK
    return -(-rows // formats.FP8_TILE), -(-columns // formats.FP8_TILE)


def nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def keep_scales(model: nn.Module, source: Source, fmt: WeightFormat, scales: Tensor) -> None:
    """Keep the scales, uint8, that the weight ``source`` was read with."""
    module, name, (part,) = *_buffer(model, source, fmt), source.parts
    if part.expert is None:
        module.register_buffer(name, scales.clone(), persistent=False)
        return
    if not hasattr(module, name):
        experts = model.get_parameter(part.ours).shape[0]
        module.register_buffer(name, scales.new_zeros(experts, *scales.shape), persistent=False)
    getattr(module, name)[part.expert] = scales


def kept_scales(model: nn.Module, source: Source, fmt: WeightFormat) -> Tensor | None:
    """Return the scales of :func:`keep_scales` on the CPU, or None if the weight was not read quantized."""
    module, name = _buffer(model, source, fmt)
    scales = getattr(module, name, None)
    part = source.parts[0]
    if scales is None:
        return None
    return (scales if part.expert is None else scales[part.expert]).cpu()


def decode(weight: Tensor, scales: Tensor, fmt: WeightFormat) -> Tensor:
    """Return the float32 values of a stored weight."""
    if fmt == "fp8":
        return formats.dequantize_fp8_tiles(weight, scales)
    return formats.dequantize_fp4_groups(weight.view(torch.uint8), scales)


def encode(model: nn.Module, source: Source, values: Tensor, fmt: WeightFormat) -> tuple[Tensor, Tensor]:
    """Quantize float32 values [out, in]. Return the stored weight and its scales, float8_e8m0fnu."""
    kept = kept_scales(model, source, fmt)
    if fmt == "fp4":
        weight, scales = formats.quantize_fp4_groups(values, kept)
        weight = weight.view(torch.int8)
    else:
        weight, scales = formats.quantize_fp8_tiles(values, kept)
    return weight, scales.view(torch.float8_e8m0fnu)


def encode_fp4_as_fp8(model: nn.Module, source: Source, values: Tensor) -> tuple[Tensor, Tensor]:
    """Encode FP4 values as FP8 without loss. Raises CheckpointError if FP8 cannot represent them."""
    packed, scales = formats.quantize_fp4_groups(values, kept_scales(model, source, "fp4"))
    try:
        weight, tile_scales = formats.fp4_groups_to_fp8_tiles(packed, scales)
    except ValueError as error:
        raise CheckpointError(f"tensor '{source.name}' cannot be written as FP8 without loss: {error}") from error
    return weight, tile_scales.view(torch.float8_e8m0fnu)


def _buffer(model: nn.Module, source: Source, fmt: WeightFormat) -> tuple[nn.Module, str]:
    part: TensorSlice = source.parts[0]
    path, _, leaf = part.ours.rpartition(".")
    return model.get_submodule(path), f"{leaf}_{fmt}_scale"
