"""Prefill of a million tokens with a trained tiny model, and decoding at lengths along the way.

    python -m benchmarks.tiny_at_a_million [--checkpoint FOLDER] [--lengths 1024 ... 1048576] [--write FILE.md]

Without ``--checkpoint``, preset `tiny` is trained briefly on Python's standard library, with the plain trainer and the
recipe configs/tiny.yaml. The model's maximum position is raised as needed. A model trained on short rows gains little
from a long context; comparing the loss on the decoded tokens with their loss after at most 1,024 tokens shows whether a
long cache does harm.

The text is the standard library's source. It is prefilled in chunks, with the defaults, up to 64 tokens before each
length. These 64 tokens are decoded with teacher forcing at every precision and thread count. Rows show the defaults and
the fastest setting. Memory is the peak resident memory of the process relative to that before the cache was allocated,
after a warm-up. No cache entries are random, and no other contender runs at the same time.
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lib.contenders import DEFAULTS, OURS_DEFAULT, OURS_FASTEST, PRECISIONS, Setting, all_settings
from benchmarks.lib.decoding import next_logits
from benchmarks.lib.drawing import log_log
from benchmarks.lib.harness import Result, make_parser, positive_int, run_benchmark, run_main
from benchmarks.lib.report import table
from benchmarks.lib.timing import PeakMemory, run_in_subprocess, trim_memory
from model import checkpoint
from model.atomic_files import atomic_folder
from model.cache import Cache
from model.cache.pages import PagePool
from model.errors import DataError, FiftyfoldError
from model.generation import prefill
from model.tokenizer import Tokenizer, load_tokenizer
from model.transformer import Transformer
from pipelines.recipe.loading import load_recipe
from pipelines.steps import prepare
from pipelines.training.build import build_trainer, folder_batches

LENGTHS = [1 << n for n in range(10, 21, 2)]
DECODED, SHORT = 64, 1024
HEADER = ["tokens", "side", "at", "decode, ms per token", "loss, nats per token", f"with the last {SHORT:,} only"]
HEADER += ["read in, s", "prefill, ms per token, newest", "prefill, ms per token, all"]
HEADER += ["peak resident, MiB", "of it since the cache was made, MiB"]
RECIPE = Path(__file__).parents[1] / "configs/tiny.yaml"


class Silent:
    """Reporter for the trainer that discards metrics."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def log_event(self, step: int, message: str) -> None:
        print(f"step {step}: {message}")

    def report(self, step: int, metrics: dict[str, float], write: Callable[[Path], None] | None) -> None:
        pass


def train(steps: int, checkpoint_folder: Path) -> None:
    """Train the recipe's model for ``steps`` steps on text alone and write a checkpoint.

    Two thirds of the steps are dense; indexer warm-up and sparse steps follow.
    """
    dense, warm = steps * 2 // 3, max(1, steps // 10)
    stages = (("dense", dense), ("indexer_warmup", warm), ("sparse", max(1, steps - dense - warm)))
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "run.folder": folder,
            "data.retrieval_share": 0.0,
            "data.retrieval_validation_documents": 32,
            "train.validation_rows": 32,
            "train.stages": "[" + ", ".join(f"{{attention: {name}, steps: {n}}}" for name, n in stages) + "]",
            "train.warmup_steps": min(40, steps // 4),
            "train.context_loss_weight": 1.0,
            "train.validate_every": steps,
            "train.checkpoint_every": steps,
        }
        recipe = load_recipe([RECIPE], [f"{key}={value}" for key, value in settings.items()])
        prepare.run(recipe)
        trainer = build_trainer(recipe, folder_batches(recipe), Silent())
        trainer.run()
        with atomic_folder(checkpoint_folder) as scratch:
            trainer.snapshot().write(scratch)


def load_with_positions(folder: Path, tokens: int) -> Transformer:
    """Load a checkpoint with at least ``tokens`` positions. RoPE angles are computed, not stored."""
    model = checkpoint.load(folder)
    longer = Transformer(model.config.replace(max_positions=max(tokens, model.config.max_positions)))
    longer.load_state_dict(model.state_dict())
    return longer.eval()


def text_ids(tokenizer: Tokenizer, tokens: int) -> Tensor:
    """Return the standard library's first ``tokens`` tokens, int64 [1, tokens]. Raises DataError if it is too short."""
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        ids += tokenizer.encode(path.read_text(encoding="utf-8"))
        if len(ids) >= tokens:
            return torch.tensor([ids[:tokens]])
    raise DataError(f"--lengths: the standard library has only {len(ids)} tokens, fewer than {tokens}")


@torch.inference_mode()
def decode(model: Transformer, cache: Cache, ids: Tensor) -> tuple[float, float]:
    """Decode ids int64 [1, n]. Returns median seconds per token, and the loss in nats on the last n - 1 tokens."""
    seconds, logits = [], []
    for token in ids.split(1, dim=1):
        started = time.perf_counter()
        logits.append(next_logits(model, token, cache)[:, -1])
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), float(F.cross_entropy(torch.cat(logits[:-1]), ids[0, 1:]))


