"""Muon with matrices distributed over ranks."""

import itertools

import pytest
import torch
import torch.distributed as dist
from gloo import on_ranks
from safetensors.torch import load_file, save_file
from tolerances import one_by_one
from torch import nn

from kernels.newton_schulz import newton_schulz
from model.distributed.dtensor import is_sharded, range_of, to_local
from model.optim import MuonAdamW, OptimizerConfig, muon_adamw
from model.optim.exchange import assign

SHAPES = {
    "square": (16, 16),
    "tall": (33, 16),
    "flat": (2, 32),  # fewer rows than ranks
    "fused": (24, 32),
    "stack": (4, 16, 32),
    "single": (1, 16, 32),
    "embed.weight": (7, 16),
    "norm.weight": (5,),
}
WORLD, DTYPES = 3, ("bfloat16", "float32")
FUSED = {"fused": (8, 16)}
UNUSED = "square"
"""Parameter without a gradient in the second step."""


def parameters():
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def optimized(named, config, distributed=False, place=lambda tensor: tensor):
    """Take three steps with equal gradients on all ranks."""
    optimizer = MuonAdamW(named.items(), config, FUSED, distributed)
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        for name, p in named.items():
            gradient = torch.randn(SHAPES[name], generator=generator)
            if name == "stack" and step > 0:
                gradient[step] = 0.0  # an expert without tokens
            p.grad = None if name == UNUSED and step == 1 else place(gradient)
        optimizer.step()
    return optimizer


def _rank(rank, world, folder):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    done = torch.zeros(1, dtype=torch.int64)

    def counted(matrices, *arguments):
        done.add_(len(matrices))
        return newton_schulz(matrices, *arguments)

    muon_adamw.newton_schulz = one_by_one(counted)
    mesh = init_device_mesh("cpu", (world,))

    def place(tensor):
        return distribute_tensor(tensor, mesh, [Shard(0)])

    for dtype, kind in itertools.product(DTYPES, ("replicas", "shards")):
        config, named = OptimizerConfig(ns_dtype=dtype), parameters()
        if kind == "shards":
            named = {name: nn.Parameter(place(p.detach())) for name, p in named.items()}
            assert all(map(is_sharded, named.values()))
            optimizer = optimized(named, config, True, place)
            state = optimizer.state_tensors()
            whole = {name: p.full_tensor().detach() for name, p in named.items()}
            for name, p in named.items():
                span = range_of(p.shape[0], rank, world)
                assert len(to_local(p)) == span.end - span.begin
                assert all(
                    value.shape == to_local(p).shape for key, value in state.items() if key == f"{name}/momentum"
                )
        else:
            optimizer = optimized(named, config, True)
            whole = {name: p.detach() for name, p in named.items()}
            whole |= {key: value for key, value in optimizer.state_tensors().items() if key.endswith("momentum")}
        assert 0 < done.item() < 28
        dist.all_reduce(done)
        # Every matrix once per step. One has no gradient in one step. Of replicated stacks, the two matrices with a
        # gradient of zero are left out.
        assert done.item() == 3 * 10 - 1 - (2 if kind == "replicas" else 0)
        done.zero_()
        save_file(whole, f"{folder}/{dtype}-{kind}-{rank}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    on_ranks(WORLD, _rank, str(folder))
    return folder


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_ranks_compute_the_update_of_one(folder, monkeypatch, dtype):
    """Results are bit-exact with batches of one matrix: several ranks and one process batch differently."""
    monkeypatch.setattr(muon_adamw, "newton_schulz", one_by_one(newton_schulz))
    named = parameters()
    state = optimized(named, OptimizerConfig(ns_dtype=dtype)).state_tensors()
    for rank in range(WORLD):
        for kind in ("replicas", "shards"):
            found = load_file(folder / f"{dtype}-{kind}-{rank}")
            for name, p in named.items():
                assert torch.equal(found[name], p), (kind, rank, name)
        found = load_file(folder / f"{dtype}-replicas-{rank}")
        for key in (key for key in state if key.endswith("momentum")):
            assert torch.equal(found[key], state[key]), key


def test_work_is_divided_by_its_cost():
    costs = [float(1 + i % 7) for i in range(50)]
    loads = [40.0, 0.0, 0.0]
    owners = assign(costs, loads)
    for cost, owner in zip(costs, owners):
        loads[owner] += cost
    assert max(loads) - min(loads) <= 1.0
    assert set(assign([5.0, 1.0, 1.0, 1.0], [0.0, 9.0])) == {0}
