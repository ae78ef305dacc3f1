"""Rounding to a storage format inside the forward pass, gradients passed straight through."""

from kernels.quantize.reference import FORMATS, fake_quantize, hadamard, round_to_format

__all__ = ["FORMATS", "fake_quantize", "hadamard", "round_to_format"]
