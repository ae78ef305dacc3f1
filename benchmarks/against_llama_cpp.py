"""Our network against llama.cpp with the same weights on a CPU: decoding at depth, reading prompts, starting up.

    python -m benchmarks.against_llama_cpp [--parts decode prefill start-up] [--write docs/against-llama-cpp.md]

llama.cpp runs the network as a GGUF file (``pipelines export --format gguf``) in a process of its own; it is found as
the package ``llama_cpp`` (llama-cpp-python). It needs 64 index dims, so the preset gets as many. Its cache is of one
type for all that it keeps (``--cache``), ours packed as configured.

* decode: milliseconds per token behind ``--depths`` tokens. llama.cpp has read them; our cache is filled with random
  entries, which takes as long to decode from (docs/against-transformers.md).
* prefill: tokens per second of reading a prompt from nothing, ours in pieces of each of ``--chunks``.
* start-up: seconds from the start of a process to its first token.

All sides run in turn. A ratio compares sides of equal bytes per weight on as many threads, round by round: float32 with
F32, bfloat16 with F16. Q8_0 is there for information. The floor is the time in which the memory delivers the bytes
that a token must read, its active weights and the cache entries it attends to, at the bandwidth measured in the same
run. A processor's caches can hold a part of them, so a side can be faster.
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

from benchmarks.lib.contenders import DEFAULT_CHUNK, DEFAULTS, PRECISIONS, Ours, ways
from benchmarks.lib.drawing import log_log
from benchmarks.lib.harness import Findings, benchmark, command_line, count, options_of
from benchmarks.lib.llama_cpp import CacheType, LlamaCpp, require
from benchmarks.lib.report import table
from benchmarks.lib.start_up import start_up
from benchmarks.lib.timing import Side, Timing, bandwidth, in_turn, ratio, threads_of
from model.cache import Cache
from model.config import CACHE_FORMATS, ModelConfig
from model.gguf_format import WeightType, export_gguf
from model.hf import export_pretrained, import_pretrained
from model.paging import growing_parts
from model.precision import Precision
from model.transformer import Transformer

EQUAL_BYTES: dict[str, WeightType] = {"float32": "f32", "bfloat16": "f16"}
"""The types with as many bytes per weight, ours and llama.cpp's."""
PARTS = ("decode", "prefill", "start-up")
LEAST_INDEX_DIMS = 64
COMPARED_TOKENS = 300
_BYTES = {"f32": 4.0, "f16": 2.0, "q8_0": 34 / 32}


@dataclass(frozen=True)
class Contender:
    """One side: ours in a precision, or llama.cpp with weights of a type."""

    name: str
    weights: str
    threads: int
    chunk: int = 0
    """Tokens in a piece of a prompt; llama.cpp chooses its own size."""

    def __str__(self) -> str:
        return f"{self.name}, {self.weights}" + (f", pieces of {self.chunk:,}" if self.chunk else "")


OURS, THEIRS = "ours", "llama.cpp"


