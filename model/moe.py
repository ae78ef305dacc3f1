"""Mixture of experts: a router, shared experts and routed experts (report 2.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import native
from kernels.autocast import cast, in_float32, product_dtype
from kernels.expert_dispatch import by_expert, combine, dispatch, run_experts
from kernels.formats import FP4_BLOCK
from kernels.fused_experts import fused_experts, prefers_fused
from kernels.linear import linear
from kernels.routing import SUM_EPS, affinity, route
from model.feed_forward import DenseFeedForward
from model.forward.context import Context
from model.layers.linear import Linear
from model.precision import Precision

if TYPE_CHECKING:
    from model.config import ModelConfig

_PAD_TO = 64
"""Tokens per expert are padded to a multiple of this for BF16 on a CPU: oneDNN compiles code for every new shape, which
takes longer than most products here. Padding rows have zero weight."""

Experts = tuple[Tensor, ...]
"""Stacks w1 and w3 [experts, inner, hidden] and w2 [experts, hidden, inner]."""


class MixtureOfExperts(nn.Module):
    """Shared experts for every token, plus the best ``experts_per_token`` routed ones. [B, S, hidden] -> same.

    Affinity is a function of the router logit (``scoring_func``), in float32. A balance bias affects which experts are
    chosen, but not their weights; it is updated by a rule, not by gradient descent. The first ``num_hash_layers``
    layers choose by a fixed table of token ids and weight by learned affinity. Weights are normalized, then scaled.
    """

    router_bias: Tensor
    tid2eid: Tensor

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        c = config
        self.layer = layer
        self.hash_routed = layer < c.num_hash_layers
        self.router = Linear(c.hidden_size, c.num_experts, full_precision=True)
        self.w1 = nn.Parameter(torch.empty(c.num_experts, c.expert_size, c.hidden_size))
        self.w3 = nn.Parameter(torch.empty(c.num_experts, c.expert_size, c.hidden_size))
        self.w2 = nn.Parameter(torch.empty(c.num_experts, c.hidden_size, c.expert_size))
        self.shared = DenseFeedForward(c, c.num_shared_experts * c.expert_size) if c.num_shared_experts else None
        self.weights_are_rounded = False
        """True if the stacks themselves hold rounded values."""
        self.caches_rounded = True
        """True if inference keeps rounded weights for the next call."""
        self._rounded: dict[str, tuple[tuple, Experts]] = {}
        self.register_buffer("router_bias", torch.zeros(c.num_experts))
        if self.hash_routed:
            self.register_buffer("tid2eid", torch.zeros(c.vocab_size, c.experts_per_token, dtype=torch.int64))
        self.set_config(c)

    def set_config(self, config: ModelConfig) -> None:
        """Switch to another configuration with the same parameter shapes."""
        self.config = config
        self.precision = Precision(config)
        self.drop_rounded()

    def init_weights(self, std: float) -> None:
        c = self.config
        for weight in (self.w1, self.w2, self.w3):
            nn.init.normal_(weight, std=std)
        if self.hash_routed:
            self.tid2eid.copy_(hash_table(c.vocab_size, c.num_experts, c.experts_per_token, self.layer))

    def zero_output(self) -> None:
        self.w2.zero_()
        if self.shared is not None:
            self.shared.zero_output()

    def cast_weights(self, dtype: torch.dtype) -> None:
        """Cast the expert stacks. Experts rounded to FP4 lose nothing."""
        for name in ("w1", "w3", "w2"):
            weight = self.precision.round_expert(getattr(self, name))
            setattr(self, name, nn.Parameter(weight.to(dtype), requires_grad=False))
        self.weights_are_rounded = self.weights_are_rounded or self.precision.qat
        self.drop_rounded()

    def drop_rounded(self) -> None:
        """Free the rounded weights that inference keeps."""
        self._rounded.clear()

    def forward(self, x: Tensor, input_ids: Tensor, context: Context) -> Tensor:
        logits, expert_ids, weights = self.route(x, input_ids, context)
        if self.training:
            self._record(logits, expert_ids, context)
        if prefers_fused(x, self.w1):
            shared = () if self.shared is None else self.shared.weights
            experts = self.packed_experts() or self.stored_experts(context)
            return fused_experts(x, expert_ids, weights, experts, shared, self.config.swiglu_bound)
        out = self._run_experts(x.flatten(0, 1), expert_ids.flatten(0, 1), weights.flatten(0, 1), context).view(x.shape)
        return out if self.shared is None else out + self.shared(x)

    def route(self, x: Tensor, input_ids: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Return router logits [B, S, E], chosen experts int64 [B, S, K] and their weights [B, S, K]."""
        c = self.config
        fixed = self.tid2eid[input_ids] if self.hash_routed else context.forced_experts.get(self.layer)
        with in_float32(x):
            logits = linear(cast(x, torch.float32), cast(self.router.weight, torch.float32))
            choice = c.experts_per_token, c.routed_scaling_factor, fixed, c.scoring_func, c.n_group, c.topk_group
            return logits, *route(logits, self.router_bias, *choice)

    def _record(self, logits: Tensor, expert_ids: Tensor, context: Context) -> None:
        """Add load, choices and balance loss to the auxiliary outputs. Padding is not counted."""
        if context.aux is None:
            return
        counted = None if context.documents is None else context.documents.counted
        real = expert_ids if counted is None else expert_ids[counted]
        context.aux.expert_load[self.layer] = torch.bincount(real.flatten(), minlength=self.config.num_experts)
        if not self.hash_routed:
            context.aux.expert_ids[self.layer] = expert_ids
            context.aux.losses["balance"][self.layer] = sequence_balance(
                affinity(logits, self.config.scoring_func), expert_ids, counted
            )

    def _run_experts(self, flat: Tensor, expert_ids: Tensor, weights: Tensor, context: Context) -> Tensor:
        """Run each expert over its own tokens: flat [N, hidden] -> [N, hidden]."""
        stacks = self.stored_experts(context)
        dtype = product_dtype(stacks[0])
        # With few tokens per expert there are few shapes, and padding would be most of the work.
        pads = flat.device.type == "cpu" and flat.dtype != dtype and expert_ids.numel() >= _PAD_TO * len(stacks[0])
        to = by_expert(expert_ids, len(stacks[0]), _PAD_TO if pads else 1)
        gains = F.pad(weights.flatten(), (0, 1))[to.row_to_choice].unsqueeze(-1)
        outputs = run_experts(dispatch(flat, to, dtype), gains, stacks, to, self.config.swiglu_bound)
        return combine(outputs, to, flat.dtype)

    def stored_experts(self, context: Context | None = None) -> Experts:
        """Return the stacks w1, w3 and w2 as rounded for storage. Inference keeps them: rounding took a quarter of a
        decode step."""
        stacks = (self.w1, self.w3, self.w2)
        if self.weights_are_rounded:
            return stacks
        if not self._keeps():
            aux = None if context is None else context.aux
            return tuple(self.precision.round_expert(w, self.training, aux) for w in stacks)
        return self._kept("rounded", self.precision.round_expert) if self.precision.qat else stacks

    def packed_experts(self) -> Experts:
        """Return the stacks as packed FP4 rows, uint8, an eighth of the bytes; empty if experts are not FP4 or rounded
        weights are not kept."""
        fits = self.config.hidden_size % FP4_BLOCK == 0 and self.config.expert_size % FP4_BLOCK == 0
        if not self.precision.qat or not fits or not self._keeps():
            return ()
        return self._kept("packed", self.precision.pack_expert)

    def _keeps(self) -> bool:
        """Return whether rounded weights are kept. Inference tensors have no version that would reveal a change."""
        return not (self.training or torch.is_grad_enabled() or self.w1.is_inference()) and self.caches_rounded

    def _kept(self, form: str, convert: Callable[[Tensor], Tensor]) -> Experts:
        stacks = (self.w1, self.w3, self.w2)
        versions = tuple((w._version, w.data_ptr()) for w in stacks)
        if form not in self._rounded or self._rounded[form][0] != versions:
            self._rounded[form] = versions, tuple(native.in_huge_pages([convert(w) for w in stacks]))
        return self._rounded[form][1]


