"""Mamba-2 (arXiv 2405.21060): a recurrent state of fixed size per head, with a decay that depends on the token.

Where the paper and its published checkpoints leave a choice, this follows ``Mamba2Mixer`` of transformers: the gate
multiplies before the norm, the norm runs over each group's channels, and the limits of the step size apply after
softplus.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.rms_norm import rms_norm
from kernels.ssd_scan import scan_in_fixed_order, ssd_scan
from model.forward.context import Context
from model.forward.execution import in_tiles
from model.layers.linear import Linear
from model.layers.norm import RMSNorm
from model.layers.rope import Rotation
from model.mixers.base import require
from model.mixers.options import check_count, check_flag, check_number, check_positive, is_number
from model.mixers.recurrent import RecurrentMixer, draw_rates, draw_steps
from model.mixers.short_convolution import ShortConvolution
from model.wording import quote
from model.work import Work

if TYPE_CHECKING:
    from model.config import ModelConfig

EXPAND = 2
_MIN_STEP = 1e-4
"""Smallest initial step size."""


class Shape(NamedTuple):
    """Sizes of a layer."""

    num_heads: int
    head_dim: int
    groups: int
    state_size: int

    @property
    def inner(self) -> int:
        """Channels of all heads."""
        return self.num_heads * self.head_dim

    @property
    def convolved(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner + 2 * self.groups * self.state_size


class Projected(NamedTuple):
    """Inputs of the scan, float32 [B, S, ...] each."""

    gate: Tensor
    """[B, S, inner], after SiLU."""
    channels: Tensor
    """[B, S, convolved]: x, B and C before the convolution."""
    dt: Tensor
    """[B, S, H]: step sizes."""


class Mamba2(RecurrentMixer):
    """Selective state-space layer. B and C are shared by the heads of a group."""

    name = "mamba2"
    options = {  # noqa: RUF012
        "expand": None,
        "num_heads": None,
        "head_dim": 64,
        "state_size": 128,
        "n_groups": 1,
        "conv_kernel": 4,
        "use_conv_bias": True,
        "chunk_size": 64,
        "time_step_min": 0.001,
        "time_step_max": 0.1,
        "time_step_limit": [0.0, None],
        "state_format": "fp32",
    }
    """``expand``: channels of all heads over hidden_size, 2 unless ``num_heads`` is given. ``state_size``: numbers per
    channel of a head. ``conv_kernel``: tokens under the convolution, the newest included. ``chunk_size``: tokens per
    matrix product in training; changes speed only. ``time_step_min`` and ``time_step_max``: initial step sizes.
    ``time_step_limit``: least and greatest step size, None for no limit. ``state_format``: ``fp32`` or ``bf16``, of
    state and convolution tail in the cache."""
    batch_invariant_widths = ("head_dim",)

    # --- declarations

    @classmethod
    def shape(cls, config: ModelConfig) -> Shape:
        o = config.mixer_options[cls.name]
        inner = config.hidden_size * (EXPAND if o["expand"] is None else o["expand"])
        heads = o["num_heads"] if o["num_heads"] is not None else int(inner) // o["head_dim"]
        return Shape(heads, o["head_dim"], o["n_groups"], o["state_size"])

    @classmethod
    def check_options(cls, options: Mapping[str, Any], key: str) -> None:
        super().check_options(options, key)
        for name in ("head_dim", "state_size", "n_groups", "chunk_size"):
            check_count(f"{key}.{name}", options[name])
        check_count(f"{key}.num_heads", options["num_heads"], optional=True)
        check_flag(f"{key}.use_conv_bias", options["use_conv_bias"])
        check_positive(f"{key}.expand", options["expand"], optional=True)
        for name in ("time_step_min", "time_step_max"):
            check_positive(f"{key}.{name}", options[name])
        limit = options["time_step_limit"]
        pair = isinstance(limit, list) and len(limit) == 2 and is_number(limit[0]) and limit[0] >= 0
        require(
            pair and (limit[1] is None or (is_number(limit[1]) and limit[1] > limit[0])),
            f"expected two rising numbers of at least 0, the second null for no limit, found {quote(limit)}",
            f"{key}.time_step_limit",
        )

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        o, key = config.mixer_options[cls.name], f"mixer_options.{cls.name}"
        check_number(f"{key}.time_step_max", o["time_step_max"], least=o["time_step_min"])
        cls._check_heads(key, o, config.hidden_size)

    @staticmethod
    def _check_heads(key: str, o: Any, hidden: int) -> None:
        expand, heads, head_dim, groups = (o[name] for name in ("expand", "num_heads", "head_dim", "n_groups"))
        require(
            expand is None or float(hidden * expand).is_integer(),
            f"expected a number above 0 that makes hidden_size {hidden} a whole number, found {quote(expand)}",
            f"{key}.expand",
        )
        inner = int(hidden * (EXPAND if expand is None else expand))
        if heads is None:
            require(
                inner % head_dim == 0, f"expected a divisor of {inner} channels, found {head_dim}", f"{key}.head_dim"
            )
            heads = inner // head_dim
        require(
            expand is None or heads * head_dim == inner,
            f"expected {inner} channels over head_dim {head_dim} because expand is {expand}, found {heads}",
            f"{key}.num_heads",
        )
        require(heads % groups == 0, f"expected a divisor of {heads} heads, found {groups}", f"{key}.n_groups")

    @classmethod
    def state_shape(cls, config: ModelConfig) -> tuple[int, int, int]:
        shape = cls.shape(config)
        return shape.num_heads, shape.head_dim, shape.state_size

    @classmethod
    def convolved_channels(cls, config: ModelConfig) -> int:
        return cls.shape(config).convolved

    @classmethod
    def work(cls, config: ModelConfig, tokens: int) -> list[Work]:
        shape, d = cls.shape(config), config.hidden_size
        kernel = config.mixer_options[cls.name]["conv_kernel"]
        projections = d * (shape.inner + shape.convolved + shape.num_heads) + shape.inner * d
        return [
            Work("mamba2 projections", "linear", "fp8", 2.0 * projections),
            Work("mamba2 convolution", "linear", "bf16", 2.0 * kernel * shape.convolved),
            Work("core state space, mamba2", "core", "bf16", 2.0 * 2 * shape.inner * shape.state_size),
        ]

    # --- the layer

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__(config, layer)
        o, shape = config.mixer_options[self.name], self.sizes
        self.in_proj = Linear(config.hidden_size, sum(self.split_sizes()["in_proj.weight"]))
        self.conv = ShortConvolution(shape.convolved, o["conv_kernel"], o["use_conv_bias"])
        self.A_log = nn.Parameter(torch.empty(shape.num_heads))
        self.D = nn.Parameter(torch.empty(shape.num_heads))
        self.dt_bias = nn.Parameter(torch.empty(shape.num_heads))
        self.norm = RMSNorm(shape.inner, config.norm_eps)
        self.out_proj = Linear(shape.inner, config.hidden_size)

    def set_config(self, config: ModelConfig) -> None:
        super().set_config(config)
        self.sizes = self.shape(config)

    def init_weights(self, std: float) -> None:
        """Draw decay rates between 1 and 16, and step sizes log-uniformly between their initial limits."""
        o = self.config.mixer_options[self.name]
        draw_rates(self.A_log)
        self.D.fill_(1.0)
        draw_steps(self.dt_bias, o["time_step_min"], o["time_step_max"], _MIN_STEP)

    def split_sizes(self) -> dict[str, tuple[int, ...]]:
        shape = self.sizes
        group = shape.groups * shape.state_size
        return {"in_proj.weight": (shape.inner, shape.inner, group, group, shape.num_heads)}  # z, x, B, C, dt

    def project(self, x: Tensor, rotation: Rotation | None, context: Context, cached: bool) -> Projected:
        shape = self.sizes
        gate, channels, dt = self.in_proj(x).split((shape.inner, shape.convolved, shape.num_heads), dim=-1)
        channels = self.precision.round_to(channels.float(), "convolution", self.layout, self.training, context.aux)
        least, most = self.config.mixer_options[self.name]["time_step_limit"]
        dt = F.softplus(_with_even_columns(dt.float() + self.dt_bias))[..., : shape.num_heads]
        dt = dt.clamp(min=least, max=most)
        return Projected(F.silu(gate.float()), channels, dt)

    def scan(
        self, convolved: Tensor, projected: Projected, state: Tensor | None, context: Context
    ) -> tuple[Tensor, Tensor]:
        shape, A, dt = self.sizes, -self.A_log.float().exp(), projected.dt
        group = shape.groups * shape.state_size
        x, B, C = convolved.split((shape.inner, group, group), dim=-1)
        x = x.unflatten(-1, (shape.num_heads, shape.head_dim))
        B, C = (z.unflatten(-1, (shape.groups, shape.state_size)) for z in (B, C))
        if context.batch_invariant:
            assert state is not None
            decay = in_tiles(lambda logs: _with_even_columns(logs).exp(), dt * A)[..., : len(A)]
            return scan_in_fixed_order(x, dt, decay, B, C, self.D, state, self.state_dtype(self.config))
        positions = None if context.documents is None else context.positions
        chunk_size = self.config.mixer_options[self.name]["chunk_size"]
        return ssd_scan(x, dt, A, B, C, self.D, state, positions, chunk_size)

    def gate(self, out: Tensor, projected: Projected, context: Context) -> Tensor:
        return out.flatten(2) * projected.gate

    def output(self, mixed: Tensor, rotation: Rotation | None) -> Tensor:
        groups = self.sizes.groups
        if groups == 1:
            return self.out_proj(self.norm(mixed))
        normed = rms_norm(mixed.unflatten(-1, (groups, -1)), self.norm.eps).flatten(-2)
        return self.out_proj(normed * self.norm.weight)


def _with_even_columns(x: Tensor) -> Tensor:
    """Append a column of zeros if the number of columns is odd. Then a tile of tokens fills pairs of vector registers;
    PyTorch rounds transcendental functions differently in the rest of a pair."""
    return F.pad(x, (0, 1)) if x.shape[-1] % 2 else x
