"""One token of one sequence through the whole network, compiled in a few stretches.

Most of what a decode step costs on a CPU surrounds its products: calls, checks, and hundreds of small tensors. A
stretch is everything between two layers that must pause, because what comes next has no fixed shape: a csa layer's
choice among all its entries, a gqa layer's attention.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from model.block import Block
from model.cache_parts import LayerCache
from model.hyper_connections import Mixing
from model.mixers.base import Context

if TYPE_CHECKING:
    from model.transformer import Transformer


class Step(NamedTuple):
    """A layer, and what one token finds there besides."""

    block: Block
    past: dict[str, Tensor]
    experts: tuple[Tensor, ...]


class Halfway(NamedTuple):
    """A layer that has projected the token and not attended yet."""

    streams: Tensor
    mixing: Mixing
    projected: dict[str, Tensor]


class Resumed(NamedTuple):
    """The same after its pause, and what that brought."""

    step: Step
    halfway: Halfway
    paused: dict[str, Tensor]


def decode_token(
    network: Transformer, embedding: Tensor, input_ids: Tensor, layers: list[LayerCache], context: Context
) -> Tensor:
    """Logits float32 [1, 1, vocab] after input_ids int64 [1, 1] with their embedding [1, 1, hidden]. The layers' caches
    get all that the token leaves behind."""
    position = context.positions[0]
    resumed: Resumed | None = None
    rest = zip(network.layers, layers)
    while True:
        caches: list[LayerCache] = []
        steps: list[Step] = []
        for block, cache in rest:
            assert isinstance(block, Block)
            steps.append(Step(block, block.attn.past(cache), block.ffn.stored_experts()))
            caches.append(cache)
            if block.attn.pauses:
                break
        kinds = tuple(step.block.kind for step in steps)
        met = steps if resumed is None else [resumed.step, *steps]
        sizes = tuple(x.shape for step in met for x in step.past.values())
        form = (kinds, resumed and resumed.step.block.kind, sizes, position.device)
        compiled = context.execution.function(stretch, form)
        kept, halfway, logits = compiled(network, tuple(steps), resumed or embedding, position, input_ids)
        for rows, cache in zip(kept, caches):
            cache.append(rows)
        if halfway is None:
            return logits
        paused = steps[-1].block.attn.pause(halfway.projected, context, caches[-1])
        resumed = Resumed(steps[-1], halfway, paused)


def stretch(
    network: Transformer, steps: tuple[Step, ...], start: Resumed | Tensor, position: Tensor, input_ids: Tensor
) -> tuple[list[dict[str, Tensor]], Halfway | None, Tensor | None]:
    """From an embedding or a resumed layer through ``steps`` to the layer that pauses next, or to the logits.

    Returns what the cache gets from each step, and the one or the other.
    """
    rotation = network.rotation_at(position.unsqueeze(0))
    if isinstance(start, Resumed):
        block, past, experts = start.step
        streams, mixing, projected = start.halfway
        mixed = block.attn.attend_token(projected, past, start.paused, position)
        streams = block.finish_token(streams, mixing, mixed, rotation[block.attn.name], input_ids, experts)
    else:
        streams = network.into_streams(start)
    kept = []
    for block, past, experts in steps:
        mixing, projected = block.before_mixing(streams, rotation[block.attn.name], True)
        kept.append(block.attn.keep(projected, past, position))
        if block.attn.pauses:
            return kept, Halfway(streams, mixing, projected), None
        mixed = block.attn.attend_token(projected, past, {}, position)
        streams = block.finish_token(streams, mixing, mixed, rotation[block.attn.name], input_ids, experts)
    return kept, None, network.leave_streams(streams)
