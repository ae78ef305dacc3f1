"""Decoding with a csa and an hca layer of V4-Flash's shape against two layers of GQA-8 in BF16, on a CPU.

    python -m benchmarks.against_gqa [--lengths 1024 ... 1048576] [--feed-forward] [--write docs/against-gqa.md]

Ours is a :class:`model.transformer.Transformer` of the two layers with Flash's widths and a cache filled with random
entries. GQA-8 has the same width, 64 query and 8 key-value heads of 128 dims (:func:`model.costs.with_gqa8`), BF16
weights, and preallocated BF16 keys and values. It uses PyTorch's attention or two batched products.

The time includes norms, projections, index scores, selection, and attention of both layers, but no hyper-connections.
Ours also includes the embedding and a head of 256 tokens. A dense feed-forward layer of one dim replaces the experts;
with ``--feed-forward``, both networks get one with the size of the active experts (6 routed and 1 shared). Flash's 256
experts do not fit into a laptop's memory.

Runs are interleaved: several implementations of grouped-query decoding in PyTorch, and ours in two precisions, at every
thread count. Tables show the fastest GQA, the fastest with ``scaled_dot_product_attention``, and ours with the defaults
and at its fastest. Lengths ascend; an implementation that is far slower at one length is skipped at the next.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lib.contenders import OURS_DEFAULT, OURS_FASTEST, PRECISIONS, Setting, all_settings, reported_settings
from benchmarks.lib.decoding import next_logits
from benchmarks.lib.drawing import log_log
from benchmarks.lib.harness import Result, make_parser, positive_int, run_benchmark, run_main
from benchmarks.lib.report import table
from benchmarks.lib.timing import Timer, Timing, fastest, format_threads, speedup, time_interleaved, too_slow
from model.cache import Cache
from model.cache.random_fill import fill_random
from model.config import ModelConfig
from model.errors import FiftyfoldError
from model.layers.rope import Rotary, RotaryFrequencies
from model.transformer import Transformer

THEIRS, SDPA = "2 x GQA-8", "2 x GQA-8, SDPA"
KV_HEADS, HEAD_DIM = 8, 128
LENGTHS = [1 << n for n in range(10, 21)]
_STORE_BYTES = 5 << 30
"""Above this size, both layers share one store: the traffic is the same, and no processor cache holds it."""
_VOCAB = 256


def flash_pair(preset: str, feed_forward: int) -> ModelConfig:
    """Return a config with the widths of ``preset``, one csa layer, and one hca layer."""
    return ModelConfig.from_preset(
        preset,
        vocab_size=_VOCAB,
        layers=("csa", "hca"),
        mtp_layers=0,
        num_hash_layers=0,
        hyper_connections=False,
        ffn="dense",
        ffn_size=feed_forward,
    )


# --- grouped-query decoding, query [heads, d] against keys and values [kv heads, T, d]


def sdpa_gqa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    grouped = query[None, :, None]
    return F.scaled_dot_product_attention(grouped, key[None], value[None], enable_gqa=True).flatten(0, 2)


def sdpa_grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Treat a group's query heads as the rows of one query, which reads its keys once."""
    grouped = query.view(1, len(key), -1, query.shape[-1])
    return F.scaled_dot_product_attention(grouped, key[None], value[None]).view_as(query)


def sdpa_expanded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Expand keys and values to one view per query head, without copies."""
    shape = (len(key), len(query) // len(key), *key.shape[1:])
    key, value = (x.unsqueeze(1).expand(shape).flatten(0, 1)[None] for x in (key, value))
    return F.scaled_dot_product_attention(query[None, :, None], key, value).flatten(0, 2)


def batched_products(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    grouped = query.view(len(key), -1, query.shape[-1])
    scores = torch.bmm(grouped, key.transpose(1, 2)) * query.shape[-1] ** -0.5
    return torch.bmm(scores.softmax(-1), value).view_as(query)


ATTENTIONS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "SDPA with enable_gqa": sdpa_gqa,
    "SDPA with groups as rows": sdpa_grouped,
    "SDPA on expanded heads": sdpa_expanded,
    "two bmm": batched_products,
}


class GroupedQueryLayer(nn.Module):
    """Single-token decoding layer: norm, projections, RoPE, attention over a store, output projection, SwiGLU."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden, heads = config.hidden_size, config.num_heads
        self.norm = nn.RMSNorm(hidden, config.norm_eps)
        self.wqkv = nn.Linear(hidden, (heads + 2 * KV_HEADS) * HEAD_DIM, bias=False)
        self.wo = nn.Linear(heads * HEAD_DIM, hidden, bias=False)
        self.ffn_norm = nn.RMSNorm(hidden, config.norm_eps)
        self.w13 = nn.Linear(hidden, 2 * config.ffn_size, bias=False)
        self.w2 = nn.Linear(config.ffn_size, hidden, bias=False)

    def forward(self, x: Tensor, rotation: Callable[[Tensor], Tensor], store: Tensor, attend: Callable) -> Tensor:
        """Map x bfloat16 [hidden] to [hidden]. The token's key and value go to the end of store [2, kv heads, T, d]."""
        qkv = self.wqkv(self.norm(x)).view(-1, HEAD_DIM)
        query, key, value = qkv.split((len(qkv) - 2 * KV_HEADS, KV_HEADS, KV_HEADS))
        store[0, :, -1], store[1, :, -1] = rotation(key), value
        x = x + self.wo(attend(rotation(query), *store).flatten())
        gate, up = self.w13(self.ffn_norm(x)).chunk(2)
        return x + self.w2(F.silu(gate) * up)


