"""Comparison of a network with its implementation in transformers: logits, decoding, chunked prompts, gradients."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.cache import Cache
from model.errors import FiftyfoldError
from model.hf import import_pretrained
from model.transformer import Transformer

TOKENS = 300
TOLERANCE = 1e-4
"""Maximum absolute difference of logits of unit scale."""
GRADIENT_TOLERANCE = 2e-3
"""Relative to a tensor's largest gradient entry. The largest differences are in scalars (the stream mixing scales),
whose gradients are sums over all tokens that nearly cancel."""


@dataclass
class Pair:
    """One network in both implementations, with inputs and expected outputs."""

    oracle: Any
    """Transformers' network."""
    ours: Transformer
    ids: Tensor
    """int64 [B, 300]."""
    logits: Tensor
    """Logits of the oracle for the full sequences."""


def make_pair(oracle: Any, batch: int = 1) -> Pair:
    """Save transformers' network with its defaults, import it, and draw token IDs."""
    ids = torch.randint(0, oracle.config.vocab_size, (batch, TOKENS))
    with tempfile.TemporaryDirectory() as folder:
        oracle.save_pretrained(folder)
        ours = import_pretrained(folder)
    with torch.no_grad():
        logits = oracle(ids, use_cache=False).logits
    return Pair(oracle, ours, ids, logits)


def check_margin(name: str, margin: float, minimum: float) -> None:
    """Raise FiftyfoldError if selected and unselected scores are so close that rounding can change the selection."""
    if margin <= minimum:
        raise FiftyfoldError(f"{name}: selected and unselected scores differ by only {margin:.1e}; choose another seed")


def max_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference; infinity for NaN."""
    difference = (a - b).abs()
    return float("inf") if difference.isnan().any() else float(difference.max())


@torch.no_grad()
def full_forward(p: Pair, lengths: list[int]) -> float:
    """Compare full sequences of the given lengths."""
    return max(
        max_difference(
            p.ours(p.ids[:, :n]),
            p.logits if n == TOKENS else p.oracle(p.ids[:, :n], use_cache=False).logits,
        )
        for n in lengths
    )


@torch.no_grad()
def decode(p: Pair, tokens: int = TOKENS) -> float:
    """Compare decoding from our cache with the oracle's full forward pass."""
    cache = Cache(p.ours.config, p.ids.shape[0], tokens)
    steps = [p.ours(p.ids[:, t : t + 1], cache) for t in range(tokens)]
    return max_difference(torch.cat(steps, dim=1), p.logits[:, :tokens])


@torch.no_grad()
def chunked(p: Pair, length: int, cuts: Iterable[int] | None = None) -> float:
    """Compare prompts in two chunks, split at every position, with the oracle's full forward pass."""
    largest = 0.0
    for cut in cuts or range(1, length):
        cache = Cache(p.ours.config, p.ids.shape[0], length)
        chunks = [p.ours(p.ids[:, :cut], cache), p.ours(p.ids[:, cut:length], cache)]
        largest = max(largest, max_difference(torch.cat(chunks, dim=1), p.logits[:, :length]))
    return largest


def gradients(p: Pair, tokens: int) -> tuple[float, str, int]:
    """Compare the gradients of the next-token loss.

    Returns the largest difference relative to a gradient's largest entry, the name of our parameter, and the number of
    parameters that transformers trains. Raises AssertionError if a parameter has a gradient in one network only.
    """
    ids = p.ids[:, : tokens + 1]
    ours, oracle = p.ours.train(), p.oracle.train()
    for network, forward in ((ours, ours), (oracle, lambda x: oracle(x, use_cache=False).logits)):
        network.zero_grad()
        F.cross_entropy(forward(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    ours.eval(), oracle.eval()
    with tempfile.TemporaryDirectory() as folder:
        _with_gradients_as_weights(oracle).save_pretrained(folder)
        expected = dict(import_pretrained(folder).named_parameters())
    largest, where = 0.0, ""
    for name, parameter in ours.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        gradient = expected[name].detach()
        assert bool(gradient.any()) is bool(found.any()), f"{name}: a gradient in one network only"
        if gradient.any():
            difference = max_difference(found, gradient) / float(gradient.abs().max())
            if difference > largest:
                largest, where = difference, name
    return largest, where, sum(q.grad is not None and bool(q.grad.any()) for q in oracle.parameters())


@torch.no_grad()
def _with_gradients_as_weights(network: nn.Module) -> Any:
    """Return a copy with gradients in place of weights. Saved and imported, it gives the gradients our names."""
    result = copy.deepcopy(network)
    for target, source in zip(result.parameters(), network.parameters()):
        target.copy_(torch.zeros_like(source) if source.grad is None else source.grad)
    return result


def comparisons(p: Pair) -> dict[str, Any]:
    """Return the largest differences of all comparisons: every length, every token, every cut, every gradient."""
    gradient, _, parameters = gradients(p, TOKENS - 1)
    return {
        "scale": float(p.logits.std()),
        "full": full_forward(p, list(range(1, TOKENS + 1))),
        "decode": decode(p),
        "chunked": max(chunked(p, length) for length in (21, 70, 133)),
        "gradient": gradient,
        "parameters": parameters,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| configuration | logits' std | lengths 1..300 | decode | two pieces | gradients | parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        numbers = " | ".join(f"{r[key]:.1e}" for key in ("full", "decode", "chunked", "gradient"))
        lines.append(f"| {r['name']} | {r['scale']:.2f} | {numbers} | {r['parameters']} |")
    worst_of = " | ".join(f"{max(r[key] for r in rows):.1e}" for key in ("full", "decode", "chunked", "gradient"))
    lines.append(f"| **worst** | | {worst_of} | |")
    return "\n".join(lines) + "\n"