class Bench:
    """Both networks with equal weights, loaded once."""

    def __init__(self, options: argparse.Namespace, folder: Path, stack: ExitStack):
        self.options, self.folder = options, folder
        self.config = for_llama_cpp(options.preset)
        torch.manual_seed(0)
        model = Transformer(self.config.replace(zero_init_output=False)).eval()
        export_pretrained(model, folder / "ours")
        for weights in options.types:
            export_gguf(model, self.file(weights), weights)
        del model
        self.ours = {precision: Ours(folder / "ours", precision) for precision in PRECISIONS}
        room = max([*options.depths, *options.prompts]) + self._decoded()
        self.theirs = {
            weights: stack.enter_context(LlamaCpp(self.file(weights), room, options.cache)) for weights in options.types
        }
        self.bandwidth = {threads: bandwidth(threads) for threads in {DEFAULTS.threads, *options.threads}}
        self.generator = torch.Generator().manual_seed(0)

    def file(self, weights: str) -> Path:
        return self.folder / f"{weights}.gguf"

    def ids(self, tokens: int) -> torch.Tensor:
        return torch.randint(self.config.vocab_size, (1, tokens), generator=self.generator)

    def _decoded(self) -> int:
        """Tokens that one cache takes beyond the depth, whichever side's: thread counts go on in the same one."""
        options = self.options
        return (options.rounds + 1) * options.tokens * len({DEFAULTS.threads, *options.threads})

    # --- decode

    def decode_sides(self, depth: int) -> dict[Contender, Side]:
        """One side for each precision or type at each number of threads, all behind ``depth`` tokens."""
        tokens = self.options.tokens
        ids = self.ids(tokens)
        caches = {precision: network.cache(depth + self._decoded()) for precision, network in self.ours.items()}
        if depth:
            for precision, network in self.ours.items():
                network.fill(caches[precision], depth)
        sides = {}
        for way in ways(self.options.threads):
            network, cache = self.ours[way.precision], caches[way.precision]
            run = partial(network.decode, cache, ids)
            sides[Contender(OURS, way.precision, way.threads)] = Side(run, way.threads, tokens)
        self._read_by_theirs(self.ids(depth)[0].tolist())
        for weights, network in self.theirs.items():
            for threads in self._thread_counts():
                run = partial(network.decode, ids[0].tolist(), threads)
                sides[Contender(THEIRS, weights, threads)] = Side(run, threads, tokens)
        return sides

    def _read_by_theirs(self, ids: list[int]) -> None:
        """Have one of the contexts read the prompt and the others continue from it: their caches have one type."""
        first, *others = self.theirs.values()
        first.clear()
        if ids:
            first.read(ids, max(self._thread_counts()))
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
            times = in_turn(self.decode_sides(depth), self.options.rounds)
            for side, timing in times.items():
                floor = self.token_bytes(side, depth) / self.bandwidth[side.threads]
                cells = [timing.milliseconds(), f"{1e3 * floor:.3g}", f"{timing.median / floor:.2g}"]
                rows.append([*self._described(f"{depth:,}", side, times), *cells, _faster(side, times)])
                print(" | ".join(rows[-1]), flush=True)
                if depth and side.threads == DEFAULTS.threads:
                    lines.setdefault(f"{side}, {threads_of(side.threads)}", {})[depth] = 1e3 * timing.median
        header = ["tokens before", "side", "threads", "ms per token", "floor by bytes, ms", "times its floor"]
        text = f"### Decode\n\n{table([*header, 'times faster than llama.cpp, equal bytes'], rows)}"
        figure = log_log(lines, "ms per decoded token", f"decoding, preset '{self.options.preset}'") if lines else None
        return text, figure

    def token_bytes(self, side: Contender, depth: int) -> float:
        """Bytes that decoding one token behind ``depth`` others reads: active weights, and entries attended to."""
        if side.name == OURS:
            weights = active_weight_bytes(self.ours[side.weights].model)
            return weights + attended_bytes(self.config, depth)
        return active_file_bytes(self.file(side.weights), self.config) + attended_bytes(
            self.config, depth, _BYTES[self.options.cache]
        )

    def _described(self, first: str, side: Contender, times: dict[Contender, Timing]) -> list[str]:
        """A row's first cells. Of ours the defaults and the fastest are marked."""
        default = Contender(OURS, DEFAULTS.precision, DEFAULTS.threads, DEFAULT_CHUNK if side.chunk else 0)
        best = min((key for key in times if key.name == OURS), key=lambda key: times[key].median)
        marks = [mark for mark, marked in (("defaults", default), ("fastest", best)) if side == marked]
        return [first, str(side) + (f" ({', '.join(marks)})" if marks else ""), str(side.threads)]

    # --- prefill

    def prefill_sides(self, ids: torch.Tensor) -> dict[Contender, Side]:
        tokens = ids.shape[1]
        sides = {}
        for way in ways(self.options.threads):
            for chunk in self.options.chunks:
                run = partial(self._read_by_ours, way.precision, ids, chunk)
                sides[Contender(OURS, way.precision, way.threads, chunk)] = Side(run, way.threads, tokens)
        for weights in self.theirs:
            for threads in self._thread_counts():
                run = partial(self._read_anew, weights, ids[0].tolist(), threads)
                sides[Contender(THEIRS, weights, threads)] = Side(run, threads, tokens)
        return sides

    def _read_by_ours(self, precision: str, ids: torch.Tensor, chunk: int) -> None:
        network = self.ours[precision]
        network.read(network.cache(ids.shape[1]), ids, chunk)

    def _read_anew(self, weights: str, ids: list[int], threads: int) -> None:
        self.theirs[weights].clear()
        self.theirs[weights].read(ids, threads)

    def prefill(self) -> str:
        rows: list[Sequence[str]] = []
        for tokens in self.options.prompts:
            times = in_turn(self.prefill_sides(self.ids(tokens)), self.options.prefill_rounds)
            for side, timing in times.items():
                rows.append([*self._described(f"{tokens:,}", side, times), timing.per_second(), _faster(side, times)])
                print(" | ".join(rows[-1]), flush=True)
        header = ["tokens", "side", "threads", "tokens per second", "times faster than llama.cpp, equal bytes"]
        return f"### Prefill\n\n{table(header, rows)}"

    # --- what is around the figures

    def agreement(self) -> str:
        """Say how far the logits of both networks are apart, nothing rounded on our side."""
        exact = import_pretrained(self.folder / "ours", **dict.fromkeys(CACHE_FORMATS, "fp32"))
        weights = self.options.types[0]
        difference = logit_difference(exact, self.theirs[weights], self.ids(COMPARED_TOKENS)[0].tolist())
        half, worst = float(difference.median()), float(difference.max())
        return (
            f"Logits of {COMPARED_TOKENS} tokens, ours in float32 without any rounding, llama.cpp with {weights} "
            f"weights and a cache of {self.options.cache}, differ by {half:.1e} of their standard deviation at half of "
            f"the tokens and by {worst:.1e} at the worst, where nearly tied entries or experts are chosen differently."
        )

    def streams(self) -> str:
        found = (f"{each / 1e9:.1f} GB/s with {threads_of(n)}" for n, each in sorted(self.bandwidth.items()))
        return f"Memory bandwidth, reading: {', '.join(found)}."

    def start_up(self) -> str:
        threads = DEFAULTS.threads
        sides = [("ours, float32 (defaults)", "ours", self.folder / "ours", "float32")]
        sides.append(("ours, bfloat16", "ours", self.folder / "ours", "bfloat16"))
        sides += [(f"{THEIRS}, {weights}", THEIRS, self.file(weights), weights) for weights in self.options.types]
        rows = []
        for label, name, path, weights in sides:
            timing = start_up(name, path, weights, threads)
            rows.append([label, timing.seconds()])
        note = "llama.cpp is started through Python, as its package offers it.\n"
        return f"### Start-up\n\n{table(['side', 'process start to first token, s'], rows)}\n{note}"


