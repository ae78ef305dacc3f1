"""Inference against llama.cpp with the same weights, on a CPU: decoding at depth, prefill, and start-up.

    python -m benchmarks.against_llama_cpp [--parts decode prefill start-up] [--write docs/against-llama-cpp.md]

llama.cpp (package ``llama_cpp``, from llama-cpp-python) runs the network from a GGUF file (``pipelines export --format
gguf``) in a separate process. It requires 64 index dims, so the preset is changed to match. Its cache has a single type
(``--cache``); ours is packed as configured.

* decode: milliseconds per token after ``--depths`` tokens. llama.cpp prefills them; our cache is filled with random
  entries, which decode at the same speed (docs/against-transformers.md).
* prefill: tokens per second for a prompt, ours with each chunk size of ``--chunks``.
* start-up: seconds from process start to the first token.

Runs are interleaved. Ratios compare equal bytes per weight and equal thread counts within a round: float32 with F32,
bfloat16 with F16. Q8_0 is shown for information. The floor is the time to read a token's active weights and attended
cache entries at the memory bandwidth measured in the same run. Processor caches may hold part of these, so a contender
can be faster than its floor.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from matplotlib.figure import Figure

from benchmarks.lib.contenders import DEFAULT_CHUNK, DEFAULTS, PRECISIONS, OurNetwork, all_settings
from benchmarks.lib.drawing import log_log
from benchmarks.lib.harness import Result, make_parser, positive_int, run_benchmark, run_main
from benchmarks.lib.llama_cpp import CacheType, LlamaCpp, require
from benchmarks.lib.report import table
from benchmarks.lib.start_up import start_up
from benchmarks.lib.timing import Timer, Timing, format_threads, memory_bandwidth, speedup, time_interleaved
from model.cache import Cache
from model.cache.pages import growing_parts
from model.config import CACHE_FORMATS, ModelConfig
from model.gguf import WeightType, export_gguf
from model.hf import export_pretrained, import_pretrained
from model.mixers.csa import CompressedSparseAttention
from model.precision import main_layout
from model.transformer import Transformer

EQUAL_BYTES: dict[str, WeightType] = {"float32": "f32", "bfloat16": "f16"}
"""Our precisions and llama.cpp's types with equal bytes per weight."""
PARTS = ("decode", "prefill", "start-up")
MIN_INDEX_DIMS = 64
COMPARED_TOKENS = 300
_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}


@dataclass(frozen=True)
class Contender:
    """Our network in one precision, or llama.cpp with one weight type."""

    name: str
    weights: str
    threads: int
    chunk: int = 0
    """Prefill chunk size; 0 for llama.cpp, which has its own."""

    def __str__(self) -> str:
        return f"{self.name}, {self.weights}" + (f", pieces of {self.chunk:,}" if self.chunk else "")


OURS, THEIRS = "ours", "llama.cpp"


