"""Deterministic top-k selection: ties go to the lower index, on all devices.

ReLU makes exact ties at zero common, and prefill, chunked prefill and decoding must select the same entries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import native
from kernels.autocast import cast, detached

_MIN_RATIO = 32
"""Ratio of scores to selected ones from which the selection in two steps is faster."""


def select_topk(scores: Tensor, permitted: Tensor, k: int) -> Tensor:
    """Return the indices of the ``k`` best permitted entries of every query, best first.

    Args:
        scores: float [B, S, T].
        permitted: bool [B or 1, S, T], True for entries that a query may select.
        k: Entries to select.

    Returns:
        int64 [B, S, k]; -1 in unused slots. Ties go to the lower index.
    """
    scores = cast(detached(scores), torch.float32)
    if scores.is_cpu and native.level() is not None:
        return native.op("select_topk")(scores, permitted, k)
    return topk_indices(scores.masked_fill(~permitted, float("-inf")), k)


def topk_indices(scores: Tensor, k: int) -> Tensor:
    """Return the indices of the ``k`` largest of float32 [..., T], in descending order: int64 [..., k].

    Ties go to the lower index. ``-inf`` is never selected; unused slots are -1.
    """
    T = scores.shape[-1]
    if T // k < _MIN_RATIO:
        indices = torch.arange(T, device=scores.device)
        chosen = _sort_keys(scores, indices).topk(min(k, T), dim=-1).indices
        values = scores.gather(-1, chosen)
    else:
        # The k best scores lie in the k groups of neighbors with the best maxima: any other score has at least k better
        # ones. This group size minimizes the number of comparisons.
        size = 1 << (T // k).bit_length() // 2
        groups = F.pad(scores, (0, -T % size), value=float("-inf")).unflatten(-1, (-1, size))
        indices = torch.arange(groups.shape[-2], device=scores.device)
        best = _sort_keys(groups.amax(-1), indices).topk(k, dim=-1, sorted=False).indices
        candidates = (best.unsqueeze(-1) * size + torch.arange(size, device=scores.device)).flatten(-2)
        values = groups.flatten(-2).gather(-1, candidates)
        inner = _sort_keys(values, candidates).topk(k, dim=-1).indices
        chosen, values = candidates.gather(-1, inner), values.gather(-1, inner)
    return F.pad(chosen.masked_fill(values == float("-inf"), -1), (0, k - chosen.shape[-1]), value=-1)


def _sort_keys(scores: Tensor, indices: Tensor) -> Tensor:
    """Return distinct int64 keys that order scores, and equal scores by descending index.

    torch.topk does not specify the order of equal values.
    """
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 turns -0.0 into 0.0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return ordered * (1 << 31) - indices
