"""Inference against transformers' ``DeepseekV4ForCausalLM`` with the same weights, on a CPU.

    python -m benchmarks.against_transformers [--parts decode prefill ...] [--write docs/against-transformers.md]

* decode: milliseconds per token at each length. Caches are filled with random entries (transformers would need hours to
  prefill a million tokens). At the first length, caches are also prefilled, the logits of both networks are compared in
  unrounded floats, and decoding from both kinds of caches is timed.
* prefill: seconds to prefill random tokens in chunks, and additional resident memory, each network in its own process.
* growth: our prefill time per token at the longer length relative to the shorter one.
* start-up: seconds from process start to the first token.

Runs are interleaved, at every precision and thread count. Tables show transformers at its fastest, and ours with the
defaults and at its fastest. Lengths ascend; a setting that is far slower at one length is skipped at the next. Prefill
runs once, with the setting and chunk size that were fastest for its last tokens (transformers uses chunks of 1,024).
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
    OurNetwork,
    Setting,
    TransformersNetwork,
    all_settings,
    reported_settings,
    write_weights,
)
from benchmarks.lib.drawing import log_log
from benchmarks.lib.harness import Result, make_parser, positive_int, run_benchmark, run_main
from benchmarks.lib.report import table
from benchmarks.lib.start_up import start_up
from benchmarks.lib.timing import (
    PeakMemory,
    Timer,
    Timing,
    fastest,
    run_in_subprocess,
    speedup,
    time_interleaved,
    too_slow,
    trim_memory,
)
from model.config import ModelConfig
from model.errors import FiftyfoldError

THEIRS, COMPILED, OURS = "transformers", "transformers, compiled", "ours"
PARTS = ("decode", "prefill", "growth", "start-up")
THEIR_CHUNK, OUR_CHUNKS = 1024, (256, DEFAULT_CHUNK, 1024, 2048)
TRIAL_TOKENS = 2048
"""Number of last tokens of a prefill that a trial run times."""
LENGTHS = [4096, 16_384, 32_768, 131_072, 1_048_576]


@dataclass(frozen=True)
class PrefillSetting:
    """Setting and chunk size of a prefill."""

    setting: Setting
    chunk: int

    def __str__(self) -> str:
        return f"{self.setting}, pieces of {self.chunk:,}"


DEFAULT_PREFILL = PrefillSetting(DEFAULTS, DEFAULT_CHUNK)
LOADERS: dict[str, Callable[[Path, str], Network]] = {
    THEIRS: TransformersNetwork,
    COMPILED: lambda folder, precision: TransformersNetwork(folder, precision, compiled=True),
    OURS: OurNetwork,
}


class Bench:
    """Options, the weights' folder, and a cache of loaded networks."""

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options, self.weights, self.plain = options, folder / "rounded", folder / "plain"
        self.names = [THEIRS, COMPILED, OURS] if options.compile else [THEIRS, OURS]
        self.config = ModelConfig.from_preset(options.preset)
        write_weights(self.config, folder)
        self._networks: dict[tuple[str, str], Network] = {}
        self._skipped: set[tuple[str, Setting]] = set()

    def network(self, name: str, setting: Setting) -> Network:
        key = name, setting.precision
        if key not in self._networks:
            self._networks[key] = LOADERS[name](self.weights, setting.precision)
        return self._networks[key]

    def ids(self, tokens: int) -> torch.Tensor:
        return torch.randint(0, self.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(tokens))

    def _settings(self) -> list[Setting]:
        return all_settings(self.options.threads)

    # --- decode

    def decode_row(self, length: int) -> dict[str, tuple[Setting, Timing]]:
        """Time decoding the last tokens before ``length``. Returns (setting, timing) by label."""
        start = self._decode_start(length)
        timers: dict[tuple[str, Setting], Timer] = {}
        for name, precision in itertools.product(self.names, PRECISIONS):
            settings = [
                setting
                for setting in self._settings()
                if setting.precision == precision and (name, setting) not in self._skipped
            ]
            if not settings:
                continue
            network = self.network(name, settings[0])
            cache = network.new_cache(length)
            network.fill(cache, start)
            for setting in settings:
                timers[name, setting] = self._decode_timer(network, cache, setting.threads)
        times = time_interleaved(timers, self.options.rounds)
        row: dict[str, tuple[Setting, Timing]] = {}
        for name in self.names:
            own = {setting: timing for (network_name, setting), timing in times.items() if network_name == name}
            self._skipped |= {(name, s) for s in too_slow(own) if (name, s) != (OURS, DEFAULTS)}
            reported = reported_settings(own) if name == OURS else {name: fastest(own)}
            row |= {label: (setting, own[setting]) for label, setting in reported.items()}
        return row

    def _decode_start(self, length: int) -> int:
        """Return the start position from which all thread counts, sharing a cache, decode up to ``length``."""
        counts = {setting.threads for setting in self._settings()}
        start = length - len(counts) * (self.options.rounds + 1) * self.options.tokens
        if start < 1:
            raise FiftyfoldError(f"--lengths: {length} tokens are fewer than the {length - start} tokens to decode")
        return start

    def _decode_timer(self, network: Network, cache: object, threads: int) -> Timer:
        ids = self.ids(self.options.tokens)
        return Timer(lambda: network.decode(cache, ids), threads, ids.shape[1])

    def check_filling(self, length: int, row: dict[str, tuple[Setting, Timing]]) -> str:
        """Compare random caches with prefilled ones in speed, and both networks in their logits."""
        start = self._decode_start(length)
        ids = self.ids(length)
        all_selected = min(start, self.config.index_topk * self.config.csa_ratio)
        timers = {}
        for name, label in ((THEIRS, THEIRS), (OURS, OURS_FASTEST)):
            setting, _ = row[label]
            network = self.network(name, setting)
            filled, read = network.new_cache(length), network.new_cache(length)
            network.fill(filled, start)
            network.prefill(read, ids[:, :start], THEIR_CHUNK)
            timers[f"{name}, filled"] = self._decode_timer(network, filled, setting.threads)
            timers[f"{name}, read"] = self._decode_timer(network, read, setting.threads)
        times = time_interleaved(timers, self.options.rounds)
        rows = [
            (name, *(times[f"{name}, {how}"].milliseconds() for how in ("read", "filled")),
             f"{speedup(times[f'{name}, filled'], times[f'{name}, read']):.2f}")
            for name in (THEIRS, OURS)
        ]  # fmt: skip
        near, far = (f"{self._logit_difference(ids[:, :n]):.1e}" for n in (all_selected, start))
        return (
            f"In plain floats the logits of both networks differ by at most {near} of their standard deviation after "
            f"{all_selected:,} tokens, when every entry is still chosen, and by at most {far} after {start:,}, where "
            "nearly tied entries may be chosen differently. Decoding there:\n\n"
            + table(["ms per token", "read", "filled", "filled / read"], rows)
        )

    def _logit_difference(self, ids: torch.Tensor) -> float:
        """Return the largest logit difference relative to the standard deviation, in unrounded floats."""
        theirs, ours = (
            network.prefill(network.new_cache(ids.shape[1]), ids, THEIR_CHUNK)
            for network in (TransformersNetwork(self.plain), OurNetwork(self.plain))
        )
        return float((theirs - ours).abs().max() / theirs.std())

    def decode(self) -> tuple[str, Figure]:
        rows, lines, check = [], {}, ""
        baselines = [name for name in self.names if name != OURS]
        for length in self.options.lengths:
            row = self.decode_row(length)
            for label, (setting, timing) in row.items():
                speedups = ["" if label in baselines else f"{speedup(row[name][1], timing):.2f}" for name in baselines]
                rows.append([f"{length:,}", label, timing.milliseconds(), str(setting), *speedups])
                lines.setdefault(label, {})[length] = 1e3 * timing.median
                print(" | ".join(rows[-1]), flush=True)
            if length == self.options.lengths[0]:
                check = self.check_filling(length, row)
        header = ["tokens", "side", "ms per token", "at", *(f"times faster than {name}" for name in baselines)]
        figure = log_log(lines, "ms per decoded token", f"decoding, preset '{self.options.preset}'")
        return f"### Decode\n\n{table(header, rows)}\n{check}", figure

    # --- prefill

    def best_prefill(self, name: str, tokens: int) -> PrefillSetting:
        """Return the setting that is fastest for the last tokens of a prefill."""
        end = min(TRIAL_TOKENS, tokens // 2)
        timers: dict[PrefillSetting, Timer] = {}
        chunks = OUR_CHUNKS if name == OURS else (THEIR_CHUNK,)
        for candidate in itertools.starmap(PrefillSetting, itertools.product(self._settings(), chunks)):

            def prefill_end(candidate: PrefillSetting = candidate) -> None:
                network = self.network(name, candidate.setting)
                cache = network.new_cache(tokens)
                network.fill(cache, tokens - end)
                network.prefill(cache, self.ids(end), candidate.chunk)

            timers[candidate] = Timer(prefill_end, candidate.setting.threads)
        return fastest(time_interleaved(timers, 1))

    def prefill(self) -> str:
        tokens, rounds = self.options.prefill, self.options.prefill_rounds
        settings = {
            THEIRS: (THEIRS, self.best_prefill(THEIRS, tokens)),
            OURS_DEFAULT: (OURS, DEFAULT_PREFILL),
            OURS_FASTEST: (OURS, self.best_prefill(OURS, tokens)),
        }
        self._networks.clear()
        seconds: dict[str, list[float]] = {label: [] for label in settings}
        extra: dict[str, list[int]] = {label: [] for label in settings}
        for _ in range(rounds):
            for label, (name, setting) in settings.items():
                timing, additional = run_in_subprocess(
                    prefill_from_scratch, name, self.weights, setting, self.ids(tokens)
                )
                seconds[label] += timing.rounds
                extra[label].append(additional)
        times = {label: Timing(each) for label, each in seconds.items()}
        rows = []
        for label, (_, setting) in settings.items():
            faster, smaller = speedup(times[THEIRS], times[label]), max(extra[THEIRS]) / max(extra[label])
            ratios = ["", ""] if label == THEIRS else [f"{faster:.2f}", f"{smaller:.2f}"]
            cells = [f"{times[label].median:.1f}", f"{max(extra[label]) / 2**20:,.0f}", str(setting)]
            rows.append([label, *cells, *ratios])
        header = ["side", "seconds", "peak extra memory, MiB", "at", "times faster", "times less memory"]
        return f"### Prefill of {tokens:,} tokens\n\n" + table(header, rows)

    def growth(self) -> str:
        short, long = self.options.growth
        settings = {OURS_DEFAULT: DEFAULT_PREFILL, OURS_FASTEST: self.best_prefill(OURS, long)}
        self._networks.clear()
        rows = []
        for label, setting in settings.items():
            per_token = {}
            for tokens, rounds in ((short, 3), (long, 1)):
                times, _ = run_in_subprocess(
                    prefill_from_scratch, OURS, self.weights, setting, self.ids(tokens), rounds
                )
                per_token[tokens] = Timing([seconds / tokens for seconds in times.rounds])
            grown = per_token[long].median / per_token[short].median
            cells = [timing.milliseconds() for timing in per_token.values()]
            rows.append([label, str(setting), *cells, f"{grown:.2f}"])
        header = ["side", "at", *(f"ms per token, {tokens:,} tokens" for tokens in (short, long)), "times more"]
        return "### Growth of the prefill's cost\n\n" + table(header, rows)

    def start_up(self) -> str:
        """Time the start-up of both with our defaults, and of ours with BF16 weights."""
        bfloat16 = Setting("bfloat16", DEFAULTS.threads)
        rows = []
        for name, setting in ((THEIRS, DEFAULTS), (OURS, DEFAULTS), (OURS, bfloat16)):
            timing = start_up(name, self.weights, setting.precision, setting.threads)
            rows.append([name, str(setting), timing.seconds()])
        return f"### Start-up\n\n{table(['side', 'at', 'process start to first token, s'], rows)}"


def prefill_from_scratch(
    name: str, weights: Path, prefill_setting: PrefillSetting, ids: torch.Tensor, rounds: int = 1
) -> tuple[Timing, int]:
    """Prefill ids [1, S] into an empty cache. Returns the timing, and peak bytes beyond the loaded network."""
    setting, chunk = prefill_setting.setting, prefill_setting.chunk
    network = LOADERS[name](weights, setting.precision)
    torch.set_num_threads(setting.threads)
    # Warm up, so that memory allocated once counts as part of the network.
    network.prefill(network.new_cache(chunk), ids[:, :chunk], chunk)
    trim_memory()
    timer = Timer(lambda: network.prefill(network.new_cache(ids.shape[1]), ids, chunk), setting.threads)
    with PeakMemory() as memory:
        times = Timing([timer.seconds() for _ in range(rounds)])
    return times, memory.extra


def measure(options: argparse.Namespace) -> Result:
    figure, sections = None, []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        for part in options.parts:
            if part == "decode":
                text, figure = bench.decode()
                sections.append(text)
            else:
                sections.append(getattr(bench, part.replace("-", "_"))())
    return Result("\n".join(sections), figure, "Milliseconds per decoded token")


def main(arguments: list[str] | None = None) -> str:
    parser = make_parser(__doc__, threads=[1, 2])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--lengths", type=positive_int, nargs="+", default=LENGTHS, help="for the decode part")
    parser.add_argument("--prefill", type=positive_int, default=32_768, help="tokens for the prefill part")
    parser.add_argument(
        "--growth", type=positive_int, nargs=2, default=[4096, 65_536], help="two lengths for the growth part"
    )
    parser.add_argument("--rounds", type=positive_int, default=5, help="for the decode part")
    parser.add_argument(
        "--tokens", type=positive_int, default=8, help="tokens decoded per round; 4 complete one csa block"
    )
    parser.add_argument("--prefill-rounds", type=positive_int, default=1)
    parser.add_argument("--compile", action="store_true", help="also time transformers with compiled hyper-connections")
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    run_main(main)
