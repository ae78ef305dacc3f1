"""Speed of speculative decoding with a trained model, beside decoding without drafts.

    python -m benchmarks.speculation --checkpoint FOLDER [--threads 1] [--rounds 3] [--write docs/speculation.md]

The checkpoint needs a multi-token prediction module (``model.mtp_layers 1``). Streams continue pieces of a module of
Python's standard library. Reports tokens per step and stream, the share of accepted drafts, and tokens per second
relative to no drafts. Settings are measured in turn.
"""

from __future__ import annotations

import argparse
import difflib
import statistics
import time
from pathlib import Path

import torch

from benchmarks.lib.harness import Result, make_parser, positive_int, run_benchmark, run_main
from benchmarks.lib.report import table
from model import checkpoint
from model.tokenizer import Tokenizer, load_tokenizer
from model.transformer import Transformer
from serve.engine import EngineConfig, SamplingParams
from serve.engine.scheduler import Scheduler
from serve.engine.sequence import Sequence

STREAMS = (1, 4, 16)
TEMPERATURES = (0.0, 1.0)
DRAFTS = (0, 1, 2, 3)
PROMPT_TOKENS, NEW_TOKENS = 128, 96


def decode(
    model: Transformer, tokenizer: Tokenizer, streams: int, temperature: float, drafts: int
) -> tuple[float, float, float]:
    """Return tokens per step and stream, the share of accepted drafts, and seconds per token, while all streams are
    decoded together."""
    scheduler = Scheduler(model, EngineConfig(speculative_tokens=drafts, kept_prefixes=0, prefill_share=1e9))
    text = tokenizer.encode(Path(difflib.__file__).read_text())
    sequences = []
    for i in range(streams):
        prompt = text[1000 + 300 * i :][:PROMPT_TOKENS]
        params = SamplingParams(max_tokens=NEW_TOKENS, temperature=temperature, seed=i, ignore_eos=True)
        sequences.append(Sequence(prompt, params, tokenizer, time.monotonic() + 3600))
    scheduler.step(sequences)
    while len(scheduler.batch) < streams and scheduler.has_unfinished:
        scheduler.step()
    stats = scheduler.stats
    tokens, steps, started = stats.decoded_tokens, stats.decode_steps, time.perf_counter()
    while len(scheduler.batch) == streams:
        scheduler.step()
    seconds, tokens = time.perf_counter() - started, stats.decoded_tokens - tokens
    accepted = stats.accepted_tokens / stats.drafted_tokens if stats.drafted_tokens else 0.0
    return tokens / streams / (stats.decode_steps - steps), accepted, seconds / tokens


def measure(options: argparse.Namespace) -> Result:
    torch.set_num_threads(options.threads)
    model = checkpoint.load(options.checkpoint)
    model.place_weights()
    tokenizer = load_tokenizer(options.checkpoint, model_vocab_size=model.config.vocab_size)
    rows = []
    for streams in STREAMS:
        for temperature in TEMPERATURES:
            times: dict[int, list[float]] = {drafts: [] for drafts in DRAFTS}
            found: dict[int, tuple[float, float, float]] = {}
            for round_ in range(options.rounds + 1):
                for drafts in DRAFTS:
                    found[drafts] = decode(model, tokenizer, streams, temperature, drafts)
                    if round_:  # the first round warms up
                        times[drafts].append(found[drafts][2])
            plain = statistics.median(times[0])
            for drafts in DRAFTS:
                seconds, (per_step, accepted, _) = statistics.median(times[drafts]), found[drafts]
                share = f"{100 * accepted:.0f}%" if drafts else ""
                rows.append(
                    [streams, f"{temperature:g}", drafts, f"{per_step:.2f}", share, f"{1 / seconds:,.0f}",
                     f"{plain / seconds:.2f}"]
                )  # fmt: skip
    names = ["streams", "temperature", "drafts", "tokens per step", "accepted", "tokens/s", "times no drafts"]
    return Result(table(names, rows))


def main(arguments: list[str] | None = None) -> str:
    parser = make_parser(__doc__, threads=1)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--rounds", type=positive_int, default=3)
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    run_main(main)
