"""Training benchmarks: equal work in both networks, and timed steps."""

import pytest
import torch

from benchmarks.lib.contenders import TransformersNetwork, write_weights
from benchmarks.training_step import EQUAL_WORK, OURS, THEIRS, Contender, measure_step, our_step, split_parameters
from model.config import ModelConfig


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_weights(ModelConfig.from_preset("tiny"), folder)
    return folder / "rounded"


def test_both_optimizers_use_adamw_for_the_same_parameters(weights):
    model = TransformersNetwork(weights).model
    stacks, matrices, others = split_parameters(model)
    names = {p: name for name, p in model.named_parameters()}
    ends = {names[p].removesuffix(".weight").rpartition(".")[2] for p in others if p.dim() > 1}
    assert ends == {"embed_tokens", "lm_head", "position_bias", "hc_fn"}
    assert {names[p] for p in others if p.dim() > 1 and "hc_fn" in names[p]} == {"model.hc_head.hc_fn"}
    assert all(m.data_ptr() == part.data_ptr() for p, each in stacks.items() for m, part in zip(each, p))
    assert len(stacks) + len(matrices) + len(others) == len(names) and all(m.dim() == 2 for m in matrices)


def test_the_equal_work_variant_has_no_auxiliary_work(weights, monkeypatch):
    ids = torch.randint(0, 258, (1, 65))
    trained, rounded, roles = {}, {}, []
    monkeypatch.setattr("model.precision._count", lambda aux, role, *formats: roles.append(role))
    for name in (OURS, EQUAL_WORK):
        roles.clear()
        model, step = our_step(weights, ids, Contender(name, True, 1))
        step()
        trained[name] = any(p.grad is not None for p in model.indexer_parameters())
        rounded[name] = len(roles)
    assert trained == {OURS: True, EQUAL_WORK: False} and rounded[OURS] > 0 == rounded[EQUAL_WORK]


@pytest.mark.parametrize("name", [THEIRS, OURS, EQUAL_WORK])
def test_a_step_is_timed(weights, name):
    threads = torch.get_num_threads()
    seconds, memory = measure_step(weights, Contender(name, True, 1), 64, 1)
    torch.set_num_threads(threads)
    assert seconds > 0 and memory > 1e8
