"""Optimizer step against `torch.optim.Muon`: square matrices, and all of Muon's parameters in a preset.

    python -m benchmarks.optimizer_step [--preset small] [--sizes 256 ...] [--write docs/optimizer-step.md]

Both use the same number of iterations and coefficients, in BF16. PyTorch's Muon accepts only 2-D parameters, so it gets
each expert separately. Only Muon's parameters are timed. Runs are interleaved, at every thread count.

A second table gives Muon's share of a training step of half a million tokens: from the number of multiplications, and
from the measured times of a sequence's forward and backward pass and of an optimizer step.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from benchmarks.lib.harness import Result, make_parser, positive_int, run_benchmark, run_main
from benchmarks.lib.report import table
from benchmarks.lib.timing import Timer, format_threads, speedup, time_interleaved
from kernels.newton_schulz import STEPS_PER_GRAM_MATRIX, count_multiplications
from model.config import ModelConfig
from model.costs import count_parameters
from model.optim import MuonAdamW, OptimizerConfig
from model.transformer import Transformer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 10
BATCH_TOKENS = 500_000
CONFIG = OptimizerConfig(ns_coefficients=(COEFFICIENTS,) * STEPS, ns_dtype="bfloat16")


class Comparison:
    """The same matrices in both optimizers."""

    def __init__(self, named: list[tuple[str, nn.Parameter]], fused: dict[str, tuple[int, ...]]):
        self.ours = MuonAdamW(named, CONFIG, fused)
        self.theirs = torch.optim.Muon(
            [nn.Parameter(matrix.clone()) for name, p in named for matrix in matrices(p, fused.get(name))],
            lr=CONFIG.learning_rate,
            weight_decay=CONFIG.weight_decay,
            ns_coefficients=COEFFICIENTS,
            ns_steps=STEPS,
            adjust_lr_fn="match_rms_adamw",
        )
        for optimizer in (self.ours, self.theirs):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.randn_like(p)

    def timers(self, threads: int) -> dict[str, Timer]:
        return {"torch": Timer(self.theirs.step, threads), "ours": Timer(self.ours.step, threads)}


def matrices(p: torch.Tensor, rows: tuple[int, ...] | None) -> list[torch.Tensor]:
    """Return the matrices of a parameter that Muon orthogonalizes separately."""
    whole = p.detach().flatten(0, -3) if p.dim() > 2 else p.detach().unsqueeze(0)
    return [part for matrix in whole for part in matrix.split(rows or matrix.shape[0])]


def row(name: str, comparison: Comparison, threads: int, rounds: int) -> list[str]:
    times = time_interleaved(comparison.timers(threads), rounds)
    faster = speedup(times["torch"], times["ours"])
    cells = [name, str(threads), times["torch"].milliseconds(), times["ours"].milliseconds(), f"{faster:.2f}"]
    print(" | ".join(cells), flush=True)
    return cells


def muon_parameters(model: Transformer) -> tuple[list[tuple[str, nn.Parameter]], dict[str, tuple[int, ...]]]:
    fused = model.split_sizes()
    groups = MuonAdamW(model.named_parameters(), CONFIG, fused).param_groups
    names = {name for group in groups if group["rule"] == "muon" for name in group["names"]}
    return [(name, p) for name, p in model.named_parameters() if name in names], fused


def share(options: argparse.Namespace, model: Transformer) -> str:
    """Return Muon's share of a step of :data:`BATCH_TOKENS`, by multiplications and by time, as a Markdown table."""
    named, fused = muon_parameters(model)
    comparison = Comparison([(name, nn.Parameter(p.detach().clone())) for name, p in named], fused)
    ids = torch.randint(model.config.vocab_size, (1, options.tokens + 1))

    def forward_and_backward() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        model.zero_grad(set_to_none=True)

    model.train()
    threads = max(options.threads)
    timers = {"sequence": Timer(forward_and_backward, threads), "muon": comparison.timers(threads)["ours"]}
    times = time_interleaved(timers, options.rounds)
    per_token = times["sequence"].median / options.tokens
    segment = STEPS_PER_GRAM_MATRIX[torch.bfloat16]
    products = sum(
        2 * count_multiplications(*sorted(m.shape), STEPS, segment)
        for name, p in named
        for m in matrices(p, fused.get(name))
    )
    # 6 FLOPs per active weight and token; attention is not included, so the share is an upper bound.
    by_products = products / (products + 6 * count_parameters(model).active * BATCH_TOKENS)
    by_clock = times["muon"].median / (times["muon"].median + per_token * BATCH_TOKENS)
    shares = (("products, closed form", by_products), ("the clock", by_clock))
    rows = [[by, f"{100 * found:.2f}%"] for by, found in shares]
    heading = f"### Muon's share of a step of {BATCH_TOKENS:,} tokens, preset '{options.preset}'\n\n"
    note = (
        f"\nBy the clock: {times['sequence'].milliseconds()} ms for {options.tokens:,} tokens forward and backward in "
        f"BF16 autocast, {times['muon'].milliseconds()} ms for Muon's step, {format_threads(threads)}.\n"
    )
    return heading + table(["by", "share"], rows) + note


def measure(options: argparse.Namespace) -> Result:
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_preset(options.preset))
    rows = []
    for size in options.sizes:
        square = Comparison([("w.weight", nn.Parameter(torch.randn(size, size)))], {})
        for threads in options.threads:
            rows.append(row(f"one {size} x {size}", square, threads, options.rounds))
    named, fused = muon_parameters(model)
    everything = Comparison(named, fused)
    elements = sum(p.numel() for _, p in named)
    name = f"all of '{options.preset}', {elements / 1e6:.1f}M numbers"
    for threads in options.threads:
        rows.append(row(name, everything, threads, options.rounds))
    del everything
    header = ["matrices", "threads", "torch.optim.Muon, ms", "ours, ms", "times faster"]
    return Result(f"{table(header, rows)}\n{share(options, model)}")


def main(arguments: list[str] | None = None) -> str:
    parser = make_parser(__doc__, threads=[1, 2])
    parser.add_argument("--preset", default="small")
    parser.add_argument(
        "--sizes", type=positive_int, nargs="+", default=[256, 512, 1024, 2048], help="sizes of square matrices"
    )
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument("--tokens", type=positive_int, default=512, help="length of the timed sequence")
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    run_main(main)
