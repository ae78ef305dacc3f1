"""Dispatch of all operations: reporting, forcing and refusing backends."""

import importlib
from pathlib import Path

import pytest
import torch

from kernels import native
from kernels.cache_io import EntryLayout

ROOT = Path(__file__).parents[2] / "kernels"
OPERATIONS = sorted(path.parent.name for path in ROOT.glob("*/reference.py"))


def operation(name):
    return importlib.import_module(f"kernels.{name}")


@pytest.mark.parametrize("name", OPERATIONS)
def test_backends_are_named_after_their_modules(name):
    modules = {path.stem for path in (ROOT / name).glob("*.py")} & {"reference", "eager", "cpu", "triton"}
    backends = operation(name).BACKENDS
    assert set(backends) == modules
    assert all(module.__name__ == f"kernels.{name}.{backend}" for backend, module in backends.items())
    assert (ROOT / name / "cpu.cpp").exists() == ("cpu" in backends)


@pytest.mark.parametrize("name", OPERATIONS)
def test_public_functions_have_docstrings(name):
    module = operation(name)
    assert "backend_for" in module.__all__
    assert all(getattr(module, public).__doc__ for public in module.__all__ if callable(getattr(module, public)))


x, layout = torch.zeros(1, 1, 4), EntryLayout(4, "fp8")
CALLS = {
    "cache_io.pack": (x, layout),
    "cache_io.unpack": (torch.zeros(1, layout.nbytes, dtype=torch.uint8), layout),
    "cache_io.write_ring": (x, x, torch.tensor([1])),
    "cache_io.write_pages": (x, layout, None, torch.tensor([0]), torch.tensor([1])),
    "causal_conv.causal_conv": (x, torch.zeros(4, 2)),
    "compress.compress": (x, torch.zeros(1, 2), None, False),
    "compress.compress_next": (x, x, torch.zeros(1, 2), None, torch.tensor([1]), False, layout, None),
    "expert_dispatch.dispatch": (x[0], None, torch.float32),
    "expert_dispatch.combine": (x[0], None, torch.float32),
    "expert_dispatch.run_experts": (x[0], None, (), None, 1.0),
    "fused_experts.fused_experts": (x, None, None, (), (), 1.0),
    "gated_delta_rule.gated_delta_rule": (x[None], x[None], x[None], x[None], x),
    "grouped_attention.grouped_attention": (x, None, None, 1, layout),
    "hadamard.hadamard": (x,),
    "hyper_connections.hc_pre": (x[None], x, x, x, x, 1, 1e-6, 1e-6),
    "hyper_connections.hc_post": (x[None], x, x, x),
    "hyper_connections.hc_head": (x[None], x, x, x, 1e-6, 1e-6),
    "index_scores.index_scores": (x, x, x),
    "index_topk.index_topk": (x, None, layout, x, x, 1),
    "index_topk.select_entries": (x[None], x, x, None, 1),
    "indexer_kl.indexer_kl": (x[None], x, x, None, None),
    "linear.linear": (x, x[0]),
    "linear.linear_concat": (x, [x[0]]),
    "linear.grouped_linear": (x, x),
    "newton_schulz.newton_schulz": (x,),
    "paged_attention.paged_attention": (x, None, None, x, layout, 1),
    "projection.latent_query": (x, x[0], x, x[0], x, x, 1, 1e-6),
    "projection.packed_key_value": (x, x[0], x, x, x, 1e-6, layout),
    "projection.grouped_output": (x[None], x, x, x, x[0]),
    "projection.index_query": (x, x[0], x, x, 1),
    "quantize.round_to_format": (x, "fp8"),
    "quantize.fake_quantize": (x, "fp8"),
    "quantize.round_to_layout": (x, layout),
    "rms_norm.rms_norm": (x, 1e-6),
    "rotary.rotate": (x, x, x),
    "rotary.angles": (x, x),
    "routing.route": (x, x, 1, 1.0),
    "sampling.sample": (x, [0.5], [1.0], [0], [1.0], [0.0]),
    "sparse_attention.sparse_attention": (x[None], x, None, None, x, 1),
    "ssd_scan.ssd_scan": (x[None], x, x[0, 0], x[None], x[None], x[0, 0]),
    "swiglu.swiglu": (x, x, 1.0),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_unknown_backend_is_refused_with_the_existing_ones(call):
    name, function = call.split(".")
    module = operation(name)
    with pytest.raises(
        ValueError, match=f"^{name}: unknown backend 'fused'; choose one of {', '.join(module.BACKENDS)}$"
    ):
        getattr(module, function)(*CALLS[call], backend="fused")


def test_all_operations_are_covered():
    assert {call.split(".")[0] for call in CALLS} == set(OPERATIONS)


@pytest.mark.parametrize("call", CALLS)
def test_every_backend_implements_every_dispatched_function(call):
    name, function = call.split(".")
    backends = operation(name).BACKENDS
    if hasattr(backends["reference"], function):  # others are composed of dispatched functions
        assert [backend for backend, module in backends.items() if not hasattr(module, function)] == []


def test_native_operators_without_a_backward_pass_run_only_without_gradients(monkeypatch):
    from kernels import gated_delta_rule, hadamard, rms_norm, rotary, swiglu

    with_backward, others = (rms_norm, rotary, swiglu), (gated_delta_rule, hadamard)
    monkeypatch.setattr(native, "level", lambda: "some")
    for dtype, expected in ((torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.float64, "eager")):
        assert {op.backend_for(torch.zeros(1, dtype=dtype)) for op in with_backward} == {expected}
    assert "cpu" not in {op.backend_for(torch.zeros(1)) for op in others}
    with torch.no_grad():
        assert {op.backend_for(torch.zeros(1)) for op in (*with_backward, *others)} == {"cpu"}
        assert "cpu" not in {op.backend_for(torch.zeros(1, dtype=torch.bfloat16)) for op in others}
        monkeypatch.setattr(native, "level", lambda: None)
        assert {op.backend_for(torch.zeros(1)) for op in with_backward} == {"eager"}


def test_forcing_cpu_without_native_operators_says_what_to_do(monkeypatch):
    monkeypatch.setattr(native, "level", lambda: None)
    with pytest.raises(RuntimeError, match=r"'swiglu' is not available; install g\+\+ and run `make native`"):
        native.op.__wrapped__("swiglu")