def prefill_and_decode(
    models: Mapping[str, Transformer], ids: Tensor, lengths: list[int], options: argparse.Namespace
) -> tuple[str, dict]:
    """Prefill ids int64 [1, S] with the float32 model, and decode before each length with every setting.

    Returns the table, and milliseconds per token by length for the figure.
    """
    rows = []
    lines: dict[str, dict[int, float]] = {"prefill, newest tokens": {}, OURS_DEFAULT: {}, OURS_FASTEST: {}}
    model, chunk = models[DEFAULTS.precision], options.chunk
    first = ids[:, :chunk]
    for network in models.values():  # warm up, so that one-time allocations do not count as cache
        prefill(network, Cache(network.config, 1, first.shape[1]), first, chunk)
    trim_memory()
    with PeakMemory() as memory:
        # Pages for the longest text, and for the tokens that a fork decodes.
        probe = PagePool(model.config, 0)
        pages = probe.pages_for(lengths[-1]) + probe.pages_for(DECODED) + 1
        cache = Cache(model.config, 1, lengths[-1], pool=PagePool(model.config, pages))
        done, prefill_seconds = 0, 0.0
        for length in lengths:
            piece, last = ids[:, done : length - DECODED], ids[:, length - DECODED : length]
            torch.set_num_threads(DEFAULTS.threads)
            started = time.perf_counter()
            prefill(model, cache, piece, chunk)
            elapsed = time.perf_counter() - started
            prefill_seconds += elapsed
            resident = memory.peak()
            decoded = {s: _decode_on_fork(models, cache, last, s) for s in all_settings(options.threads)}
            torch.set_num_threads(DEFAULTS.threads)
            decode(model, cache, last)
            short = Cache(model.config, 1, min(length, SHORT))
            recent = ids[:, max(0, length - SHORT) : length]
            prefill(model, short, recent[:, :-DECODED], chunk)
            _, short_loss = decode(model, short, recent[:, -DECODED:])
            lines["prefill, newest tokens"][length] = 1e3 * elapsed / piece.shape[1]
            fastest = min(decoded, key=lambda setting: decoded[setting][0])
            for label, setting in ((OURS_DEFAULT, DEFAULTS), (OURS_FASTEST, fastest)):
                per_token, loss = decoded[setting]
                lines[label][length] = 1e3 * per_token
                row = [f"{length:,}", label, str(setting), f"{1e3 * per_token:.2f}", f"{loss:.3f}", f"{short_loss:.3f}"]
                if label == OURS_DEFAULT:
                    row += [
                        f"{prefill_seconds:.1f}",
                        f"{1e3 * elapsed / piece.shape[1]:.3f}",
                        f"{1e3 * prefill_seconds / length:.3f}",
                    ]
                    row += [f"{resident / 2**20:,.0f}", f"{(resident - memory.before) / 2**20:,.1f}"]
                rows.append([*row, *[""] * (len(HEADER) - len(row))])
                print(" | ".join(rows[-1]), flush=True)
            done = length
        size = cache.nbytes()
    note = f"The cache of {lengths[-1]:,} tokens holds {size / 2**20:,.1f} MiB, fixed state included."
    return f"{table(HEADER, rows)}\n{note}\n", lines


def _decode_on_fork(
    models: Mapping[str, Transformer], cache: Cache, ids: Tensor, setting: Setting
) -> tuple[float, float]:
    torch.set_num_threads(setting.threads)
    return decode(models[setting.precision], cache.fork(), ids)


def measure(options: argparse.Namespace) -> Result:
    lengths = sorted(options.lengths)
    if lengths[0] <= DECODED:
        raise FiftyfoldError(f"--lengths: {lengths[0]} is not more than the {DECODED} tokens to decode")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.checkpoint
        if folder is None:
            folder = Path(scratch) / "trained"
            run_in_subprocess(train, options.steps, folder)  # so that its memory does not count
        models = {precision: load_with_positions(folder, lengths[-1]) for precision in PRECISIONS}
        tokenizer = load_tokenizer(folder)
        origin = f"preset 'tiny' after {options.steps} steps" if options.checkpoint is None else f"'{folder.name}'"
    models["bfloat16"].cast_weights(torch.bfloat16)
    result, lines = prefill_and_decode(models, text_ids(tokenizer, lengths[-1]), lengths, options)
    text = (
        f"Read by {origin}, {models['float32'].num_parameters() / 1e6:.2f}M parameters, in pieces of "
        f"{options.chunk:,} tokens.\n\n{result}"
    )
    return Result(text, log_log(lines, "ms per token", origin), "Milliseconds per token over the sequence's length")


def main(arguments: list[str] | None = None) -> str:
    parser = make_parser(__doc__, threads=[1, 2])
    parser.add_argument("--checkpoint", type=Path, help="checkpoint folder with a tokenizer")
    parser.add_argument("--steps", type=positive_int, default=60, help="training steps without --checkpoint")
    parser.add_argument("--lengths", type=positive_int, nargs="+", default=LENGTHS)
    parser.add_argument("--chunk", type=positive_int, default=1024, help="tokens per prefill chunk")
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    run_main(main)
