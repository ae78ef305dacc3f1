"""Fast products according to hardware flags and to a measurement."""

import platform
import time

import pytest
import torch

from kernels.hardware import has_amx, multiplies_bf16_fast

LIMITS = {
    "": (True, True), "ALL": (True, True), "AVX2": (False, False), "AVX512_CORE": (False, False),
    "AVX512_CORE_VNNI": (False, False), "avx512_core_vnni": (False, False), "AVX512_CORE_BF16": (True, False),
    "AVX10_1_512": (True, False), "AVX512_CORE_AMX": (True, True), "AVX10_1_512_AMX": (True, True),
}  # fmt: skip
"""(fast BF16, AMX) of a processor with both, under a limit of oneDNN."""


@pytest.fixture
def unlimited(monkeypatch):
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
@pytest.mark.parametrize("limit", LIMITS)
def test_limits_of_onednn_apply(variable, limit, unlimited):
    unlimited.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    unlimited.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    unlimited.setenv(variable, limit)
    assert (multiplies_bf16_fast("cpu"), has_amx()) == LIMITS[limit]


def test_missing_hardware_is_not_reported(unlimited):
    unlimited.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    unlimited.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not multiplies_bf16_fast("cpu") and not has_amx()


def test_bf16_is_slow_without_onednn(unlimited):
    unlimited.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    unlimited.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not multiplies_bf16_fast("cpu")


def test_a_gpu_that_emulates_bf16_is_not_fast(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not multiplies_bf16_fast("cuda")


def test_the_meta_device_has_an_answer():
    assert not multiplies_bf16_fast("meta")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other processors count as slow unmeasured")
def test_a_measurement_agrees():
    """Compare the shortest of many products, which other load does not affect."""
    matrices = {dtype: torch.randn(384, 384).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    seconds = dict.fromkeys(matrices, 1.0)
    for _ in range(50):
        for dtype, x in matrices.items():
            started = time.perf_counter()
            x @ x
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - started)
    assert multiplies_bf16_fast("cpu") == (seconds[torch.bfloat16] < seconds[torch.float32])
