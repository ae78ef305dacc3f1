"""Time of a training step, and the contribution of each of the five choices.

    python -m benchmarks.step_parts [--preset tiny] [--rows 16] [--length 256] [--rounds 3] [--threads 1]

Variants are interleaved; ratios are to the full recipe in the same round.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable

import torch

from benchmarks.lib.harness import Result, make_parser, positive_int, run_benchmark, run_main
from benchmarks.lib.report import table
from benchmarks.lib.timing import Timer, Timing, speedup, time_interleaved
from benchmarks.lib.training import training_step
from model.config import ModelConfig
from model.optim import MuonAdamW, OptimizerConfig
from model.transformer import Transformer

FULL, PLAIN_RESIDUALS = "all five choices", "plain residuals"
VARIANTS: dict[str, tuple[dict, str]] = {
    FULL: ({}, "muon"),
    "gqa instead of csa/hca": ({"layers": "gqa"}, "muon"),
    "bf16 cache formats": ({"kv_format": "bf16", "index_format": "bf16"}, "muon"),
    "AdamW instead of Muon": ({}, "adamw"),
    PLAIN_RESIDUALS: ({"hyper_connections": False}, "muon"),
    "no quantization in the loop": ({"qat": False}, "muon"),
    "dense feed-forward": ({"ffn": "dense", "num_hash_layers": 0}, "muon"),
}


def time_variants(
    preset: str, variants: Iterable[str], rows: int, length: int, rounds: int, threads: int
) -> dict[str, Timing]:
    """Time a training step of ``rows`` sequences of ``length`` tokens for each variant."""
    torch.manual_seed(0)
    ids = torch.randint(0, 258, (rows, length + 1))
    timers = {}
    for name in variants:
        changes, rule = VARIANTS[name]
        config = ModelConfig.from_preset(preset)
        if changes.get("layers") == "gqa":
            changes = {"layers": ("gqa",) * config.num_layers}
        model = Transformer(config.replace(**changes)).train()
        optimizer = MuonAdamW(
            model.named_parameters(), OptimizerConfig(rule=rule, ns_dtype="bfloat16"), model.split_sizes()
        )
        timers[name] = Timer(functools.partial(training_step, model, optimizer, ids), threads)
    return time_interleaved(timers, rounds)


def measure(options: argparse.Namespace) -> Result:
    times = time_variants(options.preset, VARIANTS, options.rows, options.length, options.rounds, options.threads)
    rows = [[name, timing.milliseconds(), f"{speedup(timing, times[FULL]):.2f}"] for name, timing in times.items()]
    about = f"One training step of '{options.preset}', {options.rows} rows of {options.length} tokens.\n\n"
    return Result(about + table(["variant", "ms", "times the full step"], rows))


def main(arguments: list[str] | None = None) -> str:
    parser = make_parser(__doc__, threads=1)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--rows", type=positive_int, default=16)
    parser.add_argument("--length", type=positive_int, default=256)
    parser.add_argument("--rounds", type=positive_int, default=3)
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    run_main(main)
