import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import kernels
from benchmarks.lib.kernel_case import TINY, Case
from benchmarks.lib.kernel_cases import cases
from model.errors import FiftyfoldError

ROOT = Path(__file__).parents[2]


def case(found, exact):
    return Case("some kernel", lambda: found, lambda: None, lambda: exact)


def test_errors_are_relative_and_nan_is_infinite():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert kernels.error_of(case(torch.tensor([3.0, 4.5]), exact)) == pytest.approx(0.1)
    assert kernels.error_of(case(torch.tensor([3.0, math.nan]), exact)) == math.inf
    infinite = torch.tensor([-math.inf, 1.0])
    assert kernels.error_of(case(infinite, infinite.double())) == 0
    assert kernels.error_of(case(infinite, infinite.double().clamp(min=0))) == math.inf
    with pytest.raises(FiftyfoldError, match=r"some kernel: found shape \[1\], expected \[2\]"):
        kernels.error_of(case(torch.zeros(1), exact))


def test_uninitialized_memory_is_poisoned():
    x = torch.zeros(3)
    with kernels.poisoned():
        assert torch.empty(2).isnan().all() and torch.empty_like(x).isnan().all() and x.new_empty(2).isnan().all()
        assert torch.empty(2, dtype=torch.uint8).tolist() == [255, 255]


def test_a_gpu_is_required_without_a_rehearsal(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FiftyfoldError, match="torch finds no GPU on this machine; --rehearse runs without one"):
        kernels.main([])


def test_the_checked_sizes_bound_memory():
    small = TINY.checked()
    assert small.share == 1 and small.tokens == TINY.tokens


def test_every_case_names_its_work_and_target():
    for one in cases(TINY, torch.device("cpu"), torch.float32):
        assert (one.flops > 0) != (one.nbytes > 0) and one.target, one.name


def test_the_rehearsal_runs_every_case():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "benchmarks.kernels", "--rehearse"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ})
    assert found.returncode == 0, found.stderr[-3000:]
    for one in cases(TINY, torch.device("cpu"), torch.float32):
        assert f"| {one.name} |" in found.stdout
