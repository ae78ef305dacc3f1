"""Short causal convolution over the projected tokens of a recurrent mixer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from kernels.causal_conv import causal_conv
from model.forward.context import Context
from model.forward.execution import in_tiles


class ShortConvolution(nn.Module):
    """One filter over the newest ``kernel`` tokens for each of ``channels`` channels, followed by SiLU."""

    def __init__(self, channels: int, kernel: int, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def init_weights(self, std: float) -> None:
        """Initialize as ``torch.nn.Conv1d`` does, regardless of ``std``: a filter has only ``kernel`` inputs."""
        nn.init.uniform_(self.weight, -1 / math.sqrt(self.weight.shape[1]), 1 / math.sqrt(self.weight.shape[1]))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, context: Context, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Convolve x float32 [B, S, channels], which follows the tokens in tail [B, kernel - 1, channels].

        Returns float32 [B, S, channels] and the next tail."""
        if context.batch_invariant:
            return self._token_by_token(x, tail)
        positions = None if context.documents is None else context.positions
        return causal_conv(x, self.weight, self.bias, tail, positions)

    def _token_by_token(self, x: Tensor, tail: Tensor | None) -> tuple[Tensor, Tensor]:
        kernel = self.weight.shape[1]
        before = x.new_zeros(x.shape[0], kernel - 1, x.shape[2]) if tail is None else tail
        rows = torch.cat((before, x), dim=1)

        def convolve(window: Tensor) -> Tensor:  # [1, tokens, kernel, channels]
            out, _ = causal_conv(window[0], self.weight, self.bias, backend="reference")
            return out[None, :, -1]

        return in_tiles(convolve, rows.unfold(1, kernel, 1).transpose(2, 3)), rows[:, x.shape[1] :]