class GroupedQueryPair:
    """Two GQA layers."""

    def __init__(self, config: ModelConfig):
        self.layers = [GroupedQueryLayer(config).to(torch.bfloat16) for _ in range(2)]
        self.frequencies = RotaryFrequencies(Rotary(HEAD_DIM, config.rope_theta))

    @staticmethod
    def stores(tokens: int) -> list[Tensor]:
        """Return a bfloat16 store [2, kv heads, tokens, d] per layer, shared by both if two would be too large."""
        shape = (2, KV_HEADS, tokens, HEAD_DIM)
        count = 1 if 2 * 2 * math.prod(shape) > _STORE_BYTES else 2
        stores = [torch.empty(shape, dtype=torch.bfloat16) for _ in range(count)]
        for store in stores:
            for piece in store.split(4096, dim=2):
                piece.copy_(torch.randn(1, 1, *piece.shape[2:]))
        return [stores[0], stores[-1]]

    @torch.inference_mode()
    def decode(self, x: Tensor, stores: list[Tensor], attend: Callable) -> Tensor:
        tokens = stores[0].shape[2]
        turn = self.frequencies.at(torch.tensor([[tokens - 1]]))

        def rotation(heads: Tensor) -> Tensor:
            return turn.apply(heads[None, None])[0, 0].to(heads.dtype)

        for layer, store in zip(self.layers, stores):
            x = layer(x, rotation, store, attend)
        return x


