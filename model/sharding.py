"""A network's matrices, sharded over ranks by FSDP2 (``torch.distributed.fsdp.fully_shard``).

Sharded are the embedding, the head and the matrices of attention and feed-forward, experts above all: one group for
each layer, gathered when the layer runs. Every rank holds whole what computes in float32 whatever type the matrices
are gathered in (routers, compressors, hyper-connections, norms, sinks, biases), and the indexers: their loss leaves a
layer beside its output, where FSDP does not see a backward pass coming, and in a warm-up they alone have gradients.
FSDP leaves the whole ones alone, so their gradients are averaged like those of replicas.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from model.moe import MixtureOfExperts

if TYPE_CHECKING:
    from model.transformer import Transformer

WHOLE_NAMES = re.compile(r"\.(router|compressor|indexer)\.|(^|\.)(attn_residual|ffn_residual|hyper_head)\.")


class Span(NamedTuple):
    """Rows ``begin`` to ``end`` of the ``rows`` that a tensor's first dimension has."""

    begin: int
    end: int
    rows: int


def span_of(rows: int, rank: int, world: int) -> Span:
    """What ``rank`` holds of ``rows``: equal chunks, of which the last ones may be shorter or empty."""
    chunk = -(-rows // world)
    return Span(min(rank * chunk, rows), min((rank + 1) * chunk, rows), rows)


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds a part of it only. Asked by attribute: importing DTensor takes most of a second, which
    only those should wait for who shard."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, sharing its memory; any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sharded_names(model: Transformer) -> set[str]:
    """The parameters that :func:`shard` spreads over the ranks; works on the meta device."""
    return {name for name, p in model.named_parameters() if p.dim() > 1 and not WHOLE_NAMES.search(name)}


def shard(model: Transformer, device: torch.device | str, param_dtype: torch.dtype = torch.float32) -> None:
    """Shard ``model`` in place over all ranks of the default process group, and bring it to ``device``.

    Every rank must come with the same weights, on the CPU or on ``device``. Layers gather their matrices in
    ``param_dtype`` and multiply in it; embedding and head are gathered in float32. Gradients are averaged over ranks
    in float32, which weights and optimizer state are too.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # Nothing changes the residual streams in place.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)
    device = torch.device(device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    spread = sharded_names(model)
    whole = {p for name, p in model.named_parameters() if name not in spread}
    # Inputs are not cast: the residual streams are float32, and so is what the float32 parts make of them.
    wide = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    narrow = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in (*model.layers, *model.mtp):
        fully_shard(block, mesh=mesh, mp_policy=narrow, ignored_params=whole)
    for module in model.mtp:
        register_fsdp_forward_method(module, "hidden")
    fully_shard(model, mesh=mesh, mp_policy=wide, ignored_params=whole)
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            module.keeps_rounded = False  # the memory of gathered weights is reused unseen, and is not to be kept
    model.to(device)


def settle(model: Transformer) -> None:
    """Let go of what is still gathered: after a forward pass that no backward pass followed, or followed in part.

    Until then the network's parameters are not the sharded ones, so that neither their gradients nor their values are
    reached through it, and what it has gathered of older values is what the next pass would compute with.
    """
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if reshard is not None:
            reshard()


def spans(named: Iterable[tuple[str, Tensor]]) -> dict[str, Span]:
    """What this rank holds of those of the tensors that are sharded."""
    found = {}
    for name, tensor in named:
        if is_sharded(tensor):
            mesh = tensor.device_mesh  # type: ignore[attr-defined]
            found[name] = span_of(tensor.shape[0], mesh.get_local_rank(), mesh.size())
    return found


def local_state(model: Transformer) -> dict[str, Tensor]:
    """The state dict, with this rank's rows of what is sharded; it shares the network's memory."""
    settle(model)
    return {name: local(tensor) for name, tensor in model.state_dict().items()}


@torch.no_grad()
def set_local_state(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Copy all of ``tensors``, named and shaped as in :func:`local_state`, into the network."""
    for name, tensor in local_state(model).items():
        tensor.copy_(tensors[name])
