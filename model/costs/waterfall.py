"""Waterfall of cache bytes per token, from a BF16 baseline to a network, one change at a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from model.cache.parts import GrowingPart
from model.config import CACHE_FORMATS, ModelConfig
from model.costs.cache import cache_bytes_per_token
from model.costs.references import GQA_HEAD_DIM, GQA_HEADS, times
from model.mixers.base import Mixer
from model.precision import index_layout, main_layout
from model.wording import count


@dataclass(frozen=True)
class Step:
    """One stage of the waterfall: growing cache bytes per token after it, and the factor by which it reduced them."""

    name: str
    bytes_per_token: float
    factor: float | None
    rule: str


def waterfall(config: ModelConfig, muon: bool = True) -> tuple[Step, ...]:
    """Return the stages from GQA-8 in BF16 to ``config``, one change at a time. The product of their factors is
    the total ratio.

    Each stage's bytes come from the stage's own entry sizes; the last stage's equal the cache's. Muon,
    hyper-connections and quantization-aware training leave every entry unchanged: their factor is 1.
    """
    plain = config.replace(**dict.fromkeys(CACHE_FORMATS, "bf16"))
    main, index = main_layout(plain).nbytes, index_layout(plain).nbytes
    packed_main, packed_index = main_layout(config).nbytes, index_layout(config).nbytes
    growing = {mixer: _growing(mixer, plain) for mixer in config.mixers}
    one_key_value = [mixer for mixer in config.mixers if mixer.one_key_value]
    standard = [mixer for mixer in config.mixers if not mixer.one_key_value and growing[mixer]]
    recurrent = [mixer for mixer in config.mixers if not mixer.one_key_value and not growing[mixer]]
    compressed = Counter(mixer for mixer in one_key_value if growing[mixer])
    shared, forgetting = len(one_key_value), len(one_key_value) - compressed.total()
    kept = sum(_bytes_per_token(growing[mixer]) for mixer in standard)
    entries = sum(number / growing[mixer][0].ratio for mixer, number in compressed.items())
    indexed = [ratio for layer, ratio in config.indexer_ratios.items() if config.mixers[layer].one_key_value]
    keys = sum(1 / ratio for ratio in indexed)
    ratios = [f"{number} {mixer.name} at 1/{growing[mixer][0].ratio}" for mixer, number in compressed.items()]
    stages: list[tuple[str, float, str]] = [
        (
            "GQA-8, BF16",
            4.0 * GQA_HEADS * GQA_HEAD_DIM * config.num_layers,
            f"{count(config.num_layers, 'layer')} x 2 x 8 heads x 128 dims x 2 bytes",
        )
    ]
    if recurrent:
        names = " and ".join(dict.fromkeys(mixer.name for mixer in recurrent))
        stages.append(
            (
                "recurrent layers",
                (config.num_layers - len(recurrent)) * stages[0][1] / config.num_layers,
                f"state of a fixed size in {count(len(recurrent), f'{names} layer')}",
            )
        )
    if standard:
        stages.append(
            (
                f"the model's own {_names(standard)} layers",
                kept + shared * stages[0][1] / config.num_layers,
                ", ".join(
                    f"{count(number, f'{mixer.name} layer')} x {_bytes_per_token(growing[mixer]):,g} bytes per token "
                    "in BF16"
                    for mixer, number in Counter(standard).items()
                ),
            )
        )
    if shared:
        stages += [
            (
                "one head with a shared key and value",
                kept + shared * main,
                f"{count(shared, 'layer')} x {config.head_dim} dims x 2 bytes, every token",
            ),
            (
                "windows: sliding layers drop old tokens",
                kept + (shared - forgetting) * main,
                f"fixed state of {count(config.window, 'token')} in {count(forgetting, 'layer')}",
            ),
            (
                "compression: csa and hca",
                kept + entries * main,
                f"layers: {', '.join(ratios) or 'none'}",
            ),
            (
                "index keys, BF16",
                kept + entries * main + keys * index,
                f"{count(len(indexed), 'layer')} x {config.index_head_dim} dims x 2 bytes"
                + (f" at 1/{indexed[0]}" if indexed else ""),
            ),
            (
                f"entries in {_formats(config, 'kv_format', 'rope_format')}",
                kept + entries * packed_main + keys * index,
                f"{packed_main} bytes per entry of {config.head_dim} dims, scales and padding included",
            ),
            (
                f"index keys in {_formats(config, 'index_format')}",
                kept + entries * packed_main + keys * packed_index,
                f"{packed_index} bytes per key of {config.index_head_dim} dims, scales included",
            ),
        ]
    total = sum(cache_bytes_per_token(config).values())
    packed = {mixer: _bytes_per_token(_growing(mixer, config)) for mixer in dict.fromkeys(standard)}
    for mixer, number in Counter(standard).items():
        if packed[mixer] != _bytes_per_token(growing[mixer]):
            before = stages[-1][1] + number * (packed[mixer] - _bytes_per_token(growing[mixer]))
            rule = f"{packed[mixer]:,g} bytes per token and layer, scales included"
            stages.append((f"{mixer.name} layers in {_formats(config, *mixer.formats)}", before, rule))
    if muon:
        stages.append(("Muon", total, "optimizer state only"))
    if config.hyper_connections:
        stages.append(("hyper-connections", total, "residual streams, parameters and FLOPs only"))
    if config.qat:
        rule = "experts' weights; allows FP4 index keys, counted above"
        stages.append(("FP4 quantization-aware training", total, rule))
    steps = [Step(stages[0][0], stages[0][1], None, stages[0][2])]
    for name, size, rule in stages[1:]:
        steps.append(Step(name, size, times(steps[-1].bytes_per_token, size), rule))
    return tuple(steps)


def _growing(mixer: type[Mixer], config: ModelConfig) -> list[GrowingPart]:
    return [part for part in mixer.cache_parts(config).values() if isinstance(part, GrowingPart)]


def _bytes_per_token(parts: list[GrowingPart]) -> float:
    return sum(part.layout.nbytes / part.ratio for part in parts)


def _names(mixers: list[type[Mixer]]) -> str:
    return " and ".join(dict.fromkeys(mixer.name for mixer in mixers))


def _formats(config: ModelConfig, *roles: str) -> str:
    return " and ".join(dict.fromkeys(getattr(config, role).upper() for role in roles))