class Bench:
    """Both networks with equal weights."""

    def __init__(self, options: argparse.Namespace, folder: Path, stack: ExitStack):
        self.options, self.folder = options, folder
        self.config = for_llama_cpp(options.preset)
        torch.manual_seed(0)
        model = Transformer(self.config.replace(zero_init_output=False)).eval()
        export_pretrained(model, folder / "ours")
        for weights in options.types:
            export_gguf(model, self.file(weights), weights)
        del model
        self.ours = {precision: OurNetwork(folder / "ours", precision) for precision in PRECISIONS}
        capacity = max([*options.depths, *options.prompts]) + self._decoded_tokens()
        self.theirs = {
            weights: stack.enter_context(LlamaCpp(self.file(weights), capacity, options.cache))
            for weights in options.types
        }
        self.bandwidth = {threads: memory_bandwidth(threads) for threads in {DEFAULTS.threads, *options.threads}}
        self.generator = torch.Generator().manual_seed(0)

    def file(self, weights: str) -> Path:
        return self.folder / f"{weights}.gguf"

    def ids(self, tokens: int) -> torch.Tensor:
        return torch.randint(self.config.vocab_size, (1, tokens), generator=self.generator)

    def _decoded_tokens(self) -> int:
        """Return the number of tokens decoded into one cache, which all thread counts share."""
        options = self.options
        return (options.rounds + 1) * options.tokens * len({DEFAULTS.threads, *options.threads})

    # --- decode

    def decode_timers(self, depth: int) -> dict[Contender, Timer]:
        """Return timers for each precision or type at each thread count, after ``depth`` tokens."""
        tokens = self.options.tokens
        ids = self.ids(tokens)
        caches = {
            precision: network.new_cache(depth + self._decoded_tokens()) for precision, network in self.ours.items()
        }
        if depth:
            for precision, network in self.ours.items():
                network.fill(caches[precision], depth)
        timers = {}
        for setting in all_settings(self.options.threads):
            network, cache = self.ours[setting.precision], caches[setting.precision]
            run = partial(network.decode, cache, ids)
            timers[Contender(OURS, setting.precision, setting.threads)] = Timer(run, setting.threads, tokens)
        self._prefill_llama_cpp(self.ids(depth)[0].tolist())
        for weights, network in self.theirs.items():
            for threads in self._thread_counts():
                run = partial(network.decode, ids[0].tolist(), threads)
                timers[Contender(THEIRS, weights, threads)] = Timer(run, threads, tokens)
        return timers

    def _prefill_llama_cpp(self, ids: list[int]) -> None:
        """Prefill one llama.cpp context and copy its state to the others, which have the same cache type."""
        first, *others = self.theirs.values()
        first.clear()
        if ids:
            first.prefill(ids, max(self._thread_counts()))
        for network in others:
            network.clear()
            if ids:
                network.restore(first.state())

    def _thread_counts(self) -> list[int]:
        return list(dict.fromkeys([DEFAULTS.threads, *self.options.threads]))

    def decode(self) -> tuple[str, Figure | None]:
        rows: list[Sequence[str]] = []
        lines: dict[str, dict[int, float]] = {}
        for depth in self.options.depths:
            times = time_interleaved(self.decode_timers(depth), self.options.rounds)
            for contender, timing in times.items():
                floor = self.token_bytes(contender, depth) / self.bandwidth[contender.threads]
                cells = [timing.milliseconds(), f"{1e3 * floor:.3g}", f"{timing.median / floor:.2g}"]
                rows.append([*self._row_start(f"{depth:,}", contender, times), *cells, _speedup(contender, times)])
                print(" | ".join(rows[-1]), flush=True)
                if depth and contender.threads == DEFAULTS.threads:
                    lines.setdefault(f"{contender}, {format_threads(contender.threads)}", {})[depth] = (
                        1e3 * timing.median
                    )
        header = ["tokens before", "side", "threads", "ms per token", "floor by bytes, ms", "times its floor"]
        text = f"### Decode\n\n{table([*header, 'times faster than llama.cpp, equal bytes'], rows)}"
        figure = log_log(lines, "ms per decoded token", f"decoding, preset '{self.options.preset}'") if lines else None
        return text, figure

    def token_bytes(self, contender: Contender, depth: int) -> float:
        """Return the bytes of active weights and attended entries that a token after ``depth`` others reads."""
        if contender.name == OURS:
            weights = active_weight_bytes(self.ours[contender.weights].model)
            return weights + attended_bytes(self.config, depth)
        return active_file_bytes(self.file(contender.weights), self.config) + attended_bytes(
            self.config, depth, _BYTES[self.options.cache]
        )

    def _row_start(self, first: str, contender: Contender, times: dict[Contender, Timing]) -> list[str]:
        """Return a row's first cells. Our defaults and our fastest setting are marked."""
        default = Contender(OURS, DEFAULTS.precision, DEFAULTS.threads, DEFAULT_CHUNK if contender.chunk else 0)
        best = min((key for key in times if key.name == OURS), key=lambda key: times[key].median)
        marks = [mark for mark, marked in (("defaults", default), ("fastest", best)) if contender == marked]
        return [first, str(contender) + (f" ({', '.join(marks)})" if marks else ""), str(contender.threads)]

    # --- prefill

    def prefill_timers(self, ids: torch.Tensor) -> dict[Contender, Timer]:
        tokens = ids.shape[1]
        timers = {}
        for setting in all_settings(self.options.threads):
            for chunk in self.options.chunks:
                run = partial(self._prefill_ours, setting.precision, ids, chunk)
                timers[Contender(OURS, setting.precision, setting.threads, chunk)] = Timer(run, setting.threads, tokens)
        for weights in self.theirs:
            for threads in self._thread_counts():
                run = partial(self._prefill_theirs, weights, ids[0].tolist(), threads)
                timers[Contender(THEIRS, weights, threads)] = Timer(run, threads, tokens)
        return timers

    def _prefill_ours(self, precision: str, ids: torch.Tensor, chunk: int) -> None:
        network = self.ours[precision]
        network.prefill(network.new_cache(ids.shape[1]), ids, chunk)

    def _prefill_theirs(self, weights: str, ids: list[int], threads: int) -> None:
        self.theirs[weights].clear()
        self.theirs[weights].prefill(ids, threads)

    def prefill(self) -> str:
        rows: list[Sequence[str]] = []
        for tokens in self.options.prompts:
            times = time_interleaved(self.prefill_timers(self.ids(tokens)), self.options.prefill_rounds)
            for contender, timing in times.items():
                start = self._row_start(f"{tokens:,}", contender, times)
                rows.append([*start, timing.per_second(), _speedup(contender, times)])
                print(" | ".join(rows[-1]), flush=True)
        header = ["tokens", "side", "threads", "tokens per second", "times faster than llama.cpp, equal bytes"]
        return f"### Prefill\n\n{table(header, rows)}"

    # --- context of the figures

    def agreement(self) -> str:
        """Return a sentence on the logit difference, without rounding on our side."""
        exact = import_pretrained(self.folder / "ours", **dict.fromkeys(CACHE_FORMATS, "fp32"))
        weights = self.options.types[0]
        difference = logit_difference(exact, self.theirs[weights], self.ids(COMPARED_TOKENS)[0].tolist())
        median, largest = float(difference.median()), float(difference.max())
        return (
            f"Logits of {COMPARED_TOKENS} tokens, ours in float32 without any rounding, llama.cpp with {weights} "
            f"weights and a cache of {self.options.cache}, differ by {median:.1e} of their standard deviation at half "
            f"of the tokens and by {largest:.1e} at the worst, where nearly tied entries or experts are chosen "
            "differently."
        )

    def bandwidths(self) -> str:
        parts = (f"{each / 1e9:.1f} GB/s with {format_threads(n)}" for n, each in sorted(self.bandwidth.items()))
        return f"Memory bandwidth, reading: {', '.join(parts)}."

    def start_up(self) -> str:
        threads = DEFAULTS.threads
        contenders = [("ours, float32 (defaults)", "ours", self.folder / "ours", "float32")]
        contenders.append(("ours, bfloat16", "ours", self.folder / "ours", "bfloat16"))
        contenders += [(f"{THEIRS}, {weights}", THEIRS, self.file(weights), weights) for weights in self.options.types]
        rows = []
        for label, name, path, weights in contenders:
            timing = start_up(name, path, weights, threads)
            rows.append([label, timing.seconds()])
        note = "llama.cpp is started through Python, as its package offers it.\n"
        return f"### Start-up\n\n{table(['side', 'process start to first token, s'], rows)}\n{note}"


