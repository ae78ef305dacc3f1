"""The rule in a fixed order of additions: a sequence has the same bits in every batch and cut into any pieces."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.fixed_order import sum_pairwise


def scan_in_fixed_order(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor, state_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute :func:`kernels.gated_delta_rule.gated_delta_rule` without gradients, from decay = exp(g), float32
    [B, S, H, K].

    The state is rounded to ``state_dtype`` after every token, as if each were a separate call. Products and sums are
    elementwise, so rounding does not depend on a number's position in a tensor.
    """
    outputs = []
    state = state.transpose(-1, -2)  # [B, H, V, K]: sums run over the last dim
    for t in range(q.shape[1]):
        key = k[:, t].unsqueeze(-2)
        state = decay[:, t].unsqueeze(-2) * state
        change = beta[:, t].unsqueeze(-1) * (v[:, t] - sum_pairwise(state * key))
        state = state + change.unsqueeze(-1) * key
        outputs.append(sum_pairwise(state * q[:, t].unsqueeze(-2)))
        state = state.to(state_dtype).float()
    return torch.stack(outputs, dim=1), state.transpose(-1, -2)
