"""Batch-invariant execution of a layer: all sums run at one fixed shape (:class:`model.forward.execution.Execution`).

Token-wise functions run in tiles of one size, attention token by token (:mod:`model.mixers.batch_invariant`), and an
expert over a whole tile as soon as one of its tokens chose it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kernels.expert_dispatch import run_expert
from model.errors import ConfigError
from model.feed_forward import DenseFeedForward
from model.forward.context import Context
from model.forward.execution import in_tiles, split_tokens
from model.layers.rope import Rotation
from model.moe import MixtureOfExperts

if TYPE_CHECKING:
    from model.block import Block
    from model.cache.layer_cache import LayerCache
    from model.config import ModelConfig


def check_widths(config: ModelConfig) -> None:
    """Raise ConfigError for layers or widths that have no batch-invariant mode."""
    kinds = config.ffn_kinds
    names = ["hidden_size", *(["expert_size"] * ("moe" in kinds)), *(["ffn_size"] * ("dense" in kinds))]
    widths = {name: getattr(config, name) for name in names}
    for mixer in dict.fromkeys(config.mixers):
        if mixer.batch_invariant_widths is None:
            raise ConfigError(f"execution: layers of '{mixer.name}' have no batch-invariant mode")
        options = config.mixer_options.get(mixer.name, {})
        for name in mixer.batch_invariant_widths:
            if name in options:
                widths[f"mixer_options.{mixer.name}.{name}"] = options[name]
            else:
                widths[name] = getattr(config, name)
    for name, width in widths.items():
        if width is not None and width % 4:
            # A CPU library sums some rows of a product in another order, only at widths that 4 does not divide.
            raise ConfigError(f"execution: batch-invariant needs widths that are multiples of 4, {name} is {width}")


def run_block(block: Block, streams: Tensor, input_ids: Tensor, context: Context, cache: LayerCache | None) -> Tensor:
    """Compute :meth:`model.block.Block.forward`, outside training."""
    rotation = context.rotation.get(block.attn.name)

    def before_mixing(streams: Tensor, rotation: Rotation | None) -> tuple:
        x, mixing = block.attn_residual.enter(streams, block.attn_norm)
        return mixing, block.attn.project(x, rotation, context, cache is not None)

    def after_mixing(streams: Tensor, mixing: tuple, mixed: Tensor, rotation: Rotation | None) -> Tensor:
        return block.attn_residual.leave(streams, mixing, block.attn.output(mixed, rotation))

    def before_ffn(streams: Tensor, mixing: tuple, mixed: Tensor, rotation: Rotation | None) -> tuple:
        between = after_mixing(streams, mixing, mixed, rotation)
        x, mixing = block.ffn_residual.enter(between, block.ffn_norm)
        return between, mixing, x

    mixing, projected = in_tiles(before_mixing, streams, rotation)
    mixed = block.attn.mix(projected, context, cache)
    if block.ffn is None:
        return in_tiles(after_mixing, streams, mixing, mixed, rotation)
    streams, mixing, x = in_tiles(before_ffn, streams, mixing, mixed, rotation)
    ffn = block.ffn
    out = in_tiles(ffn, x) if isinstance(ffn, DenseFeedForward) else _run_experts(ffn, x, input_ids, context)
    return in_tiles(block.ffn_residual.leave, streams, mixing, out)


def _run_experts(moe: MixtureOfExperts, x: Tensor, input_ids: Tensor, context: Context) -> Tensor:
    """Run every expert over whole tiles. An expert adds zeros to tokens that did not choose it, which changes no
    bit."""

    def route(x: Tensor, input_ids: Tensor) -> tuple:
        _, expert_ids, weights = moe.route(x, input_ids, context)
        return expert_ids, weights, torch.zeros_like(x) if moe.shared is None else moe.shared(x)

    expert_ids, weights, shared = in_tiles(route, x, input_ids)
    experts = list(zip(*(w.unbind() for w in moe.stored_experts(context))))
    outputs = []
    for rows, picks, gains in zip(*(split_tokens(t.flatten(0, 1)) for t in (x, expert_ids, weights))):
        out = torch.zeros_like(rows)
        for expert in picks.unique().tolist():
            gain = (gains * (picks == expert)).sum(-1, keepdim=True)
            out = out + run_expert(rows, gain, experts[expert], moe.config.swiglu_bound)
        outputs.append(out)
    routed = torch.cat(outputs)[: x.shape[0] * x.shape[1]].view(x.shape)
    return routed if moe.shared is None else routed + shared