def for_llama_cpp(preset: str) -> ModelConfig:
    """Return the preset with the index dims and hca ratio that llama.cpp requires, without multi-token prediction."""
    config = ModelConfig.from_preset(preset)
    return config.replace(index_head_dim=max(MIN_INDEX_DIMS, config.index_head_dim), hca_ratio=128, mtp_layers=0)


def _speedup(contender: Contender, times: dict[Contender, Timing]) -> str:
    """Return our speedup over llama.cpp with equal bytes per weight and threads, or an empty cell."""
    theirs = Contender(THEIRS, EQUAL_BYTES.get(contender.weights, ""), contender.threads)
    return f"{speedup(times[theirs], times[contender]):.2f}" if contender.name == OURS and theirs in times else ""


def logit_difference(model: Transformer, theirs: LlamaCpp, ids: list[int]) -> torch.Tensor:
    """Return each token's largest logit difference over the standard deviation of all logits, float32 [tokens]."""
    with torch.inference_mode():
        ours = model(torch.tensor([ids]), Cache(model.config, 1, len(ids)))[0]
    theirs.clear()
    other = torch.from_numpy(theirs.decode(ids, 1))
    return (ours - other).abs().amax(-1) / ours.std()


def active_weight_bytes(model: Transformer) -> float:
    """Return the bytes of the parameters active per token: all but the embedding and unselected experts."""
    share = model.config.experts_per_token / model.config.num_experts
    return sum(
        p.numel() * p.element_size() * (share if p.dim() == 3 and ".ffn." in name else 1)
        for name, p in model.named_parameters()
        if not name.startswith(("embed.", "mtp."))
    )