class Bench:
    """Both pairs of layers and the options."""

    def __init__(self, options: argparse.Namespace, feed_forward: int):
        self.options = options
        self.config = flash_pair(options.preset, feed_forward)
        torch.manual_seed(0)
        self.ours = {precision: Transformer(self.config).eval() for precision in PRECISIONS}
        self.ours["bfloat16"].cast_weights(torch.bfloat16)
        self.theirs = GroupedQueryPair(self.config)
        self._skipped: set[str] = set()

    def row(self, tokens: int) -> dict[str, tuple[str, Timing]]:
        """Time one length. Returns (setting, timing) of the fastest GQA, overall and with SDPA, and of ours."""
        ours, theirs = self._our_timers(tokens), self._gqa_timers(tokens)
        times = time_interleaved({**ours, **theirs}, self.options.rounds)
        of_gqa = {name: times[name] for name in theirs}
        of_sdpa = {name: timing for name, timing in of_gqa.items() if name.startswith("SDPA")}
        found = {
            SDPA: fastest(of_sdpa),
            THEIRS: fastest(of_gqa),
            **reported_settings({setting: times[setting] for setting in ours}),
        }
        self._skipped |= too_slow(of_gqa) - {found[SDPA]}
        return {label: (str(key), times[key]) for label, key in found.items()}

    def _our_timers(self, tokens: int) -> Mapping[Setting, Timer]:
        repeat, settings = self.options.tokens, all_settings(self.options.threads)
        start = tokens - repeat * len(settings) * (self.options.rounds + 1)  # all settings extend one cache
        if start < 1:
            raise FiftyfoldError(f"--lengths: {tokens} tokens are fewer than the {tokens - start} tokens to decode")
        cache = Cache(self.config, 1, tokens)
        fill_random(cache, start)
        ids = torch.randint(_VOCAB, (1, repeat))

        def timer(model: Transformer, threads: int) -> Timer:
            @torch.inference_mode()
            def run() -> None:
                for token in ids.split(1, dim=1):
                    next_logits(model, token, cache)

            return Timer(run, threads, repeat)

        return {setting: timer(self.ours[setting.precision], setting.threads) for setting in settings}

    def _gqa_timers(self, tokens: int) -> Mapping[str, Timer]:
        stores = self.theirs.stores(tokens)
        x = torch.randn(self.config.hidden_size).bfloat16()
        repeat = self.options.tokens

        def timer(attend: Callable, threads: int) -> Timer:
            return Timer(lambda: [self.theirs.decode(x, stores, attend) for _ in range(repeat)], threads, repeat)

        return {
            label: timer(attend, threads)
            for (name, attend), threads in itertools.product(ATTENTIONS.items(), self._thread_counts())
            if (label := f"{name}, {format_threads(threads)}") not in self._skipped
        }

    def _thread_counts(self) -> list[int]:
        return list(dict.fromkeys(setting.threads for setting in all_settings(self.options.threads)))

    def run(self) -> tuple[str, dict[str, dict[int, float]]]:
        """Return the table, and milliseconds per token by label and length."""
        rows = []
        lines: dict[str, dict[int, float]] = {}
        faster: dict[str, dict[int, float]] = {OURS_DEFAULT: {}, OURS_FASTEST: {}}
        for tokens in self.options.lengths:
            row = self.row(tokens)
            store_bytes = 2 * 2 * 2 * KV_HEADS * HEAD_DIM * tokens
            for label, (setting, timing) in row.items():
                lines.setdefault(label, {})[tokens] = 1e3 * timing.median
                if label in faster:
                    times = [speedup(row[name][1], timing) for name in (SDPA, THEIRS)]
                    faster[label][tokens] = times[1]
                    cells = ["", *(f"{each:.2f}" for each in times)]
                else:
                    cells = [f"{store_bytes / timing.median / 1e9:.1f}", "", ""]
                rows.append([f"{tokens:,}", label, timing.milliseconds(), setting, *cells])
                print(" | ".join(rows[-1]), flush=True)
        header = ["tokens", "side", "ms per token", "at", "GB/s of its store"]
        header += [f"times faster than {name}" for name in (SDPA, THEIRS)]
        found = []
        for label, line in faster.items():
            crossing = crossover(line)
            found.append(f"{label}: {'none in this range' if crossing is None else f'{crossing:,.0f} tokens'}")
        return f"{table(header, rows)}\nCrossover with {THEIRS}, {'; '.join(found)}.\n", lines


def crossover(faster: Mapping[int, float]) -> float | None:
    """Return the length above which the speedup stays over 1, interpolated logarithmically, or None."""
    points = sorted(faster.items())
    for (low, a), (high, b) in reversed(list(itertools.pairwise(points))):
        if a < 1 <= b:
            fraction = -math.log(a) / (math.log(b) - math.log(a))
            return low * (high / low) ** fraction
    return None


def measure(options: argparse.Namespace) -> Result:
    full = ModelConfig.from_preset(options.preset)
    if full.num_heads % KV_HEADS:
        raise FiftyfoldError(
            f"--preset {options.preset}: {full.num_heads} query heads cannot form {KV_HEADS} equal groups"
        )
    active = (full.experts_per_token + full.num_shared_experts) * full.expert_size
    parts: list[str] = []
    lines: dict[str, dict[int, float]] = {}
    for feed_forward in (1, active) if options.feed_forward else (1,):
        suffix = "mixers only" if feed_forward == 1 else f"with a feed-forward of {feed_forward:,}"
        text, drawn = Bench(options, feed_forward).run()
        parts.append(f"### {suffix[0].upper()}{suffix[1:]}\n\n{text}")
        lines |= {f"{name}, {suffix}": line for name, line in drawn.items()}
    figure = log_log(lines, "ms per decoded token", f"decoding with two layers, widths of {options.preset}")
    return Result("\n".join(parts), figure, "Milliseconds per decoded token")


def main(arguments: list[str] | None = None) -> str:
    parser = make_parser(__doc__, threads=[1, 2])
    parser.add_argument("--preset", default="v4-flash")
    parser.add_argument("--lengths", type=positive_int, nargs="+", default=LENGTHS)
    parser.add_argument("--rounds", type=positive_int, default=5)
    parser.add_argument(
        "--tokens", type=positive_int, default=4, help="tokens decoded per round; 4 complete one csa block"
    )
    parser.add_argument(
        "--feed-forward",
        action="store_true",
        help="also time a feed-forward layer of the active experts' size (2.4 GB more)",
    )
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    run_main(main)
