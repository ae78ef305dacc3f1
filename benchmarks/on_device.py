"""Prefill, decoding, and memory over the sequence length on one device. Requires only torch.

    python -m benchmarks.on_device [--device cuda] [--preset small] [--lengths 4096 ... 1048576]

Caches are filled with random entries up to each length. Rows show weights in float32, the default, and in bfloat16.
Times are medians over rounds after a warm-up round, with GPU synchronization. Memory is the peak allocation beyond the
network, including the cache (GPUs only).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.lib.harness import Result, make_parser, positive_int, run_benchmark, run_main
from benchmarks.lib.report import table
from model.cache import Cache
from model.cache.random_fill import fill_random
from model.config import ModelConfig
from model.errors import FiftyfoldError
from model.generation import prefill
from model.transformer import Transformer

PRECISIONS = ["float32", "bfloat16"]
LENGTHS = [1 << power for power in range(12, 21, 2)]


class Bench:
    """A network with weights in one precision."""

    def __init__(self, options: argparse.Namespace, weights: str):
        self.options, self.weights, self.device = options, weights, torch.device(options.device)
        config = ModelConfig.from_preset(options.preset)
        torch.manual_seed(0)
        self.model = Transformer(config.replace(max_positions=max(config.max_positions, *options.lengths)))
        self.model.eval().to(self.device)
        if weights != "float32":
            self.model.cast_weights(getattr(torch, weights))

    def row(self, length: int) -> list[str]:
        """Time prefill and decoding of the last tokens before ``length``. Returns a table row."""
        options = self.options
        needed = (options.rounds + 1) * (options.tokens + options.prompt)
        if length <= needed:
            raise FiftyfoldError(f"--lengths: {length} tokens are not more than the {needed} tokens to read and decode")
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        cache = Cache(self.model.config, 1, length, self.device)
        fill_random(cache, length - needed)
        vocab_size = self.model.config.vocab_size
        ids = torch.randint(vocab_size, (1, max(options.prompt, options.tokens)), device=self.device)

        def decode() -> None:
            for token in ids[:, : options.tokens].split(1, dim=1):
                self.model(token, cache, last_only=True)

        per_token = self._seconds(decode) / options.tokens
        per_prefilled = (
            self._seconds(lambda: prefill(self.model, cache, ids[:, : options.prompt], options.chunk)) / options.prompt
        )
        peak = f"{(torch.cuda.max_memory_allocated() - before) / 2**20:,.0f}" if on_gpu else ""
        return [
            f"{length:,}",
            self.weights,
            f"{1e3 * per_token:.3g}",
            f"{1e3 * per_prefilled:.3g}",
            f"{cache.nbytes() / 2**20:,.1f}",
            peak,
        ]

    @torch.inference_mode()
    def _seconds(self, run: Callable[[], object]) -> float:
        times = []
        for _ in range(self.options.rounds + 1):
            self._synchronize()
            started = time.perf_counter()
            run()
            self._synchronize()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def measure(options: argparse.Namespace) -> Result:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise FiftyfoldError("--device cuda: torch finds no GPU on this machine")
    torch.set_num_threads(options.threads)
    rows: list[list[str]] = []
    for weights in options.weights:
        bench = Bench(options, weights)
        rows += [bench.row(length) for length in options.lengths]
        del bench
    header = ["tokens", "weights", "decode, ms per token", "prompt, ms per token", "cache, MiB", "memory, MiB"]
    return Result(f"Preset '{options.preset}', pieces of {options.chunk:,} tokens.\n\n{table(header, rows)}")


def main(arguments: list[str] | None = None) -> str:
    parser = make_parser(__doc__, threads=torch.get_num_threads())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--lengths", type=positive_int, nargs="+", default=LENGTHS)
    parser.add_argument("--weights", choices=PRECISIONS, nargs="+", default=PRECISIONS)
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--tokens", type=positive_int, default=16, help="tokens decoded per round")
    parser.add_argument("--prompt", type=positive_int, default=512, help="tokens prefilled per round")
    parser.add_argument("--chunk", type=positive_int, default=512)
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    run_main(main)