def active_file_bytes(file: Path, config: ModelConfig) -> float:
    """Return the bytes of a GGUF file's weights that one token reads."""
    from gguf import GGUFReader

    share = config.experts_per_token / config.num_experts
    return sum(
        int(tensor.n_bytes) * (share if "_exps." in tensor.name else 1)
        for tensor in GGUFReader(file).tensors
        if tensor.name != "token_embd.weight" and "tid2eid" not in tensor.name
    )


def attended_bytes(config: ModelConfig, depth: int, element_bytes: float | None = None) -> float:
    """Return the cache bytes that a token after ``depth`` others reads.

    These are all index keys, ``index_topk`` csa entries, all hca entries, and the windows, in our packed formats or
    with ``element_bytes`` per element.
    """
    main = main_layout(config)
    width = main.nbytes if element_bytes is None else config.head_dim * element_bytes
    total = 0.0
    for part in growing_parts(config).values():
        entries = depth // part.ratio
        if part.component == CompressedSparseAttention.name:
            entries = min(entries, config.index_topk)
        size = part.layout.nbytes if element_bytes is None else part.layout.size * element_bytes
        total += entries * size
    return total + config.num_layers * min(depth, config.window) * width


def measure(options: argparse.Namespace) -> Result:
    require()
    figure, sections = None, []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        bench = Bench(options, Path(folder), stack)
        about = (
            f"Preset '{options.preset}' with {bench.config.index_head_dim} index dims; llama.cpp's cache in "
            f"{options.cache}. {bench.bandwidths()} {bench.agreement()}\n"
        )
        if "decode" in options.parts:
            text, figure = bench.decode()
            sections.append(text)
        if "prefill" in options.parts:
            sections.append(bench.prefill())
        if "start-up" in options.parts:
            sections.append(bench.start_up())
    return Result("\n".join([about, *sections]), figure, "Milliseconds per decoded token")


def main(arguments: list[str] | None = None) -> str:
    parser = make_parser(__doc__, threads=[1, 2])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--types", nargs="+", choices=get_args(WeightType), default=list(get_args(WeightType)))
    parser.add_argument("--cache", choices=get_args(CacheType), default="f16", help="type of llama.cpp's cache")
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 4096, 16_384, 65_536], help="for the decode part")
    parser.add_argument("--tokens", type=positive_int, default=16, help="tokens decoded per round")
    parser.add_argument("--rounds", type=positive_int, default=5, help="for the decode part")
    parser.add_argument(
        "--prompts", type=positive_int, nargs="+", default=[2048, 8192, 16_384], help="for the prefill part"
    )
    parser.add_argument(
        "--chunks", type=positive_int, nargs="+", default=[DEFAULT_CHUNK, 2048], help="our prefill chunk sizes"
    )
    parser.add_argument("--prefill-rounds", type=positive_int, default=3)
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    run_main(main)
