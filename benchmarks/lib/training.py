"""One training step as the benchmarks time it. Needs nothing but torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.muon import MuonAdamW
from model.telemetry import Telemetry
from model.transformer import Transformer


def objective(model: Transformer, ids: Tensor, autocast: bool = True, alone: bool = False) -> Tensor:
    """All losses of a model in training on ids int64 [B, S + 1], a scalar, or the tokens' ``alone``; products in BF16
    with ``autocast``."""
    telemetry = None if alone else Telemetry()
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
        logits = model(ids[:, :-1], telemetry=telemetry)
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    if telemetry is not None:
        extras = (telemetry.loss(name) for name in ("indexer_kl", "balance"))
        loss = loss + sum(extra for extra in extras if extra is not None)
    return loss


def step(model: Transformer, optimizer: MuonAdamW, ids: Tensor, autocast: bool = True, alone: bool = False) -> None:
    """One update for ids int64 [B, S + 1], by that objective."""
    loss = objective(model, ids, autocast, alone)
    model.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
