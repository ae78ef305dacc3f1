"""Compilation of the Triton kernels for GPUs that are not there: limits on registers, spills and shared memory."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton")
from kernels.triton_support import compilation, roofline
from kernels.triton_support.compilation import Compiled
from kernels.triton_support.plans import OPERATIONS, Plan, Work, all_plans
from kernels.triton_support.platform import ARCHITECTURES
from kernels.triton_support.tiles import Tile

ROOT = Path(__file__).parents[3]


def report(*arguments):
    settings = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "kernels.triton_support.report", "--json", *arguments]
    found = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert found.stdout, found.stderr[-4000:]
    result = json.loads(found.stdout)
    assert not result["faults"], "\n".join(result["faults"])
    return result["kernels"]


# The attention kernels take up to half a minute each to compile, and the scans are many; the long test has them all.
QUICK = [
    "index_topk", "indexer_kl", "cache_io", "paged_attention", "sparse_attention.sum_parts",
    "hyper_connections", "newton_schulz", "compress", "ssd_scan.outputs", "ssd_scan.carry (forward)",
    "gated_delta_rule.products", "gated_delta_rule.carry (forward)", "expert_dispatch",
]  # fmt: skip


# One process compiles for two GPUs: it spends seconds on its start.
@pytest.mark.parametrize("architectures", [ARCHITECTURES[:2], ARCHITECTURES[2:]], ids=" and ".join)
def test_figures_are_within_their_limits(architectures):
    found = report("--architectures", *architectures, "--kernels", *QUICK)
    plans = {plan.name for plan in all_plans() if plan.name.startswith(tuple(QUICK))}
    assert {(kernel["plan"], kernel["architecture"]) for kernel in found} == set(product(plans, architectures))


@pytest.mark.long
def test_figures_of_all_settings_are_within_their_limits():
    found = report("--all-tiles")
    assert len(found) == sum(len(list(plan.choices())) for plan in all_plans())


def test_every_kernel_has_settings_for_every_architecture():
    settings = {}
    for plan in all_plans():
        settings.setdefault((plan.name.partition(".")[0], plan.kernel), set()).update(plan.tiles)
    assert all(names - {"interpreter"} == set(ARCHITECTURES) for names in settings.values())


@pytest.mark.parametrize("plan", all_plans(), ids=lambda plan: plan.name)
def test_plans_name_every_argument(plan):
    assert plan.tiles and all(plan.tiles.values())
    arguments = plan.function().arg_names
    architecture, tile = next(plan.choices())
    assert set(arguments) == set(plan.arguments) | (set(plan.constants_for(architecture, tile)) & set(arguments))


def test_every_kernel_has_a_plan():
    planned = {(plan.name.partition(".")[0], plan.kernel) for plan in all_plans()}
    for operation in OPERATIONS:
        text = (ROOT / "kernels" / operation / "triton_kernels.py").read_text()
        launched = (ROOT / "kernels" / operation / "triton.py").read_text()
        names = {line[4:].partition("(")[0] for line in text.splitlines() if line.startswith("def ")}
        launches = {name for name in names if re.search(rf"(kernels\.|kernels\(\)\.|_launch\(\"){name}\b", launched)}
        assert launches == {name for op, name in planned if op == operation}
    assert {path.parent.name for path in (ROOT / "kernels").glob("*/triton_kernels.py")} == set(OPERATIONS)


GOOD = Compiled(
    "some.kernel", "sm_90", "tile", 128, 100 << 10, 0, 8, 2,
    {"matrix": 4, "async copy": 2, "wide load": 2, "load": 2, "atomic": 0}, "HGMMA",
)  # fmt: skip
PLAN = Plan("some.kernel", "kernel", {}, {}, {"sm_90": (Tile(8, 1),)}, multiplies=True, copies_ahead=("sm_90",))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"shared": 228 << 10}, "needs 233,472 bytes of shared memory, of 232,448"),
        ({"spills": 8}, "spills 8 bytes, at most 0 allowed"),
        ({"instructions": {**GOOD.instructions, "matrix": 0}}, "has no matrix instruction"),
        ({"instructions": {**GOOD.instructions, "async copy": 0}}, "has no asynchronous copy"),
        ({"instructions": {**GOOD.instructions, "async copy": 0, "wide load": 0}}, "has no load wider than 4 bytes"),
    ],
)
def test_figures_beyond_a_limit_are_named(change, fault):
    found = replace(GOOD, **change).faults(PLAN)
    assert found[-1:] == ([] if fault is None else [f"some.kernel, sm_90, tile: {fault}"])


def test_spills_are_limited_for_the_compiler_that_the_limits_are_set_for(monkeypatch):
    spilling = replace(GOOD, spills=8)
    for version, limited in (("3.6.0", False), ("3.9.0", True), ("3.10.0+git", True), ("4.0.0", True)):
        monkeypatch.setattr("triton.__version__", version)
        assert compilation.limits_spills() == limited
        assert bool(spilling.faults(PLAN, compilation.limits_spills())) == limited


def test_listings_of_both_vendors_are_read(monkeypatch):
    outputs = {
        "cuobjdump": " Function kernel:\n  REG:96 STACK:24 SHARED:0 LOCAL:0 CONSTANT[0]:600",
        "nvdisasm": "        /*0010*/              @!P0 LDG.E.128 R4, desc[UR8][R2.64] ;\n"
        "        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4] ;\n",
    }
    monkeypatch.setattr(compilation, "_run", lambda tool, *arguments: outputs[tool])
    registers, spills, loop, names = compilation._of_nvidia(b"")
    assert (registers, spills, loop) == (96, 24, 0)
    assert dict(names) == {"LDG.E.128": 1, "HGMMA.64x64x16.F32.BF16": 1}
    assembly = (
        "\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1]\n    .private_segment_fixed_size: 16\n    .vgpr_count:     90\n"
    )
    registers, spills, _, names = compilation._of_amd(assembly)
    assert (registers, spills, names["v_mfma_f32_32x32x8_bf16_1k"]) == (90, 16, 1)


def test_the_largest_innermost_loop_is_counted():
    listing = """
