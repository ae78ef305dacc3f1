"""A trained tiny model reads a million tokens and decodes from each length on the way: time per token, and memory.

    python -m benchmarks.tiny_at_a_million [--checkpoint FOLDER] [--lengths 1024 ... 1048576] [--write FILE.md]

Without ``--checkpoint`` preset `tiny` is trained for a short while on Python's standard library, by the plain trainer
and recipe configs/tiny.yaml. The positions a model allows are raised to what is read. It has learned on short rows, so
a long context cannot help it much: the loss on the decoded tokens stands beside the loss on the same ones after 1,024
tokens at most, and shows whether a long cache does harm.

The text is the standard library's. Up to 64 tokens before each length it is read in pieces, with the defaults; those 64
are decoded one at a time, each given the real one before it, at every precision and thread count. Rows show the
defaults and the fastest way. Memory is the process's own: the most that was resident so far beyond what was before the
cache was made, after a first token. Nothing that is timed was filled at random, and nothing runs beside it.
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

from benchmarks.contenders import DEFAULTS, OURS_DEFAULT, OURS_FASTEST, PRECISIONS, Way, ways
from benchmarks.drawing import log_log
from benchmarks.harness import Findings, benchmark, command_line, count, options_of
from benchmarks.report import table
from benchmarks.timing import PeakMemory, in_child, return_freed_memory
from model import checkpoint
from model.cache import Cache
from model.errors import DataError, FiftyfoldError
from model.files import atomic_folder
from model.generation import prefill
from model.paging import PagePool
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
    """A reporter of the trainer that keeps nothing."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        pass

    def log_event(self, step: int, message: str) -> None:
        print(f"step {step}: {message}")

    def report(self, step: int, metrics: dict[str, float], write: Callable[[Path], None] | None) -> None:
        pass


def train(steps: int, checkpoint_folder: Path) -> None:
    """Write a checkpoint of the recipe's model after ``steps`` steps on text alone: two thirds of them dense, the last
    ones sparse."""
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


def load_with_room(folder: Path, tokens: int) -> Transformer:
    """The checkpoint's network, allowing ``tokens`` positions at least: rotary angles are computed, not looked up."""
    model = checkpoint.load(folder)
    longer = Transformer(model.config.replace(max_positions=max(tokens, model.config.max_positions)))
    longer.load_state_dict(model.state_dict())
    return longer.eval()


def text_ids(tokenizer: Tokenizer, tokens: int) -> Tensor:
    """The first ``tokens`` tokens of the running Python's standard library, int64 [1, tokens]. Raises DataError."""
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        ids += tokenizer.encode(path.read_text(encoding="utf-8"))
        if len(ids) >= tokens:
            return torch.tensor([ids[:tokens]])
    raise DataError(f"the standard library has only {len(ids)} tokens, asked for {tokens}")


@torch.inference_mode()
def decode(model: Transformer, cache: Cache, ids: Tensor) -> tuple[float, float]:
    """Append ids int64 [1, n] one at a time: median seconds per token, and loss (nats per token) on the last n - 1."""
    seconds, logits = [], []
    for token in ids.split(1, dim=1):
        started = time.perf_counter()
        logits.append(model(token, cache, last_only=True)[:, -1])
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), float(F.cross_entropy(torch.cat(logits[:-1]), ids[0, 1:]))


