"""Training on one device: tokens per second, memory, MFU, and the optimizer's share. Requires only torch.

    python -m benchmarks.training_on_device [--device cuda] [--presets small base] [--rows 4] [--length 4096]
                                            [--peak-tflops 989] [--activation-checkpointing]

Forward and backward pass in BF16 autocast are timed separately from the optimizer step. Times are medians over rounds
after a warm-up round, with GPU synchronization. Model FLOPs are the closed form of the forward pass, averaged over
positions, plus twice as many for the backward pass; recomputation and optimizer are not included. Utilization is
relative to ``--peak-tflops``, the device's peak for dense BF16 products. The optimizer's share refers to a step of half
a million tokens: as many batches and one optimizer step. Memory is the peak allocation, including weights and optimizer
state (GPUs only).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.lib.harness import Result, make_parser, positive_int, run_benchmark, run_main
from benchmarks.lib.report import table
from benchmarks.lib.training import training_loss
from model.config import ModelConfig
from model.costs import decode_work
from model.errors import FiftyfoldError
from model.optim import MuonAdamW, OptimizerConfig
from model.transformer import Transformer

BATCH_TOKENS = 500_000
HEADER = ["preset", "rows x tokens", "batch, ms", "tokens/s", "model TFLOP/s", "utilization", "optimizer, ms"]
HEADER += [f"its share at {BATCH_TOKENS:,} tokens", "memory, GiB"]
_POSITIONS = 256
"""Number of positions over which FLOPs are averaged."""


def model_flops(config: ModelConfig, length: int) -> float:
    """Return the mean FLOPs per token of forward and backward pass for sequences of ``length`` tokens."""
    positions = [max(1, round((i + 0.5) * length / _POSITIONS)) for i in range(_POSITIONS)]
    return 3 * statistics.fmean(sum(work.flops for work in decode_work(config, position)) for position in positions)


def row(preset: str, options: argparse.Namespace) -> list[str]:
    device, on_gpu = torch.device(options.device), options.device == "cuda"
    config = ModelConfig.from_preset(preset)
    config = config.replace(max_positions=max(config.max_positions, options.length))
    torch.manual_seed(0)
    model = Transformer(config).train().to(device)
    model.activation_checkpointing = options.activation_checkpointing
    optimizer = MuonAdamW(model.named_parameters(), OptimizerConfig(ns_dtype="bfloat16"), model.split_sizes())
    ids = torch.randint(config.vocab_size, (options.rows, options.length + 1), device=device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    passes, updates = [], []
    for _ in range(options.rounds + 1):
        model.zero_grad(set_to_none=True)
        passes.append(_seconds(lambda: training_loss(model, ids).backward(), on_gpu))
        updates.append(_seconds(optimizer.step, on_gpu))
    batch, update = statistics.median(passes[1:]), statistics.median(updates[1:])
    tokens = options.rows * options.length
    per_second = tokens / batch
    achieved = per_second * model_flops(config, options.length) / 1e12
    return [
        preset,
        f"{options.rows} x {options.length:,}",
        f"{1e3 * batch:.3g}",
        f"{per_second:,.0f}",
        f"{achieved:.3g}",
        f"{100 * achieved / options.peak_tflops:.2g}%" if options.peak_tflops else "",
        f"{1e3 * update:.3g}",
        f"{100 * update / (update + batch * BATCH_TOKENS / tokens):.2g}%",
        f"{torch.cuda.max_memory_allocated() / 2**30:.1f}" if on_gpu else "",
    ]


def _seconds(run: Callable[[], object], on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measure(options: argparse.Namespace) -> Result:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise FiftyfoldError("--device cuda: torch finds no GPU on this machine")
    torch.set_num_threads(options.threads)
    how = f"recomputed: {'yes' if options.activation_checkpointing else 'no'}"
    rows = [row(preset, options) for preset in options.presets]
    return Result(f"BF16 autocast, {how}.\n\n{table(HEADER, rows)}")


def main(arguments: list[str] | None = None) -> str:
    parser = make_parser(__doc__, threads=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--presets", nargs="+", default=["small", "base"])
    parser.add_argument("--rows", type=positive_int, default=4)
    parser.add_argument("--length", type=positive_int, default=4096)
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--peak-tflops", type=float, help="peak of the device for dense BF16 products")
    parser.add_argument("--activation-checkpointing", action="store_true", help="recompute layers in the backward pass")
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    run_main(main)