.L_x_0:
        /*0010*/                   FMUL R1, R2, R3 ;
.L_x_1:
        /*0020*/                   FADD R1, R2, R3 ;
        /*0030*/              @P0 BRA `(.L_x_1) ;
        /*0040*/             @!P1 BRA `(.L_x_2) ;
        /*0050*/                   BRA `(.L_x_0) ;
.L_x_2:
        /*0060*/                   FADD R1, R2, R3 ;
        /*0070*/                   FADD R1, R2, R3 ;
        /*0080*/              @P0 BRA.U `(.L_x_2) ;
        /*0090*/                   EXIT ;
"""
    names, loop = compilation._instructions(listing)
    assert len(names) == 9 and loop == 3


def test_occupancy_is_limited_by_registers_shared_memory_and_threads():
    assert compilation._programs("sm_90", 128, 1000, 8) == 2
    assert compilation._programs("sm_90", 255, 1000, 8) == 1
    assert compilation._programs("sm_90", 32, 100 << 10, 4) == 2
    assert compilation._programs("sm_90", 16, 0, 8) == 8


def predicted(work, compiled):
    return roofline.predict(replace(PLAN, work=work), PLAN.tiles["sm_90"][0], compiled)


def test_predictions_name_what_binds():
    def bound(**work):
        return predicted(Work(**{"flops": 0.0, "nbytes": 0.0, **work}), GOOD)

    assert bound(flops=989e12, nbytes=1.0).seconds == 1
    assert bound(flops=989e12, vector_ops=roofline.H100.vector_ops / 2).seconds == 1
    alone = replace(GOOD, programs=1)
    both = Work(989e12, 0.0, vector_ops=roofline.H100.vector_ops / 2)
    assert predicted(both, alone).seconds == 1.5
    looped = Work(989e12, 0.0, loops=lambda tile: roofline.H100.vector_ops / 32 / tile.warps)
    assert predicted(looped, replace(GOOD, loop=3)).seconds == pytest.approx(3.0)
    old = replace(GOOD, matrix_kind="HMMA")
    assert predicted(Work(989e12, 0.0), old).seconds == pytest.approx(1 / 0.62)
    memory = bound(nbytes=6.7e12, flops=1.0)
    assert memory.bound == "memory" and memory.seconds == 2 and memory.bandwidth_share == 1
    assert bound(nbytes=1.0, atomic_bytes=5.5e12).bound == "atomics"
    assert bound(nbytes=1.0, cache_bytes=5.5e12).bound == "cache"
    with pytest.raises(ValueError, match="no prediction for sm_80"):
        predicted(Work(1.0, 1.0), replace(GOOD, architecture="sm_80"))
