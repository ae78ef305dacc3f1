"""Feed-forward blocks: a SwiGLU, and a mixture of them with shared and routed experts (report 2.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import ModelConfig
from model.mixers.base import Context
from model.precision import Precision, in_float32


def swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """``silu(gate) * up`` with gate clamped from above and up on both sides (report 4.2.3), in float32."""
    return F.silu(gate.float().clamp(max=limit)) * up.float().clamp(-limit, limit)


class DenseFeedForward(nn.Module):
    """One SwiGLU. [B, S, hidden] -> [B, S, hidden]."""

    def __init__(self, config: ModelConfig, size: int):
        super().__init__()
        self.limit = config.swiglu_limit
        self.w1 = nn.Linear(config.hidden_size, size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, size, bias=False)
        self.w2 = nn.Linear(size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, input_ids: Tensor, context: Context) -> Tensor:
        return self.w2(swiglu(self.w1(x), self.w3(x), self.limit).to(x.dtype))


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
        self.router = nn.Linear(c.hidden_size, c.num_experts, bias=False)
        self.w1 = nn.Parameter(torch.empty(c.num_experts, c.expert_size, c.hidden_size))
        self.w3 = nn.Parameter(torch.empty(c.num_experts, c.expert_size, c.hidden_size))
        self.w2 = nn.Parameter(torch.empty(c.num_experts, c.hidden_size, c.expert_size))
        self.shared = DenseFeedForward(c, c.num_shared_experts * c.expert_size) if c.num_shared_experts else None
        self._rounded: tuple[tuple, tuple[Tensor, Tensor, Tensor]] | None = None
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

    def forward(self, x: Tensor, input_ids: Tensor, context: Context) -> Tensor:
        """x [B, S, hidden], input_ids int64 [B, S] -> [B, S, hidden]. Padding takes part in no count and no loss."""
        c = self.config
        flat = x.flatten(0, 1)
        with in_float32(x):
            affinity = F.softplus(F.linear(flat.float(), self.router.weight.float())).sqrt()
        if self.hash_routed:
            chosen = self.tid2eid[input_ids.flatten()]
        else:
            chosen = (affinity.detach() + self.router_bias).topk(c.experts_per_token, dim=-1).indices
        weights = affinity.gather(-1, chosen)
        weights = weights / weights.sum(-1, keepdim=True) * c.routed_scaling_factor
        if self.training:
            counted = None if context.documents is None else context.documents.counted
            with torch.no_grad():
                real = chosen if counted is None else chosen[counted.flatten()]
                self.expert_load += torch.bincount(real.flatten(), minlength=c.num_experts)
            if context.telemetry is not None and not self.hash_routed:
                context.telemetry.losses["balance"][self.layer] = sequence_balance(
                    affinity.view(*x.shape[:2], -1), chosen.view(*x.shape[:2], -1), counted
                )
        out = self._routed(flat, chosen, weights)
        if self.shared is not None:
            out = out + self.shared(flat, input_ids, context)
        return out.view(x.shape)

    def _routed(self, flat: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Each expert runs over its own tokens: [N, hidden] -> [N, hidden]."""
        w1, w3, w2 = self._expert_weights()
        order = chosen.flatten().argsort(stable=True)
        tokens = order // chosen.shape[-1]
        counts = torch.bincount(chosen.flatten(), minlength=self.config.num_experts).tolist()
        gathered = flat[tokens].split(counts)
        gains = weights.flatten()[order].split(counts)
        outputs = []
        for expert, (rows, gain) in enumerate(zip(gathered, gains)):
            inner = swiglu(F.linear(rows, w1[expert]), F.linear(rows, w3[expert]), self.config.swiglu_limit)
            outputs.append(F.linear((inner * gain.unsqueeze(-1)).to(rows.dtype), w2[expert]))
        return torch.zeros_like(flat).index_add(0, tokens, torch.cat(outputs).to(flat.dtype))

    def _expert_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """The stacks as rounded for storage. Outside training they are kept: rounding them took a quarter of a
        decode step."""
        stacks = (self.w1, self.w3, self.w2)
        # Weights made in inference mode carry no version to tell a change by.
        if self.training or torch.is_grad_enabled() or self.w1.is_inference():
            w1, w3, w2 = map(self.precision.round_expert, stacks)
            return w1, w3, w2
        versions = tuple((w._version, w.data_ptr()) for w in stacks)
        if self._rounded is None or self._rounded[0] != versions:
            w1, w3, w2 = map(self.precision.round_expert, stacks)
            self._rounded = (versions, (w1, w3, w2))
        return self._rounded[1]


def sequence_balance(affinity: Tensor, chosen: Tensor, counted: Tensor | None = None) -> Tensor:
    """Sequence-wise balance loss (V3 report 2.1.2): mean over sequences of sum_e f_e * P_e.

    affinity [B, S, E]; chosen int64 [B, S, K]; counted bool [B, S], False for padding. f_e is expert e's load relative
    to an even share, P_e its mean normalised affinity. An even load gives 1.
    """
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