def for_llama_cpp(preset: str) -> ModelConfig:
    """The preset with the index dims and the hca ratio that llama.cpp needs, without the prediction module."""
    config = ModelConfig.from_preset(preset)
    return config.replace(index_head_dim=max(LEAST_INDEX_DIMS, config.index_head_dim), hca_ratio=128, mtp_layers=0)


def _faster(side: Contender, times: dict[Contender, Timing]) -> str:
    """Speed of ours over llama.cpp's, with weights of as many bytes and on as many threads."""
    theirs = Contender(THEIRS, EQUAL_BYTES.get(side.weights, ""), side.threads)
    return f"{ratio(times[theirs], times[side]):.2f}" if side.name == OURS and theirs in times else ""


def logit_difference(model: Transformer, theirs: LlamaCpp, ids: list[int]) -> torch.Tensor:
    """The largest difference of each token's logits, over the standard deviation of all: float32 [tokens]."""
    with torch.inference_mode():
        ours = model(torch.tensor([ids]), Cache(model.config, 1, len(ids)))[0]
    theirs.clear()
    other = torch.from_numpy(theirs.decode(ids, 1))
    return (ours - other).abs().amax(-1) / ours.std()


def active_weight_bytes(model: Transformer) -> float:
    """Bytes of the parameters that one token is multiplied with: all but the embedding and the experts not chosen."""
    share = model.config.experts_per_token / model.config.num_experts
    return sum(
        p.numel() * p.element_size() * (share if p.dim() == 3 and ".ffn." in name else 1)
        for name, p in model.named_parameters()
        if not name.startswith(("embed.", "mtp."))
    )


