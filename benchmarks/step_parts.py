"""What a training step costs, and what each of the five choices adds to it.

    python -m benchmarks.step_parts [--preset tiny] [--rows 16] [--length 256] [--rounds 3] [--threads 1]

Every variant is timed in turn; ratios are to the full recipe in the same round.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable

import torch

from benchmarks.lib.harness import Findings, benchmark, command_line, count, options_of
from benchmarks.lib.report import table
from benchmarks.lib.timing import Side, Timing, in_turn, ratio
from benchmarks.lib.training import step
from model.config import ModelConfig
from model.muon import MuonAdamW, OptimizerConfig
from model.transformer import Transformer

FULL, PLAIN_RESIDUALS = "all five choices", "plain residuals"
VARIANTS: dict[str, tuple[dict, str]] = {
    FULL: ({}, "muon"),
    "gqa instead of csa/hca": ({"layers": "gqa"}, "muon"),
    "bf16 cache formats": ({"kv_format": "bf16", "index_format": "bf16"}, "muon"),
    "AdamW instead of Muon": ({}, "adamw"),
    PLAIN_RESIDUALS: ({"hyper_connections": False}, "muon"),
    "no quantisation in the loop": ({"qat": False}, "muon"),
    "dense feed-forward": ({"ffn": "dense", "num_hash_layers": 0}, "muon"),
}


def parts(preset: str, variants: Iterable[str], rows: int, length: int, rounds: int, threads: int) -> dict[str, Timing]:
    """Seconds of a step of ``rows`` sequences of ``length`` tokens, by variant."""
    torch.manual_seed(0)
    ids = torch.randint(0, 258, (rows, length + 1))
    sides = {}
    for name in variants:
        changes, rule = VARIANTS[name]
        config = ModelConfig.from_preset(preset)
        if changes.get("layers") == "gqa":
            changes = {"layers": ("gqa",) * config.num_layers}
        model = Transformer(config.replace(**changes)).train()
        optimizer = MuonAdamW(
            model.named_parameters(), OptimizerConfig(rule=rule, ns_dtype="bfloat16"), model.fused_rows()
        )
        sides[name] = Side(functools.partial(step, model, optimizer, ids), threads)
    return in_turn(sides, rounds)


def measure(options: argparse.Namespace) -> Findings:
    times = parts(options.preset, VARIANTS, options.rows, options.length, options.rounds, options.threads)
    rows = [[name, timing.milliseconds(), f"{ratio(timing, times[FULL]):.2f}"] for name, timing in times.items()]
    about = f"One training step of '{options.preset}', {options.rows} rows of {options.length} tokens.\n\n"
    return Findings(about + table(["variant", "ms", "times the full step"], rows))


def main(arguments: list[str] | None = None) -> str:
    parser = options_of(__doc__, threads=1)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--rows", type=count, default=16)
    parser.add_argument("--length", type=count, default=256)
    parser.add_argument("--rounds", type=count, default=3)
    return benchmark(parser, measure, arguments)


if __name__ == "__main__":
    command_line(main)
