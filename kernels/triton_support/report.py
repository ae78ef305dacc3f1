"""Compile the kernels without a GPU and print the figures of the compiled code.

    python -m kernels.triton_support.report [--json] [--all-tiles] [--architectures sm_90 ...] [--kernels NAME ...]

The first compilation takes minutes; Triton caches results on disk. Exits with status 1 if a figure exceeds its limit.
"""

from __future__ import annotations

import argparse
import json
import os
import sys

from kernels.triton_support.compilation import Compiled, compile_plan, limits_spills
from kernels.triton_support.plans import Plan, all_plans
from kernels.triton_support.platform import ARCHITECTURES, is_interpreting
from kernels.triton_support.roofline import H100, predict
from kernels.triton_support.tiles import Tile

_HEADER = (
    "| kernel | GPU | setting | registers | spills, B | shared, KiB | programs | matrix | async copies | wide loads |\n"
    "|---|---|---|---|---|---|---|---|---|---|\n"
)


def compile_all(architectures: list[str], names: list[str], all_tiles: bool) -> list[tuple[Plan, Tile, Compiled]]:
    """Compile the default or all settings of the kernels whose names begin with one of ``names``."""
    found = []
    for plan in all_plans():
        if names and not plan.name.startswith(tuple(names)):
            continue
        for architecture, tile in plan.choices():
            if architecture in architectures and (all_tiles or tile == plan.tiles[architecture][0]):
                found.append((plan, tile, compile_plan(plan, architecture, tile)))
    return found


def table(found: list[tuple[Plan, Tile, Compiled]]) -> str:
    """Format the figures as Markdown, with predictions for an H100."""
    lines = [_HEADER]
    for plan, _, c in found:
        i = c.instructions
        figures = (plan.name, c.architecture, c.tile, c.registers, c.spills, f"{c.shared / 1024:.0f}", c.programs)
        counts = (f"{i['matrix']} {c.matrix_kind}".strip(), i["async copy"], i["wide load"])
        lines.append(f"| {' | '.join(map(str, (*figures, *counts)))} |\n")
    lines.append(f"\n| kernel | setting | predicted on {H100.name}, at most | target |\n|---|---|---|---|\n")
    for plan, tile, c in found:
        if plan.work is not None and c.architecture == H100.architecture:
            lines.append(f"| {plan.name} | {c.tile} | {predict(plan, tile, c)} | {plan.work.target} |\n")
    return "".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--all-tiles", action="store_true")
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--kernels", nargs="+", default=[])
    options = parser.parse_args()
    if is_interpreting():
        sys.exit("error: TRITON_INTERPRET is set; the interpreter cannot compile")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # silences a warning of triton 3.9
    found = compile_all(options.architectures, options.kernels, options.all_tiles)
    limited = limits_spills()
    faults = [fault for plan, _, compiled in found for fault in compiled.faults(plan, limited)]
    if options.json:
        print(json.dumps({"kernels": [compiled.to_json() for *_, compiled in found], "faults": faults}))
    else:
        print(table(found))
        print("\n".join(faults))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
