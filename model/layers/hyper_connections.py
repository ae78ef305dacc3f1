"""Residual connections: manifold-constrained hyper-connections, or a plain residual."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kernels.autocast import in_float32
from kernels.hyper_connections import RecomputedStreams, backend_for, hc_head, hc_post, hc_pre

if TYPE_CHECKING:
    from model.config import ModelConfig
    from model.layers.norm import RMSNorm

Mixing = tuple[Any, ...]
"""State passed from :meth:`HyperConnection.enter` to :meth:`HyperConnection.leave`: ``post`` and ``comb``, in training
also the streams and the handle that recomputes them."""


class HyperConnection(nn.Module):
    """Hyper-connection of a block F: streams X [B, S, n, d] -> ``combT X + post F(norm(pre X))`` (report 2.2), in
    float32."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        n = config.hc_mult
        self.fn = nn.Parameter(torch.empty(2 * n + n * n, n * config.hidden_size))
        self.base = nn.Parameter(torch.zeros(2 * n + n * n))
        self.scale = nn.Parameter(torch.full((3,), config.hc_alpha_init))

    def init_weights(self, std: float) -> None:
        n = self.config.hc_mult
        nn.init.normal_(self.fn, std=std)
        nn.init.constant_(self.scale, self.config.hc_alpha_init)
        nn.init.zeros_(self.base)
        if self.config.hc_comb_init == "identity":
            with torch.no_grad():  # softmax weights e^4 to 1 keep about 0.95 of each stream in place
                self.base[2 * n :].view(n, n).fill_diagonal_(4.0)

    def split_sizes(self) -> dict[str, tuple[int, ...]]:
        n = self.config.hc_mult
        return {"fn": (n, n, n * n)}

    def enter(
        self, streams: Tensor, norm: RMSNorm, recomputed: RecomputedStreams | None = None
    ) -> tuple[Tensor, Mixing]:
        """Return the block's input [B, S, d], normalized by ``norm``, and the state for :meth:`leave`. With
        ``recomputed``, the streams are not saved for the backward pass, but recomputed in it."""
        c = self.config
        with in_float32(streams), _not_saved(recomputed):
            x, post, comb, entered = hc_pre(
                streams, self.fn, self.scale, self.base, norm.weight, c.hc_sinkhorn_iters, c.hc_eps, norm.eps
            )
        if not torch.is_grad_enabled():
            return x, (post, comb)
        return x, (post, comb, entered) if recomputed is None else (post, comb, entered, recomputed)

    def leave(self, streams: Tensor, mixing: Mixing, output: Tensor) -> Tensor:
        """Return the new streams from the old streams and the block's output [B, S, d]."""
        post, comb, *recorded = mixing
        entered = recorded[0] if recorded else streams
        recomputed = recorded[1] if len(recorded) > 1 else None
        with in_float32(streams), _not_saved(recomputed):
            return hc_post(entered, comb, post, output)

    def to_recompute(
        self, expanded: Tensor, streams: Tensor, mixing: Mixing, output: Tensor
    ) -> RecomputedStreams | None:
        """Return a handle that recomputes ``expanded``, the result of :meth:`leave` for the other arguments, in the
        backward pass. Return None if it is saved instead."""
        if not torch.is_grad_enabled() or backend_for(expanded) == "reference":
            return None
        post, comb = mixing[:2]
        return RecomputedStreams(expanded, streams, comb, post, output)


def _not_saved(recomputed: RecomputedStreams | None) -> AbstractContextManager:
    return nullcontext() if recomputed is None else recomputed.not_saved()


class HyperHead(nn.Module):
    """Combine streams [B, S, n, d] to [B, S, d] with learned per-token weights, before the final norm (report 2.2)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.fn = nn.Parameter(torch.empty(config.hc_mult, config.hc_mult * config.hidden_size))
        self.base = nn.Parameter(torch.zeros(config.hc_mult))
        self.scale = nn.Parameter(torch.full((1,), config.hc_alpha_init))

    def init_weights(self, std: float) -> None:
        nn.init.normal_(self.fn, std=std)
        nn.init.constant_(self.scale, self.config.hc_alpha_init)
        nn.init.zeros_(self.base)

    def forward(self, streams: Tensor) -> Tensor:
        with in_float32(streams):
            return hc_head(streams, self.fn, self.scale, self.base, self.config.hc_eps, self.config.norm_eps)


class PlainResidual(nn.Module):
    """Plain residual ``x + F(norm(x))``, used if ``hyper_connections`` is off."""

    def enter(
        self, streams: Tensor, norm: RMSNorm, recomputed: RecomputedStreams | None = None
    ) -> tuple[Tensor, Mixing]:
        return norm(streams), ()

    def leave(self, streams: Tensor, mixing: Mixing, output: Tensor) -> Tensor:
        return streams + output.float()

    def to_recompute(self, expanded: Tensor, streams: Tensor, mixing: Mixing, output: Tensor) -> None:
        return None


def residual(config: ModelConfig) -> HyperConnection | PlainResidual:
    return HyperConnection(config) if config.hyper_connections else PlainResidual()