def read_and_decode(
    models: Mapping[str, Transformer], ids: Tensor, lengths: list[int], options: argparse.Namespace
) -> tuple[str, dict]:
    """Read ids int64 [1, S] with the float32 network of ``models`` and decode before each length in every way.

    Return the table, and milliseconds per token by length for the figure.
    """
    rows = []
    lines: dict[str, dict[int, float]] = {"prefill, newest tokens": {}, OURS_DEFAULT: {}, OURS_FASTEST: {}}
    model, chunk = models[DEFAULTS.precision], options.chunk
    first = ids[:, :chunk]
    for network in models.values():  # what is loaded or made at the first call is no part of the cache
        prefill(network, Cache(network.config, 1, first.shape[1]), first, chunk)
    return_freed_memory()
    with PeakMemory() as memory:
        # Pages for the longest text, and for what a copy writes while it decodes.
        probe = PagePool(model.config, 0)
        pages = probe.pages_for(lengths[-1]) + probe.pages_for(DECODED) + 1
        cache = Cache(model.config, 1, lengths[-1], pool=PagePool(model.config, pages))
        done, reading = 0, 0.0
        for length in lengths:
            piece, last = ids[:, done : length - DECODED], ids[:, length - DECODED : length]
            torch.set_num_threads(DEFAULTS.threads)
            started = time.perf_counter()
            prefill(model, cache, piece, chunk)
            took = time.perf_counter() - started
            reading += took
            resident = memory.most()
            decoded = {way: _decoded_on_a_copy(models, cache, last, way) for way in ways(options.threads)}
            torch.set_num_threads(DEFAULTS.threads)
            decode(model, cache, last)
            short = Cache(model.config, 1, min(length, SHORT))
            recent = ids[:, max(0, length - SHORT) : length]
            prefill(model, short, recent[:, :-DECODED], chunk)
            _, short_loss = decode(model, short, recent[:, -DECODED:])
            lines["prefill, newest tokens"][length] = 1e3 * took / piece.shape[1]
            fastest_way = min(decoded, key=lambda way: decoded[way][0])
            for label, way in ((OURS_DEFAULT, DEFAULTS), (OURS_FASTEST, fastest_way)):
                per_token, loss = decoded[way]
                lines[label][length] = 1e3 * per_token
                row = [f"{length:,}", label, str(way), f"{1e3 * per_token:.2f}", f"{loss:.3f}", f"{short_loss:.3f}"]
                if label == OURS_DEFAULT:
                    row += [f"{reading:.1f}", f"{1e3 * took / piece.shape[1]:.3f}", f"{1e3 * reading / length:.3f}"]
                    row += [f"{resident / 2**20:,.0f}", f"{(resident - memory.before) / 2**20:,.1f}"]
                rows.append([*row, *[""] * (len(HEADER) - len(row))])
                print(" | ".join(rows[-1]), flush=True)
            done = length
        size = cache.nbytes()
    note = f"The cache of {lengths[-1]:,} tokens holds {size / 2**20:,.1f} MiB, fixed state included."
    return f"{table(HEADER, rows)}\n{note}\n", lines


def _decoded_on_a_copy(models: Mapping[str, Transformer], cache: Cache, ids: Tensor, way: Way) -> tuple[float, float]:
    """:func:`decode` on a copy of the cache, in one way."""
    torch.set_num_threads(way.threads)
    return decode(models[way.precision], cache.fork(), ids)


def measure(options: argparse.Namespace) -> Findings:
    lengths = sorted(options.lengths)
    if lengths[0] <= DECODED:
        raise FiftyfoldError(f"--lengths: {lengths[0]} is not more than the {DECODED} tokens that are decoded")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.checkpoint
        if folder is None:
            folder = Path(scratch) / "trained"
            in_child(train, options.steps, folder)  # whose memory does not count
        models = {precision: load_with_room(folder, lengths[-1]) for precision in PRECISIONS}
        tokenizer = load_tokenizer(folder)
        origin = f"preset 'tiny' after {options.steps} steps" if options.checkpoint is None else f"'{folder.name}'"
    models["bfloat16"].store_weights(torch.bfloat16)
    found, lines = read_and_decode(models, text_ids(tokenizer, lengths[-1]), lengths, options)
    text = (
        f"Read by {origin}, {models['float32'].num_parameters() / 1e6:.2f}M parameters, in pieces of "
        f"{options.chunk:,} tokens.\n\n{found}"
    )
    return Findings(text, log_log(lines, "ms per token", origin), "Milliseconds per token over the sequence's length")


def main(arguments: list[str] | None = None) -> str:
    parser = options_of(__doc__, threads=[1, 2])
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint folder; its tokenizer reads the text")
    parser.add_argument("--steps", type=count, default=60, help="of the training without --checkpoint")
    parser.add_argument("--lengths", type=count, nargs="+", default=LENGTHS)
    parser.add_argument("--chunk", type=count, default=1024, help="tokens read at a time")
    return benchmark(parser, measure, arguments)


if __name__ == "__main__":
    command_line(main)
