"""The attention of one block of queries to keys that its heads share, forward and backward.

Logits have base 2. On a CPU, exp(-inf) is 25 times slower than exp of finite values, but exp2(-inf) is not.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2_E = math.log2(math.e)
"""Factor of queries and sinks for a softmax to base 2."""


def attend(
    query: Tensor, keys: Tensor, bias: Tensor, sink: Tensor, value_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attend to keys [B, K, c] with query [B, q, H, c], scaled to base 2.

    ``bias`` is float32 [B or 1, q, 1, K], 0 or -inf. ``sink`` [H] has base 2.

    Returns:
        The output float32 [B, q, H, value_size], the weights before division by their sum [B, q, H, K], that sum with
        the sink's part [B, q, H], and the logarithm to base 2 of the sum of all exponentials [B, q, H].
    """
    logits = _products(query, keys).add_(bias)
    peak = torch.maximum(logits.amax(-1), sink)
    weights = logits.sub_(peak.unsqueeze(-1)).exp2_()
    total = weights.sum(-1) + (sink - peak).exp2()
    summed = torch.bmm(weights.to(keys.dtype).flatten(1, 2), keys[..., :value_size]).unflatten(1, query.shape[1:3])
    return summed / total.unsqueeze(-1), weights, total, peak + total.log2()


def mass(weights: Tensor, total: Tensor) -> Tensor:
    """Return the attention mass of the keys, summed over heads: [B, q, K]."""
    return (total.reciprocal().unsqueeze(2) @ weights).squeeze(2)


def gradients(
    query: Tensor, keys: Tensor, bias: Tensor, log_sum: Tensor, upstream: Tensor, inner: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the unscaled query over the scale [B, q, H, c] and of the keys, float32 [B, K, c].

    ``upstream`` [B, q, H, value_size] is the gradient of the output, and ``inner`` float32 [B, q, H] its product with
    the output.
    """
    size = upstream.shape[-1]
    weights = _products(query, keys).add_(bias).sub_(log_sum.unsqueeze(-1)).exp2_()
    grad_keys = torch.bmm(weights.to(keys.dtype).flatten(1, 2).transpose(1, 2), upstream.flatten(1, 2)).float()
    grad_logits = _products(upstream, keys[..., :size]).sub_(inner.unsqueeze(-1)).mul_(weights)
    narrow = grad_logits.to(keys.dtype).flatten(1, 2)
    grad_query = torch.bmm(narrow, keys).view_as(query)
    if size < keys.shape[-1]:  # so far the gradient of the values
        grad_keys = F.pad(grad_keys, (0, keys.shape[-1] - size))
    grad_keys.add_(torch.bmm(narrow.transpose(1, 2), query.flatten(1, 2)), alpha=1 / LOG2_E)
    return grad_query, grad_keys


def _products(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the products of all heads as a new tensor, float32 [B, q, H, K]."""
    return torch.bmm(queries.flatten(1, 2), keys.transpose(1, 2)).float().unflatten(1, queries.shape[1:3])
