"""What a training step costs, and what each of the five choices adds to it.

    python -m benchmarks.step_parts [--preset tiny] [--rows 16] [--length 256] [--rounds 3] [--threads 1]

Every variant is timed in turn; ratios are to the full recipe in the same round.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable

import torch

from benchmarks.one_step import step
from benchmarks.report import command_line, count
from benchmarks.timing import Side, Timing, in_turn, ratio, threads_of
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


def parts(
    preset: str, variants: Iterable[str], rows: int, length: int, rounds: int, threads: int
) -> dict[str, Timing]:
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--rows", type=count, default=16)
    parser.add_argument("--length", type=count, default=256)
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--threads", type=count, default=1)
    options = parser.parse_args(arguments)
    times = parts(options.preset, VARIANTS, options.rows, options.length, options.rounds, options.threads)
    print(
        f"one training step of {options.preset}, {options.rows} rows of {options.length} tokens, "
        f"{threads_of(options.threads)}, {options.rounds} rounds"
    )
    for name, timing in times.items():
        print(f"  {name:30} {timing.median:6.3f} s   {ratio(timing, times[FULL]):5.2f} x the full step")


if __name__ == "__main__":
    command_line(main)
