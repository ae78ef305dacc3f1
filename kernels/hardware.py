"""Queries of hardware features."""

from __future__ import annotations

import os

import torch

# Instruction sets, as oneDNN names them, that lack the instructions.
_WITHOUT_BF16 = {"sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni"}
_WITHOUT_AMX = {*_WITHOUT_BF16, "avx512_core_bf16", "avx512_core_fp16", "avx10_1_512", "avx10_2_512"}


def has_amx() -> bool:
    """Return whether oneDNN may use AMX, Intel's matrix units: several times as fast as vector units for BF16."""
    return torch.cpu._is_amx_tile_supported() and _onednn_limit() not in _WITHOUT_AMX


def multiplies_bf16_fast(device: torch.device | str) -> bool:
    """Return whether ``device`` multiplies BF16 matrices faster than float32 ones.

    A CPU needs oneDNN and AVX512-BF16 (all processors with AMX have it). Otherwise BF16 is emulated: at 0.4 times the
    speed of float32 with AVX512, at 0.02 times with AVX2. The answer depends on hardware flags and not on a
    measurement, so that it is reproducible. ARM processors count as slow because none was measured.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return torch.cpu._is_avx512_bf16_supported() and _onednn_limit() not in _WITHOUT_BF16


def _onednn_limit() -> str:
    """Return the newest instruction set that oneDNN may use, from its own environment variables; empty if unlimited."""
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").lower()
