"""Throughput, latency and memory of the serving engine, without HTTP.

    python -m benchmarks.serving_engine [--preset tiny] [--threads 1] [--rounds 3] [--write docs/serving-speed.md]

Measures a randomly initialized network with the byte tokenizer:

* tokens per second of 1, 4, 16 and 64 concurrent streams, interleaved;
* time per decoding step outside the forward pass, at 16 streams;
* time between the tokens of 8 streams, alone and while a prompt of ``--long`` tokens is read;
* time to the first token of a prompt of ``--prefix`` tokens, cold and repeated;
* cache bytes of 64 sequences of ``--prefix`` tokens, beside 2 sequences of a model with BF16 GQA-8.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import time
from dataclasses import dataclass

import torch

from benchmarks.lib.harness import Result, make_parser, positive_int, run_benchmark, run_main
from benchmarks.lib.report import table
from model.config import ModelConfig
from model.costs import gqa8_costs
from model.tokenizer import load_tokenizer
from model.transformer import Transformer
from serve.engine import Engine, EngineConfig, SamplingParams

STREAMS = (1, 4, 16, 64)
PROMPT_TOKENS, NEW_TOKENS = 128, 128


@dataclass
class Arrivals:
    """Times of a stream's first token and of the tokens after it, in seconds."""

    first: float
    gaps: list[float]


async def read(engine: Engine, prompt: list[int], new_tokens: int, seed: int = 0) -> Arrivals:
    """Run one completion that ignores EOS."""
    started = time.perf_counter()
    # One log-probability per token makes every token arrive by itself, also within a character.
    params = SamplingParams(max_tokens=new_tokens, seed=seed, ignore_eos=True, logprobs=0)
    times = []
    async for _, delta in engine.submit([(prompt, params)]):
        if delta.logprobs:
            times.append(time.perf_counter())
    return Arrivals(times[0] - started, [b - a for a, b in itertools.pairwise(times)])


def prompt(tokens: int, seed: int) -> list[int]:
    return torch.randint(0, 250, (tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


async def throughput(engine: Engine, streams: int) -> tuple[float, float]:
    """Return decoded tokens per second, and the share of the decoding time outside the forward pass."""
    before = (engine.stats.decode_seconds, engine.stats.model_seconds)
    arrivals = await asyncio.gather(
        *(read(engine, prompt(PROMPT_TOKENS, seed), NEW_TOKENS, seed) for seed in range(streams))
    )
    decode, model = (now - then for now, then in zip((engine.stats.decode_seconds, engine.stats.model_seconds), before))
    # From the first token of the last stream on, all streams are decoded together.
    seconds = max(sum(one.gaps) for one in arrivals)
    return sum(len(one.gaps) for one in arrivals) / seconds, 1 - model / decode


async def beside_a_long_prompt(engine: Engine, long_tokens: int) -> tuple[list[float], list[float]]:
    """Return the gaps between tokens of 8 streams before and while a long prompt is read."""
    gaps: tuple[list[float], list[float]] = ([], [])
    most = min(20_000, engine.model_config.max_positions - PROMPT_TOKENS)
    reading = asyncio.Event()
    stop = asyncio.Event()

    async def stream(seed: int) -> None:
        params = SamplingParams(max_tokens=most, seed=seed, ignore_eos=True, logprobs=0)
        running, last = engine.submit([(prompt(PROMPT_TOKENS, seed), params)]), None
        async for _, delta in running:
            now = time.perf_counter()
            if delta.logprobs and last is not None:
                gaps[reading.is_set()].append(now - last)
            last = now
            if stop.is_set():
                running.abort()
                return

    streams = [asyncio.create_task(stream(seed)) for seed in range(8)]
    await asyncio.sleep(1)  # the first steps after idling are not typical
    gaps[0].clear()
    await asyncio.sleep(4)
    reading.set()
    await read(engine, prompt(long_tokens, 1_000), 1)
    stop.set()
    await asyncio.gather(*streams)
    return gaps


async def prefix_times(engine: Engine, tokens: int) -> tuple[float, float]:
    """Return the time to the first token of a prompt, cold and repeated with another ending."""
    shared = prompt(tokens, 2_000)
    cold = (await read(engine, [*shared, 1, 2, 3], 1)).first
    warm = [(await read(engine, [*shared, 4, 5, ending], 1)).first for ending in range(5)]
    return cold, statistics.median(warm)


async def measure_all(options: argparse.Namespace) -> str:
    torch.manual_seed(0)
    config = ModelConfig.from_preset(options.preset, zero_init_output=False)
    config = config.replace(max_positions=max(config.max_positions, options.long + 1024))
    model = Transformer(config).eval()
    model.place_weights()
    engine = Engine(model, load_tokenizer("byte"), EngineConfig(max_active_requests=64, kept_prefixes=16))
    speeds: dict[int, list[float]] = {streams: [] for streams in STREAMS}
    overheads: list[float] = []
    for round_ in range(options.rounds + 1):
        for streams in STREAMS:
            speed, overhead = await throughput(engine, streams)
            if round_:  # the first round warms up
                speeds[streams].append(speed)
                if streams == 16:
                    overheads.append(overhead)
    one = statistics.median(speeds[1])
    rows = [
        [streams, f"{statistics.median(found):,.0f} ({min(found):,.0f}-{max(found):,.0f})",
         f"{statistics.median(found) / one:.1f}"]
        for streams, found in speeds.items()
    ]  # fmt: skip
    text = "### Concurrent streams\n\n" + table(["streams", "tokens/s", "times one stream"], rows)
    text += f"\nOutside the forward pass at 16 streams: {100 * statistics.median(overheads):.0f}% of a decoding step.\n"

    before, beside = await beside_a_long_prompt(engine, options.long)
    rows = [
        [name, f"{1e3 * statistics.median(found):.1f}", f"{1e3 * statistics.fmean(found):.1f}",
         f"{1e3 * statistics.quantiles(found, n=100)[98]:.1f}"]
        for name, found in (("alone", before), (f"beside a prompt of {options.long:,} tokens", beside))
    ]  # fmt: skip
    text += "\n### Time between the tokens of 8 streams\n\n" + table(["", "median ms", "mean ms", "p99 ms"], rows)

    cold, warm = await prefix_times(engine, options.prefix)
    text += f"\n### Time to the first token of {options.prefix:,} tokens\n\n" + table(
        ["cold ms", "repeated ms", "ratio"], [[f"{1e3 * cold:.0f}", f"{1e3 * warm:.1f}", f"{cold / warm:.0f}"]]
    )
    ours = 64 * engine.memory.cache_bytes(options.prefix)
    theirs = 2 * gqa8_costs(config).cache_bytes(options.prefix)
    text += f"\n### Cache bytes at {options.prefix:,} tokens\n\n" + table(
        ["64 sequences, MiB", "2 sequences in BF16 GQA-8, MiB"], [[f"{ours / 2**20:.1f}", f"{theirs / 2**20:.1f}"]]
    )
    await engine.stop()
    return text


def measure(options: argparse.Namespace) -> Result:
    torch.set_num_threads(options.threads)
    return Result(f"Network: '{options.preset}'.\n\n{asyncio.run(measure_all(options))}")


def main(arguments: list[str] | None = None) -> str:
    parser = make_parser(__doc__, threads=1)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--rounds", type=positive_int, default=3)
    parser.add_argument("--long", type=positive_int, default=32_768)
    parser.add_argument("--prefix", type=positive_int, default=16_384)
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    run_main(main)
