"""The benchmarks of training: what they compare, and that they run."""

import math

import pytest
import torch

from benchmarks.lib.contenders import Theirs, write_weights
from benchmarks.quality import tokens_to
from benchmarks.training_step import NO_MORE, OURS, THEIRS, Way, measured, muon_and_others, our_step
from model.config import ModelConfig


def test_tokens_to_a_loss_are_read_off_the_line():
    line = [(0, 3.0), (10, 1.0), (20, 1.5), (30, 0.5)]
    assert [tokens_to(line, loss) for loss in (3.5, 2.0, 1.0, 0.75)] == [0, 5, 10, 27.5]
    assert math.isinf(tokens_to(line, 0.4))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    write_weights(ModelConfig.from_preset("tiny"), folder)
    return folder / "rounded"


def test_the_baseline_leaves_to_adamw_what_ours_does(weights):
    model = Theirs(weights).model
    stacks, matrices, others = muon_and_others(model)
    names = {p: name for name, p in model.named_parameters()}
    ends = {names[p].removesuffix(".weight").rpartition(".")[2] for p in others if p.dim() > 1}
    assert ends == {"embed_tokens", "lm_head", "position_bias", "hc_fn"}
    assert {names[p] for p in others if p.dim() > 1 and "hc_fn" in names[p]} == {"model.hc_head.hc_fn"}
    assert all(m.data_ptr() == part.data_ptr() for p, each in stacks.items() for m, part in zip(each, p))
    assert len(stacks) + len(matrices) + len(others) == len(names) and all(m.dim() == 2 for m in matrices)


def test_a_side_does_no_more_than_the_baseline(weights):
    ids = torch.randint(0, 258, (1, 65))
    trained, rounded = {}, {}
    for side in (OURS, NO_MORE):
        model, do = our_step(weights, ids, Way(side, True, 1))
        do()
        trained[side] = any(p.grad is not None for p in model.indexer_parameters())
        rounded[side] = sum(model.rounded_tensors().values())
    assert trained == {OURS: True, NO_MORE: False} and rounded[OURS] > 0 == rounded[NO_MORE]


@pytest.mark.parametrize("side", [THEIRS, OURS, NO_MORE])
def test_a_step_is_timed(weights, side):
    threads = torch.get_num_threads()
    seconds, memory = measured(weights, Way(side, True, 1), 64, 1)
    torch.set_num_threads(threads)
    assert seconds > 0 and memory > 1e8
