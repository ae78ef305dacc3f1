"""Triton backends on a machine without a GPU, and the stored choices of settings."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import expert_dispatch, gated_delta_rule, sparse_attention, ssd_scan
from kernels.sparse_attention import triton as attention
from kernels.triton_support import platform, tiles
from kernels.triton_support.tiles import Tile, TileCache

ROOT = Path(__file__).parents[3]
BLOCK = """
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "triton" else find(name, *more)
"""


def run(code):
    settings = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", BLOCK + code], env=settings, capture_output=True, text=True)


def test_operations_import_and_run_without_triton():
    found = run("""
import torch
import model.transformer
from kernels.sparse_attention import sparse_attention
query = torch.zeros(1, 2, 1, 32)
sparse_attention(query, query[:, :, 0], None, None, torch.zeros(1), 2)
try:
    sparse_attention(query, query[:, :, 0], None, None, torch.zeros(1), 2, backend="triton")
except ValueError as error:
    print(error)
""")
    assert found.returncode == 0, found.stderr
    assert found.stdout == "sparse_attention: the triton backend requires the triton package, which is not installed\n"


def test_tensors_on_a_cpu_are_refused_outside_the_interpreter(monkeypatch):
    monkeypatch.setattr(platform, "is_installed", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    query = torch.zeros(1, 2, 1, 32)
    with pytest.raises(ValueError, match="the triton backend requires tensors on a GPU, found cpu"):
        sparse_attention.sparse_attention(query, query[:, :, 0], None, None, torch.zeros(1), 2, backend="triton")


def test_gpus_run_triton_for_supported_inputs_only(monkeypatch):
    monkeypatch.setattr(sparse_attention, "can_run", lambda x: True)
    choose = sparse_attention.backend_for
    query = torch.zeros(1, 2, 4, 512, dtype=torch.bfloat16)
    assert choose(query, None, query[:, :, 0]) == "triton"
    assert choose(query.float(), None, query[:, :, 0]) != "triton"
    with torch.autocast("cpu", torch.bfloat16):
        assert choose(query.float(), None, query[:, :, 0]) == "triton"
    assert choose(query[..., :500], None, query[:, :, 0]) != "triton"
    assert choose(query, None, query) != "triton"  # gathered entries
    assert choose(query, None, query[:, :, 0], 256) != "triton"


def test_gpus_run_triton_scans_and_experts_for_supported_inputs_only(monkeypatch):
    for operation in (ssd_scan, gated_delta_rule, expert_dispatch):
        monkeypatch.setattr(operation, "can_run", lambda x: True)
    x = torch.zeros(1, 2, 1, 129)
    for operation in (ssd_scan, gated_delta_rule):
        assert operation.backend_for(x[..., :128]) == "triton"
        assert operation.backend_for(x) != "triton" and operation.backend_for(x[..., :128].double()) != "triton"
    assert expert_dispatch.backend_for(x.bfloat16()) == "triton" and expert_dispatch.backend_for(x) == "eager"


@pytest.mark.parametrize(
    ("x", "is_view"),
    [
        (torch.randn(2, 5, 9)[..., :6], True),  # part of longer rows
        (torch.randn(1, 2, 3, 4).transpose(0, 1), True),  # contiguous, with a stride that means nothing
        (torch.randn(2, 8, 6)[:, :5], False),  # more than one distance between rows
        (torch.randn(2, 5, 3, 4).transpose(2, 3), False),
    ],
)
def test_rows_lie_at_even_distances(x, is_view):
    rows = platform.as_rows(x)
    size = x[0, 0].numel()
    read = rows.as_strided((len(rows), size), (rows.stride(0), 1))
    assert torch.equal(read, x.reshape(-1, size)) and (rows.data_ptr() == x.data_ptr()) == is_view


def test_deterministic_gradients_are_a_context():
    with attention.deterministic_gradients():
        assert attention._is_deterministic
    assert not attention._is_deterministic


# --- choices


def test_choices_survive_a_process_and_damage(tmp_path):
    path = tmp_path / "folder" / "choices.json"
    assert TileCache(path).put("kernel (1, 2)", 3) == 3
    other = TileCache(path)
    assert other.get("kernel (1, 2)") == 3 and other.get("kernel (1, 3)") is None
    TileCache(path).put("second", 1)
    other.put("third", 2)
    assert json.loads(path.read_text()) == {"kernel (1, 2)": 3, "second": 1, "third": 2}
    assert [p.name for p in path.parent.iterdir()] == ["choices.json"]
    for damage in ("{", "[1]", "[" * 100_000, '{"kernel (1, 2)": "3", "other": -1}'):
        path.write_text(damage)
        assert TileCache(path).get("kernel (1, 2)") is None and TileCache(path).get("other") is None


def test_a_folder_that_cannot_be_written_keeps_the_choice_in_memory(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache = TileCache(tmp_path / "file" / "choices.json")
    assert cache.put("kernel", 1) == 1 and cache.get("kernel") == 1
    assert "tile choices are not stored" in caplog.text


def test_the_stored_choices_need_no_distribution_named_triton(monkeypatch):
    """PyTorch for AMD GPUs comes with triton in a distribution of another name."""
    pytest.importorskip("triton")

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", missing)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "AMD Instinct MI300X")
    assert tiles._cache.__wrapped__(torch.device("cpu")).path.suffix == ".json"


class FakeEvents:
    """Timing events that read the duration of the last launch."""

    last = 0.0

    def __init__(self, enable_timing):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return FakeEvents.last


def test_the_fastest_setting_is_timed_once_and_then_remembered(tmp_path, monkeypatch):
    cache = TileCache(tmp_path / "choices.json")
    monkeypatch.setattr(tiles, "_cache", lambda device: cache)
    monkeypatch.setattr(tiles, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tiles, "is_interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvents)
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    choices = {"sm_90": (Tile(4, 1), Tile(8, 1), Tile(8, 2))}
    durations, launched = {choices["sm_90"][0]: 3.0, choices["sm_90"][1]: 1.0, choices["sm_90"][2]: 2.0}, []

    def launch(tile):
        launched.append(tile)
        FakeEvents.last = durations[tile]
        return tile

    def best(shape):
        return tiles.launch_best("kernel", choices, shape, torch.device("cpu"), launch)

    capturing = True
    assert best(1) == Tile(4, 1) and len(launched) == 1
    capturing = False
    assert best(1) == Tile(8, 1) and len(launched) > 4
    launched.clear()
    assert best(1) == Tile(8, 1) and len(launched) == 1
    capturing = True
    assert best(1) == Tile(8, 1) and best(2) == Tile(4, 1)


def test_lengths_of_similar_size_share_a_choice():
    assert tiles._bucket((1, 65, (64, 512), "fp8", 4097)) == (1, 128, (64, 512), "fp8", 8192)
