"""Our network against transformers' ``DeepseekV4ForCausalLM`` with the same weights on a CPU.

    python -m benchmarks.against_transformers [--parts decode prefill ...] [--write docs/against-transformers.md]

* decode: milliseconds per token up to each length. Caches are filled with random entries on both sides (reading a
  million tokens takes transformers hours); at the first length both are also really filled by reading, the logits of
  both networks compared in plain floats, and the two ways timed beside each other.
* prefill: reading random tokens from nothing, in pieces; seconds, and memory beyond what was resident before, each
  side in a process of its own.
* growth: our prefill's time per token at the longer length over that at the shorter one.

* start-up: seconds from the start of a process to its first token.

Sides run in turn, at every precision and thread count. Rows show theirs at its fastest, and ours with the defaults and
at its fastest; lengths ascend, and a way far behind at one is not timed at the next. A prefill runs once at what was
fastest in a trial of its end (and of our piece sizes; transformers reads 1,024 tokens at a time).
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure

from benchmarks.lib.contenders import (
    DEFAULT_CHUNK,
    DEFAULTS,
    OURS_DEFAULT,
    OURS_FASTEST,
    PRECISIONS,
    Network,
    Ours,
    Theirs,
    Way,
    ours_at,
    ways,
    write_weights,
)
from benchmarks.lib.drawing import log_log
from benchmarks.lib.harness import Findings, benchmark, command_line, count, options_of
from benchmarks.lib.report import table
from benchmarks.lib.start_up import start_up
from benchmarks.lib.timing import (
    PeakMemory,
    Side,
    Timing,
    fastest,
    hopeless,
    in_child,
    in_turn,
    ratio,
    return_freed_memory,
)
from model.config import ModelConfig
from model.errors import FiftyfoldError

THEIRS, COMPILED, OURS = "transformers", "transformers, compiled", "ours"
PARTS = ("decode", "prefill", "growth", "start-up")
THEIR_CHUNK, OUR_CHUNKS = 1024, (256, DEFAULT_CHUNK, 1024, 2048)
TRIAL_TOKENS = 2048
"""How much of a prefill, the end of it, a trial reads."""
LENGTHS = [4096, 16_384, 32_768, 131_072, 1_048_576]


@dataclass(frozen=True)
class Reading:
    """Setting in which one side reads a prompt."""

    way: Way
    chunk: int

    def __str__(self) -> str:
        return f"{self.way}, pieces of {self.chunk:,}"


DEFAULT_READING = Reading(DEFAULTS, DEFAULT_CHUNK)
MAKERS: dict[str, Callable[[Path, str], Network]] = {
    THEIRS: Theirs,
    COMPILED: lambda folder, precision: Theirs(folder, precision, compiled=True),
    OURS: Ours,
}


class Bench:
    """Hold the options, the weights' folder, and networks loaded once."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.weights, self.plain = options, folder / "rounded", folder / "plain"
        self.names = [THEIRS, COMPILED, OURS] if options.compile else [THEIRS, OURS]
        self.config = ModelConfig.from_preset(options.preset)
        write_weights(self.config, folder)
        self._networks: dict[tuple[str, str], Network] = {}
        self._given_up: set[tuple[str, Way]] = set()

    def network(self, name: str, way: Way) -> Network:
        key = name, way.precision
        if key not in self._networks:
            self._networks[key] = MAKERS[name](self.weights, way.precision)
        return self._networks[key]

    def ids(self, tokens: int) -> torch.Tensor:
        return torch.randint(0, self.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(tokens))

    def ways(self) -> list[Way]:
        return ways(self.options.threads)

    # --- decode

    def decode_row(self, length: int) -> dict[str, tuple[Way, Timing]]:
        """Time decoding the last tokens before ``length``: theirs at its fastest, ours also with the defaults."""
        start = self._decode_start(length)
        sides: dict[tuple[str, Way], Side] = {}
        for name, precision in itertools.product(self.names, PRECISIONS):
            timed = [way for way in self.ways() if way.precision == precision and (name, way) not in self._given_up]
            if not timed:
                continue
            network = self.network(name, timed[0])
            cache = network.cache(length)
            network.fill(cache, start)
            for way in timed:
                sides[name, way] = self._decoding(network, cache, way.threads)
        times = in_turn(sides, self.options.rounds)
        row = {}
        for name in self.names:
            own = {way: timing for (side, way), timing in times.items() if side == name}
            self._given_up |= {(name, way) for way in hopeless(own) if (name, way) != (OURS, DEFAULTS)}
            for label, way in (ours_at(own) if name == OURS else {name: fastest(own)}).items():
                row[label] = (way, own[way])
        return row

    def _decode_start(self, length: int) -> int:
        """Where to begin so that no cache, which the thread counts share, passes ``length``."""
        counts = {way.threads for way in self.ways()}
        start = length - len(counts) * (self.options.rounds + 1) * self.options.tokens
        if start < 1:
            raise FiftyfoldError(f"--lengths: {length} tokens are fewer than the {length - start} to be decoded")
        return start

    def _decoding(self, network: Network, cache: object, threads: int) -> Side:
        ids = self.ids(self.options.tokens)
        return Side(lambda: network.decode(cache, ids), threads, ids.shape[1])

    def check_filling(self, length: int, row: dict[str, tuple[Way, Timing]]) -> str:
        """Whether caches filled at random decode as fast as caches that were read into, and both networks agree."""
        start = self._decode_start(length)
        ids = self.ids(length)
        crowded = min(start, self.config.index_topk * self.config.csa_ratio)
        sides = {}
        for name, label in ((THEIRS, THEIRS), (OURS, OURS_FASTEST)):
            way, _ = row[label]
            network = self.network(name, way)
            filled, read = network.cache(length), network.cache(length)
            network.fill(filled, start)
            network.read(read, ids[:, :start], THEIR_CHUNK)
            sides[f"{name}, filled"] = self._decoding(network, filled, way.threads)
            sides[f"{name}, read"] = self._decoding(network, read, way.threads)
        times = in_turn(sides, self.options.rounds)
        rows = [
            (name, *(times[f"{name}, {how}"].milliseconds() for how in ("read", "filled")),
             f"{ratio(times[f'{name}, filled'], times[f'{name}, read']):.2f}")
            for name in (THEIRS, OURS)
        ]  # fmt: skip
        near, far = (f"{self._agreement(ids[:, :n]):.1e}" for n in (crowded, start))
        return (
            f"In plain floats the logits of both networks differ by at most {near} of their standard deviation after "
            f"{crowded:,} tokens, when every entry is still chosen, and by at most {far} after {start:,}, where nearly "
            "tied entries may be chosen differently. Decoding there:\n\n"
            + table(["ms per token", "read", "filled", "filled / read"], rows)
        )

    def _agreement(self, ids: torch.Tensor) -> float:
        """The largest difference between both networks' logits over their standard deviation, in plain floats."""
        found = []
        for network in (Theirs(self.plain), Ours(self.plain)):
            cache = network.cache(ids.shape[1])
            found.append(network.read(cache, ids, THEIR_CHUNK))
        return float((found[0] - found[1]).abs().max() / found[0].std())

    def decode(self) -> tuple[str, Figure]:
        rows, lines, check = [], {}, ""
        baselines = [name for name in self.names if name != OURS]
        for length in self.options.lengths:
            row = self.decode_row(length)
            for label, (way, timing) in row.items():
                faster = ["" if label in baselines else f"{ratio(row[name][1], timing):.2f}" for name in baselines]
                rows.append([f"{length:,}", label, timing.milliseconds(), str(way), *faster])
                lines.setdefault(label, {})[length] = 1e3 * timing.median
                print(" | ".join(rows[-1]), flush=True)
            if length == self.options.lengths[0]:
                check = self.check_filling(length, row)
        header = ["tokens", "side", "ms per token", "at", *(f"times faster than {name}" for name in baselines)]
        figure = log_log(lines, "ms per decoded token", f"decoding, preset '{self.options.preset}'")
        return f"### Decode\n\n{table(header, rows)}\n{check}", figure

    # --- prefill

    def best_prefill(self, name: str, tokens: int) -> Reading:
        """The way that reads the end of a prefill fastest, in a trial."""
        end = min(TRIAL_TOKENS, tokens // 2)
        sides: dict[Reading, Side] = {}
        chunks = OUR_CHUNKS if name == OURS else (THEIR_CHUNK,)
        for reading in itertools.starmap(Reading, itertools.product(self.ways(), chunks)):

            def read(reading: Reading = reading) -> None:
                network = self.network(name, reading.way)
                cache = network.cache(tokens)
                network.fill(cache, tokens - end)
                network.read(cache, self.ids(end), reading.chunk)

            sides[reading] = Side(read, reading.way.threads)
        return fastest(in_turn(sides, 1))

    def prefill(self) -> str:
        tokens, rounds = self.options.prefill, self.options.prefill_rounds
        readings = {
            THEIRS: (THEIRS, self.best_prefill(THEIRS, tokens)),
            OURS_DEFAULT: (OURS, DEFAULT_READING),
            OURS_FASTEST: (OURS, self.best_prefill(OURS, tokens)),
        }
        self._networks.clear()
        seconds: dict[str, list[float]] = {label: [] for label in readings}
        extra: dict[str, list[int]] = {label: [] for label in readings}
        for _ in range(rounds):
            for label, (name, reading) in readings.items():
                took, more = in_child(read_from_nothing, name, self.weights, reading, self.ids(tokens))
                seconds[label] += took.rounds
                extra[label].append(more)
        times = {label: Timing(each) for label, each in seconds.items()}
        rows = []
        for label, (_, reading) in readings.items():
            faster, smaller = ratio(times[THEIRS], times[label]), max(extra[THEIRS]) / max(extra[label])
            better = ["", ""] if label == THEIRS else [f"{faster:.2f}", f"{smaller:.2f}"]
            cells = [f"{times[label].median:.1f}", f"{max(extra[label]) / 2**20:,.0f}", str(reading)]
            rows.append([label, *cells, *better])
        header = ["side", "seconds", "peak extra memory, MiB", "at", "times faster", "times less memory"]
        return f"### Prefill of {tokens:,} tokens\n\n" + table(header, rows)

    def growth(self) -> str:
        short, long = self.options.growth
        readings = {OURS_DEFAULT: DEFAULT_READING, OURS_FASTEST: self.best_prefill(OURS, long)}
        self._networks.clear()
        rows = []
        for label, reading in readings.items():
            per_token = {}
            for tokens, rounds in ((short, 3), (long, 1)):
                times, _ = in_child(read_from_nothing, OURS, self.weights, reading, self.ids(tokens), rounds)
                per_token[tokens] = Timing([seconds / tokens for seconds in times.rounds])
            grown = per_token[long].median / per_token[short].median
            cells = [timing.milliseconds() for timing in per_token.values()]
            rows.append([label, str(reading), *cells, f"{grown:.2f}"])
        header = ["side", "at", *(f"ms per token, {tokens:,} tokens" for tokens in (short, long)), "times more"]
        return "### Growth of the prefill's cost\n\n" + table(header, rows)

    def start_up(self) -> str:
        """Start-up of both with equal defaults, and of ours with weights in BF16."""
        bfloat16 = Way("bfloat16", DEFAULTS.threads)
        rows = []
        for name, way in ((THEIRS, DEFAULTS), (OURS, DEFAULTS), (OURS, bfloat16)):
            timing = start_up(name, self.weights, way.precision, way.threads)
            rows.append([name, str(way), timing.seconds()])
        return f"### Start-up\n\n{table(['side', 'at', 'process start to first token, s'], rows)}"


def read_from_nothing(
    name: str, weights: Path, reading: Reading, ids: torch.Tensor, rounds: int = 1
) -> tuple[Timing, int]:
    """Time reading ids [1, S] into an empty cache, and the bytes that it took at most beyond the loaded network."""
    way, chunk = reading.way, reading.chunk
    network = MAKERS[name](weights, way.precision)
    torch.set_num_threads(way.threads)
    # What is made once, at the first call, belongs to the network.
    network.read(network.cache(chunk), ids[:, :chunk], chunk)
    return_freed_memory()
    side = Side(lambda: network.read(network.cache(ids.shape[1]), ids, chunk), way.threads)
    with PeakMemory() as memory:
        times = Timing([side.seconds() for _ in range(rounds)])
    return times, memory.extra


def measure(options: argparse.Namespace) -> Findings:
    figure, found = None, []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        for part in options.parts:
            if part == "decode":
                text, figure = bench.decode()
                found.append(text)
            else:
                found.append(getattr(bench, part.replace("-", "_"))())
    return Findings("\n".join(found), figure, "Milliseconds per decoded token")


def main(arguments: list[str] | None = None) -> str:
    parser = options_of(__doc__, threads=[1, 2])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--lengths", type=count, nargs="+", default=LENGTHS, help="of the decode part")
    parser.add_argument("--prefill", type=count, default=32_768, help="tokens of the prefill part")
    parser.add_argument("--growth", type=count, nargs=2, default=[4096, 65_536], help="two lengths of the growth part")
    parser.add_argument("--rounds", type=count, default=5, help="of the decode part")
    parser.add_argument("--tokens", type=count, default=8, help="decoded in a round; 4 complete one csa block")
    parser.add_argument("--prefill-rounds", type=count, default=1)
    parser.add_argument("--compile", action="store_true", help="a third side: its hyper-connections compiled")
    return benchmark(parser, measure, arguments)


if __name__ == "__main__":
    command_line(main)
