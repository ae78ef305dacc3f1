"""Training step of the benchmarks. Requires only torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from model.forward.aux_outputs import AuxOutputs
from model.optim import MuonAdamW
from model.transformer import Transformer


def training_loss(model: Transformer, ids: Tensor, autocast: bool = True, token_loss_only: bool = False) -> Tensor:
    """Return the total training loss on ids int64 [B, S + 1], a scalar.

    ``autocast`` computes in BF16. ``token_loss_only`` omits the auxiliary losses.
    """
    aux = None if token_loss_only else AuxOutputs()
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=autocast):
        logits = model(ids[:, :-1], aux=aux)
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    if aux is not None:
        extras = (aux.loss(name) for name in ("indexer_kl", "balance"))
        loss = loss + sum(extra for extra in extras if extra is not None)
    return loss


def training_step(
    model: Transformer, optimizer: MuonAdamW, ids: Tensor, autocast: bool = True, token_loss_only: bool = False
) -> None:
    """Update the model once with :func:`training_loss` on ids int64 [B, S + 1]."""
    loss = training_loss(model, ids, autocast, token_loss_only)
    model.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
