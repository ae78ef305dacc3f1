"""The library of native operators: instruction sets, trust, compilation, and decoding without it."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from backend_testing import needs_native

from kernels import native
from kernels.native import build, levels

ROOT = Path(__file__).parents[2]


def run(code, **environment):
    settings = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True)


DECODE = """
import torch
from kernels import native
from model.cache import Cache
from model.config import ModelConfig
from model.transformer import Transformer
torch.manual_seed(0)
formats = {"kv_format": "fp32", "rope_format": "fp32", "index_format": "fp32", "qat": False}
model = Transformer(ModelConfig.from_preset("tiny", zero_init_output=False, **formats)).eval()
ids = torch.randint(0, 250, (1, 90))
whole = model(ids).detach()
cache = Cache(model.config, 1, 100)
with torch.inference_mode():
    pieces = [model(ids[:, :40], cache)] + [model(ids[:, i : i + 1], cache) for i in range(40, 90)]
assert (torch.cat(pieces, 1) - whole).abs().max() < 1e-4
print(native.level())
"""


@pytest.mark.parametrize(
    ("machine", "capability", "expected"),
    [
        ("x86_64", "AVX512", ["avx512", "avx2"]),
        ("AMD64", "AVX2", ["avx2"]),
        ("x86_64", "DEFAULT", []),
        ("aarch64", "DEFAULT", ["neon"]),
        ("arm64", "SVE256", ["neon"]),
        ("riscv64", "DEFAULT", []),
        ("ppc64le", "VSX", []),
    ],
)
def test_levels_of_processors(machine, capability, expected, monkeypatch):
    monkeypatch.setattr(levels.platform, "machine", lambda: machine)
    monkeypatch.setattr(levels.torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert levels.supported_levels() == expected
    assert set(expected) <= set(levels.FLAGS)


def test_an_unknown_processor_runs_without_native_operators_and_one_line_says_so(monkeypatch, caplog, capsys):
    monkeypatch.setattr(levels.platform, "machine", lambda: "riscv64")
    with caplog.at_level(logging.WARNING, logger="fiftyfold"):
        assert native.level.__wrapped__() is None
    (record,) = caplog.records
    assert "neither AVX2 nor NEON" in record.message and "PyTorch's operators run instead" in record.message
    assert build.main() == 0 and capsys.readouterr() == ("", "")


@needs_native
@pytest.mark.skipif("avx2" not in levels.supported_levels(), reason="no levels to choose from")
@pytest.mark.parametrize("name", ["avx2", "default"])
def test_lower_instruction_sets_decode_correctly(name):
    """PyTorch's limit applies. Without AVX2 PyTorch's operators run, and one line says so."""
    found = run(DECODE, ATEN_CPU_CAPABILITY=name)
    assert found.returncode == 0, found.stderr
    expected = {"avx2": "avx2", "default": "None"}[name]
    assert found.stdout.strip() == expected
    assert found.stderr.count("native CPU operators") == (expected == "None")


@pytest.mark.skipif(not levels.supported_levels(), reason="an unknown processor")
def test_without_a_library_one_line_says_so_and_results_are_correct(tmp_path):
    found = run(DECODE, XDG_CACHE_HOME=str(tmp_path))
    assert found.returncode == 0 and found.stdout.strip() == "None", found.stderr
    assert "not built for these sources" in found.stderr and "make native" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("fault", ["damaged", "no library", "no digest"])
def test_an_untrusted_library_is_not_loaded(fault, tmp_path, monkeypatch, caplog):
    path = tmp_path / "x.so"
    path.write_bytes(b"not a library")
    if fault != "no digest":
        path.with_name("x.so.sha256").write_text("0" * 64)
    if fault == "no library":
        monkeypatch.setattr(native.hashlib, "sha256", lambda data: type("", (), {"hexdigest": lambda self: "0" * 64})())
    monkeypatch.setattr(native, "supported_levels", lambda: ["some"])
    monkeypatch.setattr(native, "library_path", lambda level: path)
    with caplog.at_level(logging.WARNING, logger="fiftyfold"):
        assert native.level.__wrapped__() is None
    (record,) = caplog.records
    assert {"damaged": "is damaged"}.get(fault, "cannot be loaded") in record.message


def test_a_missing_or_failing_compiler(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "supported_levels", lambda: ["avx2"])
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.main() == 0
    assert "no C++ compiler found" in (message := capsys.readouterr().err) and "make native" in message
    monkeypatch.setenv("CXX", "false")
    assert build.main() == 0
    assert "false exited with status 1" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.so"))
