"""One network over the sequence's length on one device: reading a prompt, decoding, bytes. Needs nothing but torch.

    python -m benchmarks.on_device [--device cuda] [--preset small] [--lengths 4096 ... 1048576] [--weights bfloat16]

Caches are filled with random entries up to each length. Seconds are medians over rounds after a first one that is not
counted; a GPU is waited for. Memory is the most that was allocated beyond the network, the cache included (GPUs only).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.report import command_line, count, table
from model.cache import Cache
from model.cache_filling import fill_random
from model.config import ModelConfig
from model.errors import FiftyfoldError
from model.execution import Execution
from model.generation import prefill
from model.transformer import Transformer

LENGTHS = [1 << power for power in range(12, 21, 2)]


class Bench:
    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, torch.device(options.device)
        config = ModelConfig.from_preset(options.preset)
        torch.manual_seed(0)
        self.model = Transformer(config.replace(max_positions=max(config.max_positions, *options.lengths)))
        self.model.eval().to(self.device).store_weights(getattr(torch, options.weights))
        self.model.execution = Execution(options.execution)

    def row(self, length: int) -> list[str]:
        """Milliseconds per token of decoding and of reading the last tokens before ``length``, and bytes."""
        options = self.options
        least = (options.rounds + 1) * (options.tokens + options.prompt)
        if length <= least:
            raise FiftyfoldError(f"--lengths: {length} tokens are not more than the {least} to be read and decoded")
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        cache = Cache(self.model.config, 1, length, self.device)
        fill_random(cache, length - least)
        vocabulary = self.model.config.vocab_size
        ids = torch.randint(vocabulary, (1, max(options.prompt, options.tokens)), device=self.device)

        def decode() -> None:
            for token in ids[:, : options.tokens].split(1, dim=1):
                self.model(token, cache, last_only=True)

        per_token = self._seconds(decode) / options.tokens
        per_read = (
            self._seconds(lambda: prefill(self.model, cache, ids[:, : options.prompt], options.chunk)) / options.prompt
        )
        peak = f"{(torch.cuda.max_memory_allocated() - before) / 2**20:,.0f}" if on_gpu else ""
        return [
            f"{length:,}",
            f"{1e3 * per_token:.3g}",
            f"{1e3 * per_read:.3g}",
            f"{cache.nbytes() / 2**20:,.1f}",
            peak,
        ]

    @torch.inference_mode()
    def _seconds(self, run: Callable[[], object]) -> float:
        times = []
        for _ in range(self.options.rounds + 1):
            self._wait()
            started = time.perf_counter()
            run()
            self._wait()
            times.append(time.perf_counter() - started)
        return statistics.median(times[1:])

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def title(self) -> str:
        name = torch.cuda.get_device_name() if self.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        how = f"preset '{self.options.preset}', weights in {self.options.weights}, computed {self.options.execution}"
        return f"{name}; torch {torch.__version__.split('+')[0]}; {how}, pieces of {self.options.chunk:,}"


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--lengths", type=count, nargs="+", default=LENGTHS)
    parser.add_argument("--weights", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--execution", choices=["eager", "compiled"], default="eager")
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--tokens", type=count, default=16, help="decoded in a round")
    parser.add_argument("--prompt", type=count, default=512, help="tokens read in a round")
    parser.add_argument("--chunk", type=count, default=512)
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise FiftyfoldError("--device cuda: this machine has no GPU that torch can use")
    bench = Bench(options)
    header = ["tokens", "decode, ms per token", "prompt, ms per token", "cache, MiB", "memory, MiB"]
    text = f"{bench.title()}\n\n{table(header, [bench.row(length) for length in options.lengths])}"
    print(text)
    return text


if __name__ == "__main__":
    command_line(main)
