"""Training step against transformers' ``DeepseekV4ForCausalLM`` with `torch.optim.Muon`, and the cost of mHC.

    python -m benchmarks.training_step [--lengths 512 2048] [--write docs/training-step.md]

Measures forward pass, backward pass, and optimizer for one sequence, with equal weights. Every contender runs in a
separate process, whose peak resident memory includes torch. Runs are interleaved, and ratios are taken within rounds. A
trial step selects each network's fastest precision (float32, or BF16 autocast over float32 weights) and number of
threads; a separate row shows ours with the defaults, in float32.

Transformers' matrices use PyTorch's Muon, each expert separately (gate and up projections as one matrix; ours are two).
Other parameters use AdamW, as in ours. Ours also trains the indexers and rounds experts and cache entries; a separate
row shows it without these.
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

from benchmarks.lib.contenders import DEFAULTS, TransformersNetwork, write_weights
from benchmarks.lib.harness import Result, make_parser, positive_int, run_benchmark, run_main
from benchmarks.lib.report import table
from benchmarks.lib.timing import PeakMemory, Timer, Timing, format_threads, run_in_subprocess, speedup
from benchmarks.lib.training import training_step
from benchmarks.step_parts import FULL, PLAIN_RESIDUALS, time_variants
from model.config import ModelConfig
from model.hf import import_pretrained
from model.optim import MuonAdamW, OptimizerConfig
from model.transformer import Transformer

ADAMW_NAMES = re.compile(r"embed_tokens|lm_head|position_bias|hc_head")
"""Transformers' names of the matrices that our optimizer updates with AdamW."""
THEIRS, OURS, DEFAULT, RECOMPUTED = "transformers", "ours, fastest", "ours, defaults", "ours, layers recomputed"
EQUAL_WORK = "ours, the tokens' loss alone, nothing rounded"
LENGTHS = [512, 2048]
RATE = 1e-3


@dataclass(frozen=True)
class Contender:
    name: str
    autocast: bool
    threads: int

    def __str__(self) -> str:
        return f"{'BF16 autocast' if self.autocast else 'float32'}, {format_threads(self.threads)}"


def our_step(folder: Path, ids: Tensor, contender: Contender) -> tuple[Transformer, Callable[[], None]]:
    model = import_pretrained(folder).train()
    model.activation_checkpointing = contender.name == RECOMPUTED
    if contender.name == EQUAL_WORK:
        model.config = model.config.replace(qat=False)
    config = OptimizerConfig(learning_rate=RATE, adamw_learning_rate=RATE, ns_dtype="bfloat16")
    optimizer = MuonAdamW(model.named_parameters(), config, model.split_sizes())
    return model, lambda: training_step(
        model, optimizer, ids, contender.autocast, token_loss_only=contender.name == EQUAL_WORK
    )


def split_parameters(
    model: nn.Module,
) -> tuple[dict[nn.Parameter, list[nn.Parameter]], list[nn.Parameter], list[nn.Parameter]]:
    """Split the parameters of transformers' network between PyTorch's optimizers.

    Returns, for Muon, each 3-D parameter with views of its matrices, and the 2-D parameters; then those for AdamW.
    """
    stacks: dict[nn.Parameter, list[nn.Parameter]] = {}
    matrices, others = [], []
    for name, p in model.named_parameters():
        if p.dim() < 2 or ADAMW_NAMES.search(name):
            others.append(p)
        elif p.dim() > 2:
            stacks[p] = [nn.Parameter(matrix) for matrix in p.detach().flatten(0, -3)]
        else:
            matrices.append(p)
    return stacks, matrices, others


def their_step(folder: Path, ids: Tensor, contender: Contender) -> Callable[[], None]:
    model = TransformersNetwork(folder).model.train()
    stacks, matrices, others = split_parameters(model)
    muon = torch.optim.Muon(
        [*matrices, *itertools.chain(*stacks.values())], lr=RATE, ns_steps=10, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, lr=RATE)

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=contender.autocast):
            logits = model(ids[:, :-1], use_cache=False).logits
        model.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
        for p, views in stacks.items():
            if p.grad is not None:
                for view, gradient in zip(views, p.grad.flatten(0, -3)):
                    view.grad = gradient
        muon.step()
        for view in itertools.chain(*stacks.values()):
            view.grad = None  # would keep the stacked gradient alive in the next step
        adamw.step()

    return run


