"""Feed-forward blocks: a SwiGLU, and a mixture of them with shared and routed experts (report 2.1)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import native
from kernels.autocast import cast, in_float32, product_dtype
from kernels.expert_dispatch import by_expert, combine, dispatch
from kernels.formats import FP4_BLOCK
from kernels.fused_experts import fused_experts, prefers_fused
from kernels.linear import linear
from kernels.routing import route
from kernels.swiglu import swiglu
from model.config import ModelConfig
from model.execution import in_tiles
from model.linear import Linear
from model.mixers.base import Context
from model.precision import Precision

_ROWS = 64
"""Where a CPU's products are narrowed, experts get multiples of so many tokens: its library writes code for every shape
that it has not met, which takes longer than most products here. What fills them up has no weight."""


class DenseFeedForward(nn.Module):
    """One SwiGLU. [B, S, hidden] -> [B, S, hidden]."""

    def __init__(self, config: ModelConfig, size: int):
        super().__init__()
        self.limit = config.swiglu_limit
        self.w1 = Linear(config.hidden_size, size)
        self.w3 = Linear(config.hidden_size, size)
        self.w2 = Linear(size, config.hidden_size)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        return self.w1.weight, self.w3.weight, self.w2.weight

    def route(self, x: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        return {"out": self(x)}

    def mixture(self, routed: dict[str, Tensor], context: Context) -> Tensor:
        return routed["out"]

    def forward(self, x: Tensor) -> Tensor:
        x = cast(x, product_dtype(x))  # once for both
        return self.w2(swiglu(self.w1(x), self.w3(x), self.limit))


class MixtureOfExperts(nn.Module):
    """Shared experts for every token, plus the best ``experts_per_token`` routed ones.

    Affinity is sqrt(softplus(logit)) in float32; a balance bias, moved by rule and not by gradient, takes part in the
    choice only. The first ``num_hash_layers`` layers choose by a fixed table of token ids; their weights are still the
    learned affinities. Weights are normalised once, then scaled.
    """

    router_bias: Tensor
    expert_load: Tensor
    tid2eid: Tensor

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        c = config
        self.config, self.layer = c, layer
        self.precision = Precision(c)
        self.hash_routed = layer < c.num_hash_layers
        self.router = Linear(c.hidden_size, c.num_experts)
        self.w1 = nn.Parameter(torch.empty(c.num_experts, c.expert_size, c.hidden_size))
        self.w3 = nn.Parameter(torch.empty(c.num_experts, c.expert_size, c.hidden_size))
        self.w2 = nn.Parameter(torch.empty(c.num_experts, c.hidden_size, c.expert_size))
        self.shared = DenseFeedForward(c, c.num_shared_experts * c.expert_size) if c.num_shared_experts else None
        self.imposed: Tensor | None = None
        """int64 [B, S, K]: experts that somebody else chose for the next passes' tokens; None chooses here."""
        self.rounded = False
        """The stacks themselves hold rounded values."""
        self.keeps_rounded = True
        """Whether what inference rounds is kept for the next call."""
        self._rounded: dict[str, tuple[tuple, tuple[Tensor, ...]]] = {}
        self.register_buffer("router_bias", torch.zeros(c.num_experts))
        # Tokens per expert since the last bias update; not part of a checkpoint.
        self.register_buffer("expert_load", torch.zeros(c.num_experts), persistent=False)
        if self.hash_routed:
            self.register_buffer("tid2eid", torch.zeros(c.vocab_size, c.experts_per_token, dtype=torch.int64))

    def reset(self, std: float) -> None:
        """Draw the expert stacks from a normal distribution and fill the table of a hash-routed layer."""
        c = self.config
        for weight in (self.w1, self.w2, self.w3):
            nn.init.normal_(weight, std=std)
        if self.hash_routed:
            self.tid2eid.copy_(hash_table(c.vocab_size, c.num_experts, c.experts_per_token, self.layer))

    def forget_rounded(self) -> None:
        """Round the stacks anew when they are next asked for."""
        self._rounded.clear()

    def forward(self, x: Tensor, input_ids: Tensor, context: Context) -> Tensor:
        """x [B, S, hidden], input_ids int64 [B, S] -> [B, S, hidden]."""
        return self.mixture(self.route(x, input_ids), context)

    def route(self, x: Tensor, input_ids: Tensor) -> dict[str, Tensor]:
        """What each token gives on its own: x [B, S, hidden], the router's logits [B, S, E], the chosen experts
        int64 [B, S, K], their weights [B, S, K] and, unless :meth:`mixture` computes it, the shared experts' output."""
        c = self.config
        fixed = self.tid2eid[input_ids] if self.hash_routed else self.imposed
        with in_float32(x):
            logits = linear(cast(x, torch.float32), cast(self.router.weight, torch.float32))
            chosen, weights = route(logits, self.router_bias, c.experts_per_token, c.routed_scaling_factor, fixed)
        routed = {"x": x, "logits": logits, "chosen": chosen, "weights": weights}
        if self.shared is None or prefers_fused(x, self.w1):
            return routed
        return {**routed, "shared": self.shared(x)}

    def mixture(self, routed: dict[str, Tensor], context: Context) -> Tensor:
        """The experts' weighted outputs, [B, S, hidden]. Padding takes part in no count and no loss."""
        x, chosen = routed["x"], routed["chosen"]
        if self.training:
            counted = None if context.documents is None else context.documents.counted
            with torch.no_grad():
                real = chosen if counted is None else chosen[counted]
                self.expert_load += torch.bincount(real.flatten(), minlength=self.config.num_experts)
            if context.telemetry is not None and not self.hash_routed:
                context.telemetry.chosen[self.layer] = chosen
                context.telemetry.losses["balance"][self.layer] = sequence_balance(routed["logits"], chosen, counted)
        if prefers_fused(x, self.w1) and not context.execution.batch_invariant:
            shared = () if self.shared is None else self.shared.weights
            limit = self.config.swiglu_limit
            stacks = self.packed_experts() or self.stored_experts()
            return fused_experts(x, chosen, routed["weights"], stacks, shared, limit)
        run = self._by_tiles if context.execution.batch_invariant else self._by_experts
        out = run(x.flatten(0, 1), chosen.flatten(0, 1), routed["weights"].flatten(0, 1)).view(x.shape)
        if self.shared is None:
            return out
        return out + (routed["shared"] if "shared" in routed else self.shared(x))

    def _by_experts(self, flat: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Each expert runs over its own tokens: [N, hidden] -> [N, hidden]."""
        experts = self._each_expert()
        dtype = product_dtype(experts[0][0])
        # Of few tokens an expert there are few shapes, and filling up would be most of the work.
        fills_up = flat.device.type == "cpu" and flat.dtype != dtype and chosen.numel() >= _ROWS * len(experts)
        to = by_expert(chosen, len(experts), _ROWS if fills_up else 1)
        rows = dispatch(flat, to, dtype).split(to.rows_per_expert)
        gains = F.pad(weights.flatten(), (0, 1))[to.row_to_choice].unsqueeze(-1).split(to.rows_per_expert)
        outputs = [self._expert(own, gain, *expert) for expert, own, gain in zip(experts, rows, gains)]
        return combine(torch.cat(outputs), to, flat.dtype)

    def _by_tiles(self, flat: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The same in tiles of one shape: an expert runs over a whole tile as soon as one of its tokens chose it. To
        the others it adds zeros, which change no bit."""
        experts = self._each_expert()
        outputs = []
        for rows, picks, gains in zip(*(in_tiles(t) for t in (flat, chosen, weights))):
            out = torch.zeros_like(rows)
            for expert in picks.unique().tolist():
                gain = (gains * (picks == expert)).sum(-1, keepdim=True)
                out = out + self._expert(rows, gain, *experts[expert])
            outputs.append(out)
        return torch.cat(outputs)[: len(flat)]

    def _each_expert(self) -> list[tuple[Tensor, ...]]:
        """w1, w3 and w2 of every expert. Taken one by one, each would get a whole stack for its gradient, of zeros but
        for itself."""
        return list(zip(*(w.unbind() for w in self.stored_experts())))

    def _expert(self, rows: Tensor, gain: Tensor, w1: Tensor, w3: Tensor, w2: Tensor) -> Tensor:
        return linear(swiglu(linear(rows, w1), linear(rows, w3), self.config.swiglu_limit, gain), w2)

    def stored_experts(self) -> tuple[Tensor, ...]:
        """The stacks w1, w3 and w2 as rounded for storage. Kept outside training: rounding took a quarter of a decode
        step."""
        stacks = (self.w1, self.w3, self.w2)
        if self.rounded:
            return stacks
        if not self._keeps():
            return tuple(self.precision.round_expert(w, self.training) for w in stacks)
        if not self.precision.qat:
            return stacks
        return self._kept("rounded", self.precision.round_expert)

    def packed_experts(self) -> tuple[Tensor, ...]:
        """:meth:`stored_experts` as packed FP4 rows, uint8, an eighth of the bytes; empty where experts are not FP4 or
        nothing is kept."""
        fits = self.config.hidden_size % FP4_BLOCK == 0 and self.config.expert_size % FP4_BLOCK == 0
        if not self.precision.qat or not fits or not self._keeps():
            return ()
        return self._kept("packed", self.precision.pack_expert)

    def _keeps(self) -> bool:
        """Whether rounded weights are kept. Weights made in inference mode carry no version to tell a change by."""
        return not (self.training or torch.is_grad_enabled() or self.w1.is_inference()) and self.keeps_rounded

    def _kept(self, form: str, convert: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        stacks = (self.w1, self.w3, self.w2)
        versions = tuple((w._version, w.data_ptr()) for w in stacks)
        if form not in self._rounded or self._rounded[form][0] != versions:
            self._rounded[form] = versions, tuple(native.in_huge_pages([convert(w) for w in stacks]))
        return self._rounded[form][1]


def sequence_balance(logits: Tensor, chosen: Tensor, counted: Tensor | None = None) -> Tensor:
    """Sequence-wise balance loss (V3 report 2.1.2): mean over sequences of sum_e f_e * P_e.

    logits [B, S, E] of the router; chosen int64 [B, S, K]; counted bool [B, S], False for padding. f_e is expert e's
    load relative to an even share, P_e its mean normalized affinity. An even load gives 1.
    """
    affinity = F.softplus(logits).sqrt()
    experts, k = affinity.shape[-1], chosen.shape[-1]
    if counted is None:
        counted = torch.ones(chosen.shape[:2], dtype=torch.bool, device=chosen.device)
    weight = counted.unsqueeze(-1).float()
    tokens = weight.sum(dim=1).clamp(min=1)  # [B, 1]
    load = (F.one_hot(chosen, experts).sum(dim=2) * weight).sum(dim=1) * experts / (k * tokens)
    share = (affinity / affinity.sum(-1, keepdim=True) * weight).sum(dim=1) / tokens
    return (load * share).sum(-1).mean()


def hash_table(vocab_size: int, experts: int, per_token: int, layer: int) -> Tensor:
    """Expert ids per token id, int64 [vocab_size, per_token], distinct within a row and even over experts.

    The released rule is unpublished. Here: a seeded shuffle per row, so that neighbouring ids spread and two layers
    differ; the first pick goes round robin over a shuffled vocabulary, so that no expert starves.
    """
    generator = torch.Generator().manual_seed(0x5EED + layer)
    order = torch.rand(vocab_size, experts, generator=generator)
    first = torch.randperm(vocab_size, generator=generator) % experts
    order[torch.arange(vocab_size), first] = -1.0  # sorts to the front
    return order.argsort(dim=-1)[:, :per_token].contiguous()
