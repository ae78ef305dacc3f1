"""Products that the processor computes fast."""

from __future__ import annotations

import os

import torch

_WITHOUT_BF16 = {"sse41", "avx", "avx2", "avx2_vnni", "avx2_vnni_2", "avx512_core", "avx512_core_vnni"}
_WITHOUT_AMX = {*_WITHOUT_BF16, "avx512_core_bf16", "avx512_core_fp16", "avx10_1_512", "avx10_2_512"}
"""oneDNN's names of instruction sets that lack the instructions."""


def has_amx() -> bool:
    """Return whether oneDNN may use AMX, Intel's matrix units for BF16, with several times the speed of vectors."""
    return torch.cpu._is_amx_tile_supported() and _onednn_limit() not in _WITHOUT_AMX


def multiplies_bf16_fast(device: torch.device | str) -> bool:
    """Return whether ``device`` multiplies BF16 matrices faster than float32 ones.

    On a CPU this takes AVX512-BF16 (or AMX, which no processor has without it) and oneDNN. Elsewhere BF16 is emulated:
    at 0.4 times float32's speed with AVX512, at 0.02 times with AVX2. The flags of the hardware decide, and not a
    clock, so that the answer is always the same. ARM processors count as slow, because none was measured.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return torch.cpu._is_avx512_bf16_supported() and _onednn_limit() not in _WITHOUT_BF16


def _onednn_limit() -> str:
    """Newest instruction set that oneDNN may use, from the variables that it reads itself; empty without a limit."""
    return (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").lower()
