"""The optimizer's step beside `torch.optim.Muon`: square matrices, and everything that Muon moves in a preset.

    python -m benchmarks.optimizer_step [--preset small] [--sizes 256 ...] [--write docs/optimizer-step.md]

Both make as many iterations with the same coefficients, in BF16; PyTorch's gets every expert as a parameter of its own,
because it refuses stacks. Only Muon's part is timed on either side. The sides run in turn, at every thread count.

Beside it, Muon's share of the time of a training step of half a million tokens: from the products that both take, and
from times measured here, a sequence's forward and backward pass and one optimizer step.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from benchmarks.harness import Findings, benchmark, command_line, count, options_of
from benchmarks.report import table
from benchmarks.timing import Side, in_turn, ratio, threads_of
from kernels.newton_schulz import STEPS_PER_GRAM_MATRIX, count_multiplications
from model.config import ModelConfig
from model.muon import MuonAdamW, OptimizerConfig
from model.transformer import Transformer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 10
BATCH_TOKENS = 500_000
CONFIG = OptimizerConfig(ns_coefficients=(COEFFICIENTS,) * STEPS, ns_dtype="bfloat16")


class Contest:
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

    def sides(self, threads: int) -> dict[str, Side]:
        return {"torch": Side(self.theirs.step, threads), "ours": Side(self.ours.step, threads)}


def matrices(p: torch.Tensor, rows: tuple[int, ...] | None) -> list[torch.Tensor]:
    """What Muon orthogonalises on its own in one parameter."""
    whole = p.detach().flatten(0, -3) if p.dim() > 2 else p.detach().unsqueeze(0)
    return [part for matrix in whole for part in matrix.split(rows or matrix.shape[0])]


def row(name: str, contest: Contest, threads: int, rounds: int) -> list[str]:
    times = in_turn(contest.sides(threads), rounds)
    faster = ratio(times["torch"], times["ours"])
    cells = [name, str(threads), times["torch"].milliseconds(), times["ours"].milliseconds(), f"{faster:.2f}"]
    print(" | ".join(cells), flush=True)
    return cells


def muon_part(model: Transformer) -> tuple[list[tuple[str, nn.Parameter]], dict[str, tuple[int, ...]]]:
    fused = model.fused_rows()
    groups = MuonAdamW(model.named_parameters(), CONFIG, fused).param_groups
    names = {name for group in groups if group["rule"] == "muon" for name in group["names"]}
    return [(name, p) for name, p in model.named_parameters() if name in names], fused


def share(options: argparse.Namespace, model: Transformer) -> str:
    """Muon's share of a step of :data:`BATCH_TOKENS`, by products and by the clock, as a Markdown table."""
    named, fused = muon_part(model)
    contest = Contest([(name, nn.Parameter(p.detach().clone())) for name, p in named], fused)
    ids = torch.randint(model.config.vocab_size, (1, options.tokens + 1))

    def forward_and_backward() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        model.zero_grad(set_to_none=True)

    model.train()
    threads = max(options.threads)
    sides = {"sequence": Side(forward_and_backward, threads), "muon": contest.sides(threads)["ours"]}
    times = in_turn(sides, options.rounds)
    per_token = times["sequence"].median / options.tokens
    segment = STEPS_PER_GRAM_MATRIX[torch.bfloat16]
    products = sum(
        2 * count_multiplications(*sorted(m.shape), STEPS, segment)
        for name, p in named
        for m in matrices(p, fused.get(name))
    )
    # Six for every active weight and token; attention is left out, so the share is an upper bound.
    active = sum(
        p.numel() * (model.config.experts_per_token / model.config.num_experts if p.dim() == 3 and ".ffn." in n else 1)
        for n, p in model.named_parameters()
        if p.dim() > 1 and not n.startswith("embed")
    )
    by_products = products / (products + 6 * active * BATCH_TOKENS)
    by_clock = times["muon"].median / (times["muon"].median + per_token * BATCH_TOKENS)
    shares = (("products, closed form", by_products), ("the clock", by_clock))
    rows = [[by, f"{100 * found:.2f}%"] for by, found in shares]
    heading = f"### Muon's share of a step of {BATCH_TOKENS:,} tokens, preset '{options.preset}'\n\n"
    note = (
        f"\nBy the clock: {times['sequence'].milliseconds()} ms for {options.tokens:,} tokens forward and backward in "
        f"BF16 autocast, {times['muon'].milliseconds()} ms for Muon's step, {threads_of(threads)}.\n"
    )
    return heading + table(["by", "share"], rows) + note


def measure(options: argparse.Namespace) -> Findings:
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_preset(options.preset))
    rows = []
    for size in options.sizes:
        square = Contest([("w.weight", nn.Parameter(torch.randn(size, size)))], {})
        for threads in options.threads:
            rows.append(row(f"one {size} x {size}", square, threads, options.rounds))
    named, fused = muon_part(model)
    everything = Contest(named, fused)
    numbers = sum(p.numel() for _, p in named)
    name = f"all of '{options.preset}', {numbers / 1e6:.1f}M numbers"
    for threads in options.threads:
        rows.append(row(name, everything, threads, options.rounds))
    del everything
    header = ["matrices", "threads", "torch.optim.Muon, ms", "ours, ms", "times faster"]
    return Findings(f"{table(header, rows)}\n{share(options, model)}")


def main(arguments: list[str] | None = None) -> str:
    parser = options_of(__doc__, threads=[1, 2])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--sizes", type=count, nargs="+", default=[256, 512, 1024, 2048], help="of square matrices")
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--tokens", type=count, default=512, help="of the sequence that a step's time is scaled from")
    return benchmark(parser, measure, arguments)


if __name__ == "__main__":
    command_line(main)
