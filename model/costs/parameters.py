"""Parameter counts."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from model.config import ModelConfig
from model.precision import EXPERT_FORMAT

PARAMETER_RULE = (
    "trained tensors of the main model, embedding and head included; the multi-token module is listed separately; "
    "router biases (not trained by gradient) and hash-routing tables (integers) are not counted. Active: weights that "
    "multiply a token: the head, but not an embedding that is not the head (a lookup) or routed experts that were not "
    "chosen"
)

_COMPONENTS = (
    ("multi-token module", r"^mtp\."),
    ("embedding", r"^embed\."),
    ("head", r"^head\."),
    ("hyper-connections", r"_residual\.|^hyper_head\."),
    ("norms", r"^norm\.|^layers\.\d+\.(attn|ffn)_norm\."),
    ("indexers", r"\.indexer\."),
    ("compressors", r"\.compressor\."),
    ("attention", r"\.attn\."),
    ("router", r"\.ffn\.router\."),
    ("shared experts", r"\.ffn\.shared\."),
    ("routed experts", r"\.ffn\.w[123]$"),
    ("feed-forward", r"\.ffn\."),
)


@dataclass(frozen=True)
class ParameterCount:
    """Parameter counts by :data:`PARAMETER_RULE`. ``components`` maps a name to (all, active per token)."""

    components: dict[str, tuple[int, int]]
    mtp: int

    @property
    def total(self) -> int:
        return sum(total for total, _ in self.components.values())

    @property
    def active(self) -> int:
        return sum(active for _, active in self.components.values())


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count the tensors of a :class:`model.transformer.Transformer`, which may live on the meta device.

    By :data:`PARAMETER_RULE` Flash has 284.33B, 13.27B active, and Pro 1.573T, 48.85B active, which round to the
    published 284B / 13B and 1.6T / 49B. Flash's published total includes the embedding (0.53B) and excludes the
    multi-token module (6.61B). Pro's rounds to 1.6T with its module (25.84B), too.
    """
    config: ModelConfig = model.config  # type: ignore[assignment]
    components: dict[str, tuple[int, int]] = {}
    mtp = 0
    for name, parameter in model.named_parameters():
        component = next(title for title, pattern in _COMPONENTS if re.search(pattern, name))
        elements = active = parameter.numel()
        if component == "multi-token module":
            mtp += elements
            continue
        if component == "embedding":
            active = elements if config.tie_word_embeddings else 0
        elif component == "routed experts":
            active = elements // config.num_experts * config.experts_per_token
        total, active_total = components.get(component, (0, 0))
        components[component] = total + elements, active_total + active
    return ParameterCount(components, mtp)


def expert_weight_bytes(elements: int, qat: bool) -> float:
    """Return the stored bytes of routed experts' weights in the release's formats: with QAT, E2M1 and an E8M0 scale per
    32 values; otherwise E4M3 and one per 128 x 128 tile."""
    if qat:
        assert EXPERT_FORMAT == "fp4"
        return elements * (1 / 2 + 1 / 32)
    return elements * (1 + 1 / 128**2)
