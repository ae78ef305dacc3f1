import math

import pytest
import torch
from torch import nn

from kernels.newton_schulz import newton_schulz
from model.config import ModelConfig
from model.errors import CheckpointError, ConfigError
from model.muon import MuonAdamW, OptimizerConfig, rule_for
from model.transformer import Transformer


def tiny(**overrides):
    torch.manual_seed(0)
    return Transformer(ModelConfig(hidden_size=32, head_dim=16, rope_head_dim=8, expert_size=16, **overrides))


def test_roles_get_the_published_rules():
    rules = {name: rule_for(name, p, "muon") for name, p in tiny().named_parameters()}
    adamw = (
        "embed.weight",
        "head.weight",
        "norm.weight",
        "layers.1.attn.sink",
        "layers.1.attn.compressor.ape",
        "layers.0.attn_residual.base",
        "layers.0.attn_residual.scale",
        "layers.1.attn.compressor.norm.weight",
    )
    muon = (
        "layers.0.attn.wq_a.weight",
        "layers.0.attn.wo_a",
        "layers.0.ffn.w1",
        "layers.0.attn_residual.fn",
        "layers.1.attn.indexer.wq_b.weight",
        "layers.0.ffn.router.weight",
    )
    assert {rules[name] for name in adamw} == {"adamw"}
    assert {rules[name] for name in muon} == {"muon"}


def test_muon_is_the_published_update_for_each_matrix_alone():
    """A slow twin: one matrix at a time, algorithm 1 of the report."""
    torch.manual_seed(0)
    config = OptimizerConfig(learning_rate=0.02)
    model = nn.ParameterDict({"a": torch.randn(6, 10), "b": torch.randn(6, 10), "stack": torch.randn(3, 10, 6)})
    twin = {name: p.detach().clone() for name, p in model.items()}
    momentum = {name: torch.zeros_like(p) for name, p in twin.items()}
    optimizer = MuonAdamW(model.named_parameters(), config)
    for _ in range(3):
        for p in model.values():
            p.grad = torch.randn_like(p)
        for name, w in twin.items():
            g = model[name].grad
            momentum[name] = 0.95 * momentum[name] + g
            ahead = 0.95 * momentum[name] + g
            matrices = [newton_schulz(m) for m in (ahead if ahead.dim() == 3 else ahead.unsqueeze(0))]
            update = torch.stack(matrices).view_as(w) * math.sqrt(max(w.shape[-2:])) * 0.18
            twin[name] = (1 - 0.02 * 0.1) * w - 0.02 * update
        optimizer.step()
    for name, w in twin.items():
        torch.testing.assert_close(model[name].detach(), w, rtol=1e-4, atol=1e-5)
    rms = (0.18 * math.sqrt(10) * newton_schulz(torch.randn(6, 10))).square().mean().sqrt()
    assert 0.12 < rms < 0.24  # the size of an AdamW step, which is what the factor is for


def test_adamw_is_torchs():
    torch.manual_seed(0)
    ours, theirs = nn.Parameter(torch.randn(5, 7)), None
    theirs = nn.Parameter(ours.detach().clone())
    optimizer = MuonAdamW([("w", ours)], OptimizerConfig(rule="adamw", learning_rate=0.01, eps=1e-8))
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for _ in range(5):
        ours.grad = torch.randn(5, 7)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs)


def test_state_round_trips_and_strangers_are_refused():
    model = tiny()
    optimizer = MuonAdamW(model.named_parameters(), OptimizerConfig())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    state = optimizer.state_tensors()
    other = tiny()
    other.load_state_dict(model.state_dict())
    second = MuonAdamW(other.named_parameters(), OptimizerConfig())
    second.load_state_tensors(state)
    for p, q in zip(model.parameters(), other.parameters()):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.clone()
    optimizer.step()
    second.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    with pytest.raises(CheckpointError, match="'nobody' is not a parameter"):
        second.load_state_tensors({"nobody/momentum": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="has shape"):
        second.load_state_tensors({"embed.weight/exp_avg": torch.zeros(1)})


def test_a_missing_gradient_leaves_the_parameter_alone():
    model = tiny()
    optimizer = MuonAdamW(model.named_parameters(), OptimizerConfig())
    before = model.head.weight.clone()
    model.embed.weight.grad = torch.ones_like(model.embed.weight)
    optimizer.step()
    assert torch.equal(model.head.weight, before)


def test_asking_for_muon_without_matrices_is_an_error():
    with pytest.raises(ConfigError, match="muon was asked for"):
        MuonAdamW([("norm.weight", nn.Parameter(torch.ones(4)))], OptimizerConfig())
    with pytest.raises(ConfigError, match="learning_rate: must be positive"):
        OptimizerConfig(learning_rate=0.0)


def test_table_and_share_count_every_number():
    model = tiny()
    optimizer = MuonAdamW(model.named_parameters(), OptimizerConfig())
    assert sum(row[3] for row in optimizer.table()) == model.num_parameters()
    assert 0.5 < optimizer.muon_share() < 1
    assert MuonAdamW(model.named_parameters(), OptimizerConfig(rule="adamw")).muon_share() == 0
