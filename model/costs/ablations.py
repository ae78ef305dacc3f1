"""Ablations: the network without each of the five choices of the recipe."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.cache_io import FORMAT_BITS
from model.config import CACHE_FORMATS, ModelConfig
from model.costs.parameters import ParameterCount, expert_weight_bytes
from model.costs.references import FLOAT32_BYTES, CostModel, costs_of, with_gqa8
from model.mixers.gqa import GroupedQueryAttention
from model.precision import index_layout


@dataclass(frozen=True)
class SideEffect:
    """An effect of a choice on something other than cache and FLOPs. ``rule`` is the counting rule."""

    what: str
    unit: str
    with_choice: float
    without: float
    rule: str


@dataclass(frozen=True)
class Ablation:
    """The network without one of the five choices, and the choice's side effects."""

    name: str
    taken_away: str
    used: bool
    costs: CostModel
    changes: tuple[SideEffect, ...] = ()


def find_ablations(
    config: ModelConfig, parameters: ParameterCount, muon_parameters: int, muon: bool = True
) -> tuple[Ablation, ...]:
    """Return the five choices of the recipe, each with the costs of ``config`` without it.

    ``muon_parameters`` counts the trained parameters under Muon, multi-token module included. ``muon`` is False if the
    recipe does not use it. A choice that the model does not make is not ``used`` and has the model's own costs.
    """
    hybrid = any(mixer is not GroupedQueryAttention for mixer in config.mixers)
    used = {role for mixer in config.mixers for role in mixer.formats}
    packed = [role for role in CACHE_FORMATS if role in used and FORMAT_BITS[getattr(config, role)] < 16]
    own = costs_of(config)
    experts = parameters.components.get("routed experts", (0, 0))[0]
    all_parameters = parameters.total + parameters.mtp
    hc = parameters.components.get("hyper-connections", (0, 0))[0]
    momentum = SideEffect(
        "optimizer state",
        "bytes",
        float(FLOAT32_BYTES * muon_parameters + 2 * FLOAT32_BYTES * (all_parameters - muon_parameters)),
        float(2 * FLOAT32_BYTES * all_parameters),
        "FP32 moments of all trained parameters, multi-token module included: one (4 bytes) under Muon, two (8 bytes) "
        "under AdamW; weights and gradients not counted",
    )
    streams = (
        SideEffect(
            "residual stream",
            "bytes per token",
            float(FLOAT32_BYTES * config.hc_mult * config.hidden_size),
            float(FLOAT32_BYTES * config.hidden_size),
            "FP32 state between two blocks, per token in flight",
        ),
        SideEffect(
            "parameters",
            "elements",
            float(parameters.total),
            float(parameters.total - hc),
            "main model, as counted above",
        ),
    )
    quantized = [
        SideEffect(
            "routed experts' weights",
            "bytes",
            expert_weight_bytes(experts, qat=True),
            expert_weight_bytes(experts, qat=False),
            "E2M1 with an E8M0 scale per 32; without training for it FP8 E4M3 with a scale per 128 x 128; main model",
        )
    ]
    if config.indexed_layers and config.index_format == "fp4":
        wider = config.index_head_dim + FLOAT32_BYTES - index_layout(config).nbytes
        quantized.append(
            SideEffect(
                "cache, if index keys must then stay FP8",
                "bytes per token",
                own.bytes_per_token,
                own.bytes_per_token + sum(wider / ratio for ratio in config.indexer_ratios.values()),
                "FP8 index key: one byte per dim and an FP32 scale; model.qat alone does not change the format",
            )
        )

    def without(used: bool, **changes: object) -> CostModel:
        return costs_of(config.replace(**changes)) if used else own

    return (
        Ablation(
            "hybrid attention",
            "GQA-8 in every layer, BF16 keys and values",
            hybrid,
            costs_of(with_gqa8(config)) if hybrid else own,
        ),
        Ablation(
            "precision per role",
            "cache entries and index products in BF16 (model.kv_format, index_format and gqa_format bf16)",
            bool(packed),
            without(bool(packed), **dict.fromkeys(packed, "bf16")),
        ),
        Ablation("Muon", "AdamW (train.optimizer.rule adamw)", muon, own, (momentum,) if muon else ()),
        Ablation(
            "hyper-connections",
            "one residual stream (model.hyper_connections false)",
            config.hyper_connections,
            without(config.hyper_connections, hyper_connections=False),
            streams if config.hyper_connections else (),
        ),
        Ablation(
            "FP4 quantization-aware training",
            "experts in FP8 (model.qat false)",
            config.qat,
            without(config.qat, qat=False),
            tuple(quantized) if config.qat and experts else (),
        ),
    )