def measure_step(folder: Path, contender: Contender, tokens: int, steps: int) -> tuple[float, int]:
    """Return the seconds of the fastest step after a warm-up, and peak resident bytes, in a new process."""
    torch.manual_seed(0)
    ids = torch.randint(0, 258, (1, tokens + 1))
    torch.set_num_threads(contender.threads)
    with PeakMemory() as memory:
        run = their_step(folder, ids, contender) if contender.name == THEIRS else our_step(folder, ids, contender)[1]
        timer = Timer(run, contender.threads)
        timer.seconds()
        seconds = min(timer.seconds() for _ in range(steps))
        peak = memory.peak()
    return seconds, peak


def compare(folder: Path, tokens: int, options: argparse.Namespace) -> list[list[str]]:
    """Return a table row per contender."""
    best: dict[str, Contender] = {}
    for name in (THEIRS, OURS):
        candidates = [Contender(name, *setting) for setting in itertools.product((False, True), options.threads)]
        best[name] = min(candidates, key=lambda each: run_in_subprocess(measure_step, folder, each, tokens, 1)[0])
    best[DEFAULT] = Contender(DEFAULT, False, DEFAULTS.threads)  # a recipe without autocast
    best |= {name: replace(best[OURS], name=name) for name in (RECOMPUTED, EQUAL_WORK)}
    seconds: dict[str, list[float]] = {name: [] for name in best}
    memory = dict.fromkeys(best, 0)
    for _ in range(options.rounds):
        for name, contender in best.items():
            elapsed, peak = run_in_subprocess(measure_step, folder, contender, tokens, options.steps)
            seconds[name].append(elapsed)
            memory[name] = max(memory[name], peak)
    times = {name: Timing(rounds) for name, rounds in seconds.items()}
    rows = []
    for name, contender in best.items():
        faster, smaller = speedup(times[THEIRS], times[name]), memory[THEIRS] / memory[name]
        row = [f"{tokens:,}", name, str(contender), times[name].milliseconds(), f"{memory[name] / 2**20:,.0f}"]
        if name != THEIRS:
            row += [f"{faster:.2f}", f"{smaller:.2f}"]
        rows.append([*row, *[""] * (7 - len(row))])
        print(" | ".join(rows[-1]), flush=True)
    return rows


def streams_share(options: argparse.Namespace) -> list[list[str]]:
    """Return a table row per preset with the residual streams' share of a step."""
    rows = []
    for preset, batch, length in (("small", 1, 2048), ("tiny", 16, 256)):
        threads = max(options.threads)
        times = run_in_subprocess(
            time_variants, preset, [FULL, PLAIN_RESIDUALS], batch, length, options.rounds, threads
        )
        share = 100 * (1 - 1 / speedup(times[FULL], times[PLAIN_RESIDUALS]))
        seconds = (times[name].milliseconds() for name in (FULL, PLAIN_RESIDUALS))
        rows.append([preset, f"{batch} x {length:,}", *seconds, f"{share:.0f}%"])
    return rows


def measure(options: argparse.Namespace) -> Result:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_weights(ModelConfig.from_preset(options.preset), Path(folder))
        for tokens in options.lengths:
            rows += compare(Path(folder) / "rounded", tokens, options)
    header = ["tokens", "side", "at", "ms", "most resident, MiB", "times faster", "times less memory"]
    shares = table(
        ["preset", "rows x tokens", "a step, ms", "with plain residuals, ms", "streams' share"],
        streams_share(options),
    )
    return Result(f"{table(header, rows)}\n### What the residual streams cost\n\n{shares}")


def main(arguments: list[str] | None = None) -> str:
    parser = make_parser(__doc__, threads=[1, 2])
    parser.add_argument("--preset", default="small", help="preset of the comparison")
    parser.add_argument("--lengths", type=positive_int, nargs="+", default=LENGTHS)
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--steps", type=positive_int, default=3, help="steps per round, of which the fastest counts")
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    run_main(main)
