"""Our network against transformers' ``DeepseekV4ForCausalLM`` with the same weights on CPU: decode, prefill, growth.

    python -m benchmarks.against_transformers [--parts decode prefill growth] [--write docs/against-transformers.md]

* decode: milliseconds per token up to each length. Caches are filled with random entries on both sides (reading a
  million tokens takes transformers hours); at the first length both are also really filled by reading, the logits of
  both networks compared in plain floats, and the two ways timed beside each other.
* prefill: reading random tokens from nothing, in pieces; seconds, and memory beyond what was resident before, each
  side in a process of its own.
* growth: our prefill's time per token at the longer length over that at the shorter one.

Sides run in turn, at every precision and thread count, and a row shows each side's fastest; lengths ascend, and a way
far behind at one is not timed at the next. A prefill runs once at what was fastest in a trial of its end (and of our
piece sizes; transformers reads 1,024 tokens at a time).
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import torch

from benchmarks.contenders import PRECISIONS, Network, Ours, Theirs, write_weights
from benchmarks.drawing import log_log
from benchmarks.report import check_page, command_line, count, table, verdict, verdict_at_most, write_tables
from benchmarks.timing import (
    OtherLoad,
    PeakMemory,
    Side,
    Timing,
    fastest,
    hopeless,
    in_child,
    in_turn,
    machine,
    ratio,
    return_freed_memory,
    threads_of,
)
from model.config import ModelConfig
from model.errors import FiftyfoldError
from model.execution import Mode

THEIRS, COMPILED, OURS = "transformers", "transformers, compiled", "ours"
THEIR_CHUNK, OUR_CHUNKS = 1024, (256, 512, 1024, 2048)
TRIAL_TOKENS = 2048
"""How much of a prefill, the end of it, a trial reads."""
DECODE_TARGETS = {4096: 3.0, 16_384: 3.0, 32_768: 3.0, 131_072: 5.0, 1_048_576: 20.0}
PREFILL_TARGET, MEMORY_TARGET, GROWTH_TARGET = 10.0, 3.0, 2.5


@dataclass(frozen=True)
class Way:
    """How one side works."""

    precision: str
    threads: int
    execution: Mode
    """Ours only."""
    chunk: int = THEIR_CHUNK

    def __str__(self) -> str:
        return f"{self.precision}, {threads_of(self.threads)}"


MAKERS: dict[str, Callable[[Path, Way], Network]] = {
    THEIRS: lambda folder, way: Theirs(folder, way.precision),
    COMPILED: lambda folder, way: Theirs(folder, way.precision, compiled=True),
    OURS: lambda folder, way: Ours(folder, way.precision, way.execution),
}


class Bench:
    """The options, the weights' folder, and networks loaded once."""

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
            self._networks[key] = MAKERS[name](self.weights, way)
        return self._networks[key]

    def ids(self, tokens: int) -> torch.Tensor:
        return torch.randint(0, self.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(tokens))

    def ways(self) -> Iterable[Way]:
        return itertools.starmap(Way, itertools.product(PRECISIONS, self.options.threads, [self.options.execution]))

    # --- decode

    def decode_row(self, length: int) -> dict[str, tuple[Way, Timing]]:
        """Time decoding the last tokens before ``length``: of each side its fastest way."""
        start = self._decode_start(length)
        sides: dict[tuple[str, Way], Side] = {}
        for name, precision in itertools.product(self.names, PRECISIONS):
            ways = [way for way in self.ways() if way.precision == precision and (name, way) not in self._given_up]
            if not ways:
                continue
            network = self.network(name, ways[0])
            cache = network.cache(length)
            network.fill(cache, start)
            for way in ways:
                sides[name, way] = self._decoding(network, cache, way.threads)
        times = in_turn(sides, self.options.rounds)
        row = {}
        for name in self.names:
            own = {key: timing for key, timing in times.items() if key[0] == name}
            self._given_up |= hopeless(own)
            row[name] = (fastest(own)[1], own[fastest(own)])
        return row

    def _decode_start(self, length: int) -> int:
        """Where to begin so that no cache, which the thread counts share, passes ``length``."""
        start = length - len(self.options.threads) * (self.options.rounds + 1) * self.options.tokens
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
        for name in (THEIRS, OURS):
            way, _ = row[name]
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

    def decode(self) -> str:
        rows, lines, check = [], {name: {} for name in self.names}, ""
        for length in self.options.lengths:
            row = self.decode_row(length)
            times = {name: timing for name, (_, timing) in row.items()}
            faster = [ratio(times[name], times[OURS]) for name in self.names if name != OURS]
            cells = [f"{length:,}"]
            for name, (way, timing) in row.items():
                cells += [timing.milliseconds(), str(way)]
                lines[name][length] = 1e3 * timing.median
            target = DECODE_TARGETS.get(length)
            cells += [*(f"{x:.2f}" for x in faster), verdict(faster[0], target) if target else ""]
            rows.append(cells)
            print(" | ".join(cells), flush=True)
            if length == self.options.lengths[0]:
                check = self.check_filling(length, row)
        header = ["tokens", *(cell for name in self.names for cell in (f"{name}, ms per token", "at"))]
        header += [f"times faster than {name}" for name in self.names if name != OURS]
        if self.options.write:
            picture = self.options.write.with_suffix(".png")
            log_log(picture, lines, "ms per decoded token", f"decoding, preset '{self.options.preset}'")
        return f"### Decode\n\n{table([*header, 'target'], rows)}\n{check}"

    # --- prefill

    def best_prefill(self, name: str, tokens: int) -> Way:
        """The way that reads the end of a prefill fastest, in a trial."""
        end = min(TRIAL_TOKENS, tokens // 2)
        sides: dict[Way, Side] = {}
        for chunk in OUR_CHUNKS if name == OURS else (THEIR_CHUNK,):
            for way in (replace(way, chunk=chunk) for way in self.ways()):

                def read(way: Way = way) -> None:
                    network = self.network(name, way)
                    cache = network.cache(tokens)
                    network.fill(cache, tokens - end)
                    network.read(cache, self.ids(end), way.chunk)

                sides[way] = Side(read, way.threads)
        return fastest(in_turn(sides, 1))

    def prefill(self) -> str:
        tokens, rounds = self.options.prefill, self.options.prefill_rounds
        ways = {name: self.best_prefill(name, tokens) for name in (THEIRS, OURS)}
        self._networks.clear()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        extra: dict[str, list[int]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                took, more = in_child(read_from_nothing, name, self.weights, way, self.ids(tokens))
                seconds[name] += took.rounds
                extra[name].append(more)
        times = {name: Timing(each) for name, each in seconds.items()}
        faster = ratio(times[THEIRS], times[OURS])
        smaller = max(extra[THEIRS]) / max(extra[OURS])
        rows = [
            (name, f"{times[name].median:.1f}", f"{max(extra[name]) / 2**20:,.0f}", f"{way}, pieces of {way.chunk:,}")
            for name, way in ways.items()
        ]
        rows.append(("times better", f"{faster:.2f}", f"{smaller:.2f}", ""))
        rows.append(("target", verdict(faster, PREFILL_TARGET), verdict(smaller, MEMORY_TARGET), ""))
        return f"### Prefill of {tokens:,} tokens\n\n" + table(["", "seconds", "peak extra memory, MiB", "at"], rows)

    def growth(self) -> str:
        short, long = self.options.growth
        way = self.best_prefill(OURS, long)
        self._networks.clear()
        per_token = {}
        for tokens, rounds in ((short, 3), (long, 1)):
            times, _ = in_child(read_from_nothing, OURS, self.weights, way, self.ids(tokens), rounds)
            per_token[tokens] = Timing([seconds / tokens for seconds in times.rounds])
        rows = [(f"{tokens:,}", timing.milliseconds()) for tokens, timing in per_token.items()]
        grown = per_token[long].median / per_token[short].median
        rows += [("times more", f"{grown:.2f}"), ("target", verdict_at_most(grown, GROWTH_TARGET))]
        header = ["tokens", f"our prefill, ms per token ({way}, pieces of {way.chunk:,})"]
        return "### Growth of the prefill's cost\n\n" + table(header, rows)


def read_from_nothing(name: str, weights: Path, way: Way, ids: torch.Tensor, rounds: int = 1) -> tuple[Timing, int]:
    """Time reading ids [1, S] into an empty cache, and the bytes that it took at most beyond the loaded network."""
    network = MAKERS[name](weights, way)
    torch.set_num_threads(way.threads)
    # What is made once, at the first call, belongs to the network: with compiled code that is one of each size.
    warm = ids if name == OURS and way.execution == "compiled" else ids[:, : way.chunk]
    network.read(network.cache(warm.shape[1]), warm, way.chunk)
    return_freed_memory()
    side = Side(lambda: network.read(network.cache(ids.shape[1]), ids, way.chunk), way.threads)
    with PeakMemory() as memory:
        times = Timing([side.seconds() for _ in range(rounds)])
    return times, memory.extra


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("decode", "prefill", "growth")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--lengths", type=count, nargs="+", default=list(DECODE_TARGETS), help="of the decode part")
    parser.add_argument("--prefill", type=count, default=32_768, help="tokens of the prefill part")
    parser.add_argument("--growth", type=count, nargs=2, default=[4096, 65_536], help="two lengths of the growth part")
    parser.add_argument("--threads", type=count, nargs="+", default=[1, 2])
    parser.add_argument("--execution", choices=get_args(Mode), default="compiled", help="how ours is computed")
    parser.add_argument("--rounds", type=count, default=5, help="of the decode part")
    parser.add_argument("--tokens", type=count, default=8, help="decoded in a round; 4 complete one csa block")
    parser.add_argument("--prefill-rounds", type=count, default=1)
    parser.add_argument("--compile", action="store_true", help="a third side: its hyper-connections compiled")
    parser.add_argument("--write", type=Path, help="a Markdown file whose part between the two markers is replaced")
    options = parser.parse_args(arguments)
    if options.write:
        check_page(options.write)
    load = OtherLoad()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        text = "\n".join(getattr(bench, part)() for part in options.parts)
    text = f"{machine()}; {load}.\n\n{text}"
    print(text)
    if options.write:
        write_tables(options.write, text)
    return text


if __name__ == "__main__":
    command_line(main)
