"""Kimi Delta Attention (arXiv 2510.26692): a state of fixed size per head, corrected by the delta rule, with a
separate decay per channel.

Where the report differs or leaves a choice, this follows ``KimiLinearDeltaAttention`` of transformers 5.23, which runs
the published weights:

* queries are divided by sqrt(head_dim) after their L2 norm, which the report's equations leave out;
* keys and queries are divided by sqrt(|x|^2 + 1e-6), and not by max(|x|, eps);
* the logarithm of the decay is -exp(A_log) * softplus(x + dt_bias), with one A_log per head and one dt_bias per
  channel; the report leaves the function open;
* the output gate is a low-rank projection without bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.gated_delta_rule import gated_delta_rule, scan_in_fixed_order
from kernels.rms_norm import rms_norm
from model.forward.context import Context
from model.forward.execution import in_tiles
from model.layers.linear import Linear
from model.layers.norm import RMSNorm
from model.layers.rope import Rotation
from model.mixers.base import require
from model.mixers.options import check_count
from model.mixers.recurrent import RecurrentMixer, draw_rates, draw_steps
from model.mixers.short_convolution import ShortConvolution
from model.wording import quote
from model.work import Work

if TYPE_CHECKING:
    from model.config import ModelConfig

_L2_EPS = 1e-6
_INITIAL_STEPS = 1e-3, 1e-1
"""Initial step sizes, the values of softplus, drawn log-uniformly."""


class Projected(NamedTuple):
    """Inputs of the rule, float32 [B, S, ...] each."""

    channels: Tensor
    """[B, S, 3 * inner]: queries, keys and values of all heads before the convolution."""
    log_decay: Tensor
    """[B, S, H, head_dim]"""
    beta: Tensor
    """[B, S, H]: step sizes."""
    gate: Tensor
    """[B, S, inner], after the sigmoid."""


class KimiDeltaAttention(RecurrentMixer):
    """Kimi Delta Attention. ``inner`` are the channels of all heads."""

    name = "kda"
    options = {  # noqa: RUF012
        "num_heads": None,
        "head_dim": 64,
        "conv_kernel": 4,
        "chunk_size": 32,
        "state_format": "fp32",
    }
    """``num_heads``: None for as many as make ``hidden_size`` channels. ``head_dim``: channels of a query, key and
    value, and rank of both gates. ``conv_kernel``: tokens under the convolution, the newest included. ``chunk_size``:
    tokens per matrix product in training, a power of two; changes speed only. ``state_format``: ``fp32`` or ``bf16``,
    of state and convolution tail in the cache."""
    batch_invariant_widths = ("head_dim",)

    # --- declarations

    @classmethod
    def heads(cls, config: ModelConfig) -> tuple[int, int]:
        """Return the number of heads and their channels."""
        o = config.mixer_options[cls.name]
        heads, head_dim = o["num_heads"], o["head_dim"]
        return (config.hidden_size // head_dim if heads is None else heads), head_dim

    @classmethod
    def check_options(cls, options: Mapping[str, Any], key: str) -> None:
        super().check_options(options, key)
        check_count(f"{key}.head_dim", options["head_dim"])
        check_count(f"{key}.num_heads", options["num_heads"], optional=True)
        chunk = options["chunk_size"]
        require(
            type(chunk) is int and 1 <= chunk < 1 << 31 and chunk.bit_count() == 1,
            f"expected a power of two, found {quote(chunk)}",
            f"{key}.chunk_size",
        )

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        o = config.mixer_options[cls.name]
        require(
            o["num_heads"] is not None or config.hidden_size % o["head_dim"] == 0,
            f"expected a divisor of hidden_size {config.hidden_size} because "
            f"num_heads is not given, found {o['head_dim']}",
            f"mixer_options.{cls.name}.head_dim",
        )

    @classmethod
    def state_shape(cls, config: ModelConfig) -> tuple[int, int, int]:
        heads, head_dim = cls.heads(config)
        return heads, head_dim, head_dim

    @classmethod
    def convolved_channels(cls, config: ModelConfig) -> int:
        heads, head_dim = cls.heads(config)
        return 3 * heads * head_dim

    @classmethod
    def work(cls, config: ModelConfig, tokens: int) -> list[Work]:
        (heads, head_dim), d = cls.heads(config), config.hidden_size
        inner, kernel = heads * head_dim, config.mixer_options[cls.name]["conv_kernel"]
        projections = d * (4 * inner + 2 * head_dim + heads) + 2 * head_dim * inner
        return [
            Work("kda projections", "linear", "fp8", 2.0 * projections),
            Work("kda convolution", "linear", "bf16", 2.0 * kernel * 3 * inner),
            # Products of the state with the key and the query, and of the key with the change.
            Work("core delta rule, kda", "core", "bf16", 2.0 * 3 * inner * head_dim),
        ]

    # --- the layer

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        d, inner = config.hidden_size, self.num_heads * self.head_dim
        self.in_proj = Linear(d, sum(self.split_sizes()["in_proj.weight"]))
        self.conv = ShortConvolution(3 * inner, config.mixer_options[self.name]["conv_kernel"], bias=False)
        self.decay_proj = Linear(self.head_dim, inner)
        self.gate_proj = Linear(self.head_dim, inner)
        self.A_log = nn.Parameter(torch.empty(self.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.norm = RMSNorm(self.head_dim, config.norm_eps)
        self.out_proj = Linear(inner, d)

    def set_config(self, config: ModelConfig) -> None:
        super().set_config(config)
        self.num_heads, self.head_dim = self.heads(config)

    def init_weights(self, std: float) -> None:
        draw_rates(self.A_log)
        draw_steps(self.dt_bias, *_INITIAL_STEPS)

    def split_sizes(self) -> dict[str, tuple[int, ...]]:
        inner = self.num_heads * self.head_dim
        # Queries, keys, values, the narrow ends of the decay's and the gate's projections, step sizes.
        return {"in_proj.weight": (inner, inner, inner, self.head_dim, self.head_dim, self.num_heads)}

    def project(self, x: Tensor, rotation: Rotation | None, context: Context, cached: bool) -> Projected:
        inner, rank, heads = self.num_heads * self.head_dim, self.head_dim, self.num_heads
        channels, decay, gate, beta = self.in_proj(x).split((3 * inner, rank, rank, heads), dim=-1)
        # Contiguous: in a product with few outputs, a CPU library sums the rows of a slice in different orders, which
        # the batch-invariant mode excludes.
        decay, gate = decay.contiguous(), gate.contiguous()
        channels = self.precision.round_to(channels.float(), "convolution", self.layout, self.training, context.aux)
        steps = F.softplus(self.decay_proj(decay).float() + self.dt_bias).unflatten(-1, (heads, -1))
        log_decay = steps * -self.A_log.float().exp().unsqueeze(-1)
        return Projected(channels, log_decay, beta.float().sigmoid(), self.gate_proj(gate).float().sigmoid())

    def scan(
        self, convolved: Tensor, projected: Projected, state: Tensor | None, context: Context
    ) -> tuple[Tensor, Tensor]:
        heads = convolved.unflatten(-1, (3, self.num_heads, self.head_dim))  # queries, keys and values
        value, log_decay, beta = heads[:, :, 2], projected.log_decay, projected.beta
        if context.batch_invariant:
            assert state is not None
            query, key, decay = in_tiles(lambda x, g: (*self._normalize(x), g.exp()), heads, log_decay)
            return scan_in_fixed_order(query, key, value, decay, beta, state, self.state_dtype(self.config))
        positions = None if context.documents is None else context.positions
        query, key = self._normalize(heads)
        chunk_size = self.config.mixer_options[self.name]["chunk_size"]
        return gated_delta_rule(query, key, value, log_decay, beta, state, positions, chunk_size)

    def gate(self, out: Tensor, projected: Projected, context: Context) -> Tensor:
        normed = in_tiles(self.norm, out) if context.batch_invariant else self.norm(out)
        return normed.flatten(2) * projected.gate

    def _normalize(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Return queries of length 1 / sqrt(head_dim) and keys of length 1, [B, S, H, head_dim] each."""
        query, key = rms_norm(heads[:, :, :2], _L2_EPS / self.head_dim).unbind(2)
        return query / self.head_dim, key * self.head_dim**-0.5

    def output(self, mixed: Tensor, rotation: Rotation | None) -> Tensor:
        return self.out_proj(mixed)
