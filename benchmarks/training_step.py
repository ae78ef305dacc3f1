"""One training step beside transformers' ``DeepseekV4ForCausalLM`` with `torch.optim.Muon`, and what mHC costs of ours.

    python -m benchmarks.training_step [--lengths 512 2048] [--write docs/training-step.md]

Forward and backward pass and optimizer of one sequence, from the same weights. Every side runs in a process of its own,
whose most resident memory is told, torch and all; the sides take turns, and each ratio is of one round. A trial of one
step finds each side's fastest precision (float32, or BF16 autocast over float32 weights) and number of threads; a line
of its own shows ours with the defaults, float32.
Transformers' matrices go to PyTorch's Muon, every expert on its own (gate and up as one matrix, where ours are two),
everything else to AdamW, as ours do. Ours also trains the indexers and rounds experts and cache entries, which
transformers does not; a line of its own leaves that out.
"""

from __future__ import annotations

import argparse
import itertools
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lib.contenders import DEFAULTS, Theirs, write_weights
from benchmarks.lib.harness import Findings, benchmark, command_line, count, options_of
from benchmarks.lib.report import table
from benchmarks.lib.timing import PeakMemory, Side, Timing, in_child, ratio, threads_of
from benchmarks.lib.training import step
from benchmarks.step_parts import FULL, PLAIN_RESIDUALS, parts
from model.config import ModelConfig
from model.hf import import_pretrained
from model.muon import MuonAdamW, OptimizerConfig
from model.transformer import Transformer

THEIR_ADAMW = re.compile(r"embed_tokens|lm_head|position_bias|hc_head")
"""Their names of the matrices that ours leave to AdamW."""
THEIRS, OURS, DEFAULT, RECOMPUTED = "transformers", "ours, fastest", "ours, defaults", "ours, layers recomputed"
NO_MORE = "ours, the tokens' loss alone, nothing rounded"
LENGTHS = [512, 2048]
RATE = 1e-3


@dataclass(frozen=True)
class Way:
    side: str
    autocast: bool
    threads: int

    def __str__(self) -> str:
        return f"{'BF16 autocast' if self.autocast else 'float32'}, {threads_of(self.threads)}"


def our_step(folder: Path, ids: Tensor, way: Way) -> tuple[Transformer, Callable[[], None]]:
    model = import_pretrained(folder).train()
    model.recompute = way.side == RECOMPUTED
    if way.side == NO_MORE:
        model.adopt(model.config.replace(qat=False))
    config = OptimizerConfig(learning_rate=RATE, adamw_learning_rate=RATE, ns_dtype="bfloat16")
    optimizer = MuonAdamW(model.named_parameters(), config, model.fused_rows())
    return model, lambda: step(model, optimizer, ids, way.autocast, alone=way.side == NO_MORE)


def muon_and_others(
    model: nn.Module,
) -> tuple[dict[nn.Parameter, list[nn.Parameter]], list[nn.Parameter], list[nn.Parameter]]:
    """Of transformers' network, for PyTorch's Muon the stacks with their matrices (which share their memory) and the
    single matrices, and the parameters for AdamW."""
    stacks: dict[nn.Parameter, list[nn.Parameter]] = {}
    matrices, others = [], []
    for name, p in model.named_parameters():
        if p.dim() < 2 or THEIR_ADAMW.search(name):
            others.append(p)
        elif p.dim() > 2:
            stacks[p] = [nn.Parameter(matrix) for matrix in p.detach().flatten(0, -3)]
        else:
            matrices.append(p)
    return stacks, matrices, others


def their_step(folder: Path, ids: Tensor, way: Way) -> Callable[[], None]:
    model = Theirs(folder).model.train()
    stacks, matrices, others = muon_and_others(model)
    muon = torch.optim.Muon(
        [*matrices, *itertools.chain(*stacks.values())], lr=RATE, ns_steps=10, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, lr=RATE)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=way.autocast):
            logits = model(ids[:, :-1], use_cache=False).logits
        model.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
        for p, views in stacks.items():
            if p.grad is not None:
                for view, gradient in zip(views, p.grad.flatten(0, -3)):
                    view.grad = gradient
        muon.step()
        for view in itertools.chain(*stacks.values()):
            view.grad = None  # it would keep the stack's gradients through the next pass
        adamw.step()

    return run