def sequence_balance(affinity: Tensor, chosen: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return the sequence-wise balance loss (V3 report 2.1.2): the mean over sequences of sum_e f_e * P_e.

    Takes affinities [B, S, E], chosen int64 [B, S, K] and counted bool [B, S], False for padding. f_e is the load of
    expert e relative to an even share, P_e its mean normalized affinity. An even load gives 1.
    """
    experts, k = affinity.shape[-1], chosen.shape[-1]
    if counted is None:
        counted = torch.ones(chosen.shape[:2], dtype=torch.bool, device=chosen.device)
    weight = counted.unsqueeze(-1).float()
    tokens = weight.sum(dim=1).clamp(min=1)  # [B, 1]
    per_choice = weight.expand_as(chosen).flatten(1)
    counts = weight.new_zeros(len(chosen), experts).scatter_add_(1, chosen.flatten(1), per_choice)
    load = counts * experts / (k * tokens)
    share = (affinity / (affinity.sum(-1, keepdim=True) + SUM_EPS) * weight).sum(dim=1) / tokens
    return (load * share).sum(-1).mean()


def hash_table(vocab_size: int, experts: int, per_token: int, layer: int) -> Tensor:
    """Return expert ids per token id, int64 [vocab_size, per_token], distinct within a row and even over experts.

    The released rule is unpublished. Here rows are shuffled with a seed, so that neighboring ids spread and layers
    differ. The first pick goes round robin over a shuffled vocabulary, so that no expert starves.
    """
    generator = torch.Generator().manual_seed(0x5EED + layer)
    order = torch.rand(vocab_size, experts, generator=generator)
    first = torch.randperm(vocab_size, generator=generator) % experts
    order[torch.arange(vocab_size), first] = -1.0  # sorts to the front
    return order.argsort(dim=-1)[:, :per_token].contiguous()