def active_file_bytes(file: Path, config: ModelConfig) -> float:
    """Bytes of a GGUF file's weights that one token reads."""
    from gguf import GGUFReader

    share = config.experts_per_token / config.num_experts
    return sum(
        int(tensor.n_bytes) * (share if "_exps." in tensor.name else 1)
        for tensor in GGUFReader(file).tensors
        if tensor.name != "token_embd.weight" and "tid2eid" not in tensor.name
    )


def attended_bytes(config: ModelConfig, depth: int, number_bytes: float | None = None) -> float:
    """Bytes of the cache that a token behind ``depth`` others reads: all index keys, the best ``index_topk`` csa
    entries, all hca entries, the windows. Packed as ours, or with ``number_bytes`` for every number."""
    main = Precision(config).main_layout
    width = main.nbytes if number_bytes is None else config.head_dim * number_bytes
    total = 0.0
    for part in growing_parts(config).values():
        entries = depth // part.ratio
        if part.component == "csa":
            entries = min(entries, config.index_topk)
        size = part.layout.nbytes if number_bytes is None else part.layout.size * number_bytes
        total += entries * size
    return total + config.num_layers * min(depth, config.window) * width


def measure(options: argparse.Namespace) -> Findings:
    require()
    figure, found = None, []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        bench = Bench(options, Path(folder), stack)
        about = (
            f"Preset '{options.preset}' with {bench.config.index_head_dim} index dims; llama.cpp's cache in "
            f"{options.cache}. {bench.streams()} {bench.agreement()}\n"
        )
        if "decode" in options.parts:
            text, figure = bench.decode()
            found.append(text)
        if "prefill" in options.parts:
            found.append(bench.prefill())
        if "start-up" in options.parts:
            found.append(bench.start_up())
    return Findings("\n".join([about, *found]), figure, "Milliseconds per decoded token")


def main(arguments: list[str] | None = None) -> str:
    parser = options_of(__doc__, threads=[1, 2])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--types", nargs="+", choices=get_args(WeightType), default=list(get_args(WeightType)))
    parser.add_argument("--cache", choices=get_args(CacheType), default="f16", help="type of llama.cpp's cache")
    parser.add_argument("--depths", type=int, nargs="+", default=[0, 4096, 16_384, 65_536], help="of the decode part")
    parser.add_argument("--tokens", type=count, default=16, help="decoded in a round")
    parser.add_argument("--rounds", type=count, default=5, help="of the decode part")
    parser.add_argument("--prompts", type=count, nargs="+", default=[2048, 8192, 16_384], help="of the prefill part")
    parser.add_argument("--chunks", type=count, nargs="+", default=[DEFAULT_CHUNK, 2048], help="our pieces of a prompt")
    parser.add_argument("--prefill-rounds", type=count, default=3)
    return benchmark(parser, measure, arguments)


if __name__ == "__main__":
    command_line(main)
