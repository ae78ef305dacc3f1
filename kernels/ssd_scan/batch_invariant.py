"""The scan in a fixed order of additions: a sequence has the same bits in every batch and cut into any pieces."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.fixed_order import sum_pairwise


def scan_in_fixed_order(
    x: Tensor, dt: Tensor, decay: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, state_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute :func:`kernels.ssd_scan.ssd_scan` without gradients, from decay = exp(dt * A), float32 [batch, S, H].

    The state is rounded to ``state_dtype`` after every token, as if each were a separate call. Products and sums are
    elementwise, so rounding does not depend on a number's position in a tensor.
    """
    heads = x.shape[2]
    B, C = (z.repeat_interleave(heads // z.shape[2], dim=2) for z in (B, C))
    outputs = []
    for t in range(x.shape[1]):
        added = (dt[:, t, :, None] * x[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(-2)
        state = decay[:, t, :, None, None] * state + added
        outputs.append(sum_pairwise(state * C[:, t].unsqueeze(-2)) + D[:, None] * x[:, t])
        state = state.to(state_dtype).float()
    return torch.stack(outputs, dim=1), state
