"""Speed of the small networks of the five families: training step, against transformers, and decoding up to 1M tokens.

    python -m benchmarks.family_speed [--threads 1] [--rounds 3] [--write docs/family-speed.md]

The networks are the presets `tiny`, `tiny-v32`, `tiny-mamba2`, `tiny-kimi` and `tiny-gqa`, with random weights.

* A training step of 32 rows of 256 tokens, with Muon and the auxiliary losses, in the precision that `autocast: auto`
  picks. Ratios to `tiny` are taken within rounds.
* Forward and backward pass of one sequence against transformers' own network with equal weights, in float32.
  transformers' Mamba-2 has no feed-forward, so ours has none there either.
* One decoded token behind a cache of 1K to 1M tokens. `kda` is `tiny-kimi` without its latent attention layer.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from benchmarks.lib.decoding import next_logits
from benchmarks.lib.harness import Result, make_parser, positive_int, run_benchmark, run_main
from benchmarks.lib.report import table
from benchmarks.lib.timing import Timer, speedup, time_interleaved
from benchmarks.lib.training import training_step
from kernels.hardware import multiplies_bf16_fast
from model.cache import Cache
from model.cache.random_fill import fill_random
from model.config import ModelConfig
from model.hf import export_pretrained, import_pretrained
from model.optim import MuonAdamW, OptimizerConfig
from model.transformer import Transformer

TINY = "tiny"
PRESETS = (TINY, "tiny-v32", "tiny-mamba2", "tiny-kimi", "tiny-gqa")
CLASSES = {
    "tiny-v32": "DeepseekV32ForCausalLM",
    "tiny-mamba2": "Mamba2ForCausalLM",
    "tiny-kimi": "KimiLinearForCausalLM",
}
"""Transformers' classes by preset."""
CONTEXTS = [1024, 16_384, 131_072, 1_048_576]
MAX_DECODED = 32
"""Maximum number of tokens per round of decoding."""
DECODING_SECONDS = 0.3
"""Approximate length of a round, except that it decodes at least two tokens."""


def train_steps(options: argparse.Namespace) -> str:
    """Return the table of training steps."""
    ids = torch.randint(0, 258, (options.rows, options.length + 1))
    bfloat16 = multiplies_bf16_fast("cpu")
    timers = {}
    for preset in PRESETS:
        model = Transformer(ModelConfig.from_preset(preset)).train()
        config = OptimizerConfig(ns_dtype="bfloat16" if bfloat16 else "float32")
        optimizer = MuonAdamW(model.named_parameters(), config, model.split_sizes())
        step = functools.partial(training_step, model, optimizer, ids, autocast=bfloat16)
        timers[preset] = Timer(step, options.threads)
    times = time_interleaved(timers, options.rounds)
    rows = [[name, t.milliseconds(), f"{1 / speedup(times[TINY], t):.2f}"] for name, t in times.items()]
    about = f"{options.rows} rows of {options.length} tokens, {'BF16 autocast' if bfloat16 else 'float32'}.\n\n"
    return about + table(["network", "ms", "times `tiny`"], rows)


def against_transformers(options: argparse.Namespace) -> str:
    """Return the table of forward and backward passes beside transformers."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    rows = []
    for preset, class_name in CLASSES.items():
        config = ModelConfig.from_preset(preset, **({"ffn": "none"} if preset == "tiny-mamba2" else {}))
        with tempfile.TemporaryDirectory() as folder:
            export_pretrained(Transformer(config), Path(folder) / "a")
            ours = import_pretrained(Path(folder) / "a").train()
            theirs = getattr(transformers, class_name).from_pretrained(Path(folder) / "a").train()
        for length in options.lengths:
            ids = torch.randint(0, 258, (1, length + 1))
            sides: dict[str, Callable[[Tensor], Any]] = {
                "theirs": lambda x, network=theirs: network(x, use_cache=False).logits,
                "ours": ours,
            }
            timers = {
                side: Timer(functools.partial(forward_and_backward, forward, ids), options.threads)
                for side, forward in sides.items()
            }
            times = time_interleaved(timers, options.rounds)
            faster = speedup(times["theirs"], times["ours"])
            rows.append([preset, f"{length:,}", *(t.milliseconds() for t in times.values()), f"{faster:.1f}"])
            print(" | ".join(rows[-1]), flush=True)
    return table(["network", "tokens", "transformers, ms", "ours, ms", "times faster"], rows)


def forward_and_backward(forward: Callable[[Tensor], Tensor], ids: Tensor) -> None:
    """Compute the gradients of the next-token loss on ids int64 [1, S + 1]."""
    F.cross_entropy(forward(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()


def decoding(options: argparse.Namespace) -> str:
    """Return the table of decoded tokens by cache length."""
    configs = {preset: ModelConfig.from_preset(preset) for preset in PRESETS}
    kimi = configs["tiny-kimi"]
    configs["kda"] = kimi.replace(layers=("kda",) * kimi.num_layers, mixer_options={})
    rows = []
    for name, config in configs.items():
        model = Transformer(config.replace(max_positions=max(options.contexts) + 4096)).eval()
        timers = {}
        for tokens in options.contexts:
            cache = Cache(model.config, 1, tokens + (options.rounds + 2) * MAX_DECODED)
            fill_random(cache, tokens)
            once = Timer(functools.partial(decode, model, cache, 1), options.threads)
            seconds = min(once.seconds() for _ in range(2))
            count = min(MAX_DECODED, max(2, int(DECODING_SECONDS / seconds)))
            timers[tokens] = Timer(functools.partial(decode, model, cache, count), options.threads, count)
        times = time_interleaved(timers, options.rounds)
        growth = 1 / speedup(times[options.contexts[0]], times[options.contexts[-1]])
        rows.append([name, *(t.milliseconds() for t in times.values()), f"{growth:.2f}"])
        print(" | ".join(rows[-1]), flush=True)
    header = ["network", *(f"{tokens:,} tokens, ms" for tokens in options.contexts), "last over first"]
    return table(header, rows)


@torch.inference_mode()
def decode(model: Transformer, cache: Cache, count: int) -> None:
    """Decode ``count`` tokens."""
    token = torch.zeros(1, 1, dtype=torch.long)
    for _ in range(count):
        next_logits(model, token, cache)


def measure(options: argparse.Namespace) -> Result:
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    parts = {
        "Training step": train_steps,
        "Forward and backward pass against transformers": against_transformers,
        "One decoded token": decoding,
    }
    return Result("\n".join(f"### {title}\n\n{part(options)}" for title, part in parts.items()))


def main(arguments: list[str] | None = None) -> str:
    parser = make_parser(__doc__, threads=1)
    parser.add_argument("--rows", type=positive_int, default=32)
    parser.add_argument("--length", type=positive_int, default=256)
    parser.add_argument("--lengths", type=positive_int, nargs="+", default=[512, 2048], help="against transformers")
    parser.add_argument("--contexts", type=positive_int, nargs="+", default=CONTEXTS)
    parser.add_argument("--rounds", type=positive_int, default=3)
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    run_main(main)
