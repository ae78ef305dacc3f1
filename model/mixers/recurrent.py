"""Base of recurrent mixers: a short convolution, followed by a state of fixed size per head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kernels.cache_io import EntryLayout
from model.cache.parts import CachePart, RecurrentPart
from model.errors import ConfigError
from model.forward.context import Context
from model.layers.linear import Linear
from model.mixers.base import Mixer, StoredFormat
from model.mixers.options import check_count
from model.mixers.short_convolution import ShortConvolution
from model.wording import quote

if TYPE_CHECKING:
    from model.cache.layer_cache import LayerCache
    from model.config import ModelConfig

STATE_FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Formats of states and of the tokens kept for a convolution."""
_MAX_RATE = 16.0
"""Largest initial decay rate; the smallest is 1 (the initialization of Mamba-2's and Kimi Linear's authors)."""


class RecurrentMixer(Mixer):
    """A mixer with the options ``conv_kernel`` and ``state_format``.

    ``projected`` of :meth:`mix` has a field ``channels``, the inputs of the convolution.
    """

    conv: ShortConvolution
    out_proj: Linear

    # --- declarations

    @classmethod
    def state_shape(cls, config: ModelConfig) -> tuple[int, int, int]:
        """Return the shape of a sequence's state: heads, rows, columns."""
        raise TypeError(f"{cls.__name__} defines no state_shape")

    @classmethod
    def convolved_channels(cls, config: ModelConfig) -> int:
        """Return the number of channels of the convolution."""
        raise TypeError(f"{cls.__name__} defines no convolved_channels")

    @classmethod
    def check_options(cls, options: Mapping[str, Any], key: str) -> None:
        check_count(f"{key}.conv_kernel", options["conv_kernel"], least=2)
        state_format = options["state_format"]
        if not isinstance(state_format, str) or state_format not in STATE_FORMATS:
            known = ", ".join(STATE_FORMATS)
            raise ConfigError(f"{key}.state_format: expected one of {known}, found {quote(state_format)}")

    @classmethod
    def state_dtype(cls, config: ModelConfig) -> torch.dtype:
        return STATE_FORMATS[config.mixer_options[cls.name]["state_format"]]

    @classmethod
    def tail_layout(cls, config: ModelConfig) -> EntryLayout:
        """Return the layout of a token in the convolution's tail."""
        return EntryLayout(cls.convolved_channels(config), config.mixer_options[cls.name]["state_format"])

    @classmethod
    def cache_parts(cls, config: ModelConfig) -> dict[str, CachePart]:
        dtype, tail = cls.state_dtype(config), config.mixer_options[cls.name]["conv_kernel"] - 1
        return {
            "state": RecurrentPart(cls.state_shape(config), dtype),
            "conv_tail": RecurrentPart((tail, cls.convolved_channels(config)), dtype),
        }

    @classmethod
    def stored_formats(cls, config: ModelConfig) -> list[StoredFormat]:
        return [StoredFormat(f"{cls.name} inputs of the convolution", cls.tail_layout(config).body_format, 1)]

    # --- the layer

    def set_config(self, config: ModelConfig) -> None:
        super().set_config(config)
        self.layout = self.tail_layout(config)

    def zero_output(self) -> None:
        self.out_proj.weight.zero_()

    def mix(self, projected: Any, context: Context, cache: LayerCache | None) -> Tensor:
        """Return the gated outputs of the state, float32 [B, S, inner]."""
        state = tail = None
        if cache is not None:
            state, tail = cache.state.read().float(), cache.conv_tail.read().float()
        convolved, tail = self.conv(projected.channels, context, tail)
        out, state = self.scan(convolved, projected, state, context)
        if cache is not None:
            cache.state.append(state)
            cache.conv_tail.append(tail)
        return self.gate(out, projected, context)

    def scan(self, convolved: Tensor, projected: Any, state: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        """Update the state with every token of ``convolved`` [B, S, channels]. Return its outputs [B, S, H, head_dim],
        and the state after the last token."""
        raise TypeError(f"{type(self).__name__} defines no scan")

    def gate(self, out: Tensor, projected: Any, context: Context) -> Tensor:
        """Multiply outputs [B, S, H, head_dim] by the gate: [B, S, inner]."""
        raise TypeError(f"{type(self).__name__} defines no gate")


def draw_rates(log_rates: Tensor) -> None:
    """Draw decay rates, and store their logarithms in place."""
    log_rates.uniform_(1.0, _MAX_RATE).log_()


def draw_steps(biases: Tensor, least: float, most: float, floor: float = 0.0) -> None:
    """Draw step sizes log-uniformly, at least ``floor``, and store the biases of which they are the softplus in
    place."""
    steps = biases.uniform_(math.log(least), math.log(most)).exp().clamp(min=floor)
    biases.copy_(steps + torch.log(-torch.expm1(-steps)))