def measured(folder: Path, way: Way, tokens: int, steps: int) -> tuple[float, int]:
    """Of a fresh process: the fastest of some steps after one, in seconds, and the most resident bytes."""
    torch.manual_seed(0)
    ids = torch.randint(0, 258, (1, tokens + 1))
    torch.set_num_threads(way.threads)
    with PeakMemory() as memory:
        run = their_step(folder, ids, way) if way.side == THEIRS else our_step(folder, ids, way)[1]
        side = Side(run, way.threads)
        side.seconds()
        seconds = min(side.seconds() for _ in range(steps))
        most = memory.most()
    return seconds, most


def contest(folder: Path, tokens: int, options: argparse.Namespace) -> list[list[str]]:
    """A row for each side."""
    best: dict[str, Way] = {}
    for side in (THEIRS, OURS):
        ways = [Way(side, *way) for way in itertools.product((False, True), options.threads)]
        best[side] = min(ways, key=lambda way: in_child(measured, folder, way, tokens, 1)[0])
    best[DEFAULT] = Way(DEFAULT, False, DEFAULTS.threads)  # a recipe that sets no autocast
    best |= {side: replace(best[OURS], side=side) for side in (RECOMPUTED, NO_MORE)}
    seconds: dict[str, list[float]] = {side: [] for side in best}
    memory = dict.fromkeys(best, 0)
    for _ in range(options.rounds):
        for side, way in best.items():
            took, most = in_child(measured, folder, way, tokens, options.steps)
            seconds[side].append(took)
            memory[side] = max(memory[side], most)
    times = {side: Timing(rounds) for side, rounds in seconds.items()}
    rows = []
    for side, way in best.items():
        faster, smaller = ratio(times[THEIRS], times[side]), memory[THEIRS] / memory[side]
        row = [f"{tokens:,}", side, str(way), times[side].milliseconds(), f"{memory[side] / 2**20:,.0f}"]
        if side != THEIRS:
            row += [f"{faster:.2f}", f"{smaller:.2f}"]
        rows.append([*row, *[""] * (7 - len(row))])
        print(" | ".join(rows[-1]), flush=True)
    return rows


def hyper_connections(options: argparse.Namespace) -> list[list[str]]:
    """How much of a step the residual streams take, by preset."""
    rows = []
    for preset, batch, length in (("small", 1, 2048), ("tiny", 16, 256)):
        threads = max(options.threads)
        times = in_child(parts, preset, [FULL, PLAIN_RESIDUALS], batch, length, options.rounds, threads)
        share = 100 * (1 - 1 / ratio(times[FULL], times[PLAIN_RESIDUALS]))
        seconds = (times[name].milliseconds() for name in (FULL, PLAIN_RESIDUALS))
        rows.append([preset, f"{batch} x {length:,}", *seconds, f"{share:.0f}%"])
    return rows


def measure(options: argparse.Namespace) -> Findings:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_weights(ModelConfig.from_preset(options.preset), Path(folder))
        for tokens in options.lengths:
            rows += contest(Path(folder) / "rounded", tokens, options)
    header = ["tokens", "side", "at", "ms", "most resident, MiB", "times faster", "times less memory"]
    shares = table(
        ["preset", "rows x tokens", "a step, ms", "with plain residuals, ms", "streams' share"],
        hyper_connections(options),
    )
    return Findings(f"{table(header, rows)}\n### What the residual streams cost\n\n{shares}")


def main(arguments: list[str] | None = None) -> str:
    parser = options_of(__doc__, threads=[1, 2])
    parser.add_argument("--preset", default="small", help="of the contest")
    parser.add_argument("--lengths", type=count, nargs="+", default=LENGTHS)
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--steps", type=count, default=3, help="of a round, of which the fastest counts")
    return benchmark(parser, measure, arguments)


if __name__ == "__main__":
    command_line(main)
