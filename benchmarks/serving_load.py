"""Reliability of an endpoint under load, without Ray: errors, cache pages and memory.

    python -m benchmarks.serving_load [--minutes 10] [--clients 16] [--preset tiny] [--write docs/serving-load.md]

Clients send requests of random lengths, alone and in batches, cancel some, disconnect from some, and read some slowly
(:mod:`benchmarks.lib.load`), to a server in a process of its own with a small cache, so that it is often full.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from pathlib import Path

import torch

from benchmarks.lib.harness import Result, make_parser, positive_int, run_benchmark, run_main
from benchmarks.lib.load import WARM_UP_SHARE, Load, Report
from benchmarks.lib.report import table
from benchmarks.lib.server import MODEL_NAME, running_server
from model import checkpoint
from model.config import ModelConfig
from model.tokenizer import load_tokenizer
from model.transformer import Transformer

CONTEXT = 2048
SETTINGS = {"max_active_requests": 8, "cache_mebibytes": 8, "kept_prefixes": 32, "weights": "float32"}


def save_random(folder: Path, preset: str, context: int = CONTEXT) -> None:
    """Save a random network with the byte tokenizer."""
    torch.manual_seed(0)
    config = ModelConfig.from_preset(preset, zero_init_output=False, max_positions=context)
    checkpoint.save(Transformer(config).eval(), folder, load_tokenizer("byte"))


def load_server(folder: Path, seconds: float, clients: int, context: int = CONTEXT) -> tuple[Report, int]:
    """Put load on a server of a checkpoint; return the report and the cache pages that stayed in use."""
    with running_server(folder, **SETTINGS) as server:
        report = asyncio.run(Load(server.url, MODEL_NAME, context).run(seconds, clients, server.pid))
    return report, server.at_end["used_pages"]


def measure(options: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        save_random(Path(folder) / "model", options.preset)
        report, pages = load_server(Path(folder) / "model", 60 * options.minutes, options.clients)
    text = f"Network: '{options.preset}'; {options.minutes:g} minutes, {options.clients} clients.\n\n"
    text += table(["request", "ended as it should"], sorted(report.requests.items()))
    text += f"\nErrors of the server: {len(report.errors)}."
    text += "".join(f"\n* {error}" for error in report.errors[:20])
    text += f"\n\nGenerated tokens read: {report.tokens:,}. Cache pages in use at the end: {pages}. "
    text += f"Memory: {report.memory[0][1]:.0f} MiB at the start, {report.memory[-1][1]:.0f} MiB at the end, "
    text += f"{report.slope:+.2f} MiB per minute after the first {WARM_UP_SHARE:.0%} of the time.\n"
    return Result(text, has_servers=True)


def main(arguments: list[str] | None = None) -> str:
    parser = make_parser(__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=positive_int, default=16)
    parser.add_argument("--preset", default="tiny")
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    run_main(main)
