"""Sharding of a network's matrices over ranks by FSDP2 (``torch.distributed.fsdp.fully_shard``).

The embedding, the head and the matrices of attention and feed-forward blocks are sharded, one group per layer. Routers,
compressors, convolutions, hyper-connections, norms, sinks and biases are replicated, because they compute in float32
whatever type the matrices are gathered in. So are the indexers: their loss leaves a layer beside its output, where FSDP
does not see the backward pass coming, and in a warm-up they alone have gradients. FSDP ignores replicated parameters;
their gradients are averaged like those of data-parallel replicas.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from model.distributed.dtensor import to_local
from model.moe import MixtureOfExperts

if TYPE_CHECKING:
    from model.transformer import Transformer

WHOLE_NAMES = re.compile(r"\.(router|compressor|indexer|\w*conv)\.|(^|\.)(attn_residual|ffn_residual|hyper_head)\.")


def sharded_names(model: Transformer) -> set[str]:
    """Return the parameters that :func:`shard` shards. Works on the meta device."""
    return {name for name, p in model.named_parameters() if p.dim() > 1 and not WHOLE_NAMES.search(name)}


def shard(model: Transformer, device: torch.device | str, param_dtype: torch.dtype = torch.float32) -> None:
    """Shard ``model`` in place over all ranks of the default process group, and move it to ``device``.

    Every rank must hold equal weights, on the CPU or on ``device``. Layers gather their matrices in ``param_dtype`` and
    multiply in it; embedding and head are gathered in float32. Weights, optimizer state and the average of gradients
    over ranks are float32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    # Nothing modifies the residual streams in place.
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
            module.caches_rounded = False  # the memory of gathered weights is reused without a new version
    model.to(device)


def reshard_all(model: Transformer) -> None:
    """Free unsharded parameters left over from a forward pass without a complete backward pass.

    Until then the network's parameters are not the sharded ones: neither gradients nor values are reachable through it,
    and the next pass would compute with stale values.
    """
    for module in model.modules():
        reshard = getattr(module, "reshard", None)
        if reshard is not None:
            reshard()


def local_state(model: Transformer) -> dict[str, Tensor]:
    """Return the state dict with this rank's rows of sharded tensors. It shares the network's memory."""
    reshard_all(model)
    return {name: to_local(tensor) for name, tensor in model.state_dict().items()}


@torch.no_grad()
def set_local_state(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Copy all of ``tensors``, named and shaped as in :func:`local_state`, into the network."""
    for name, tensor in local_state(model).items():
        tensor.copy_(tensors[name])
