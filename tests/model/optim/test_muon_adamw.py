import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from kernels.newton_schulz import newton_schulz
from model.config import ModelConfig
from model.errors import CheckpointError, ConfigError
from model.optim import MuonAdamW, OptimizerConfig, rule_for
from model.optim.reference import adamw_step, muon_step
from model.transformer import Transformer


def tiny(**overrides):
    torch.manual_seed(0)
    return Transformer(ModelConfig(hidden_size=32, head_dim=16, rope_head_dim=8, expert_size=16, **overrides))


def test_the_rate_shown_for_the_indexers_is_that_of_their_matrices():
    model, config = tiny(), OptimizerConfig(learning_rate=0.5, adamw_learning_rate=0.25)
    for rule, rates in (
        ("muon", {"muon": 0.5, "adamw": 0.25, "indexer": 0.5}),
        ("adamw", {"adamw": 0.25, "indexer": 0.25}),
    ):
        optimizer = MuonAdamW(model.named_parameters(), replace(config, rule=rule), model.split_sizes())
        assert optimizer.rates() == rates


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


@pytest.mark.parametrize("batch", [1, 700, 1 << 22])
def test_the_optimizer_equals_the_reference(batch, monkeypatch):
    """All parameters of a network, with experts, output groups and fused projections as separate matrices."""
    monkeypatch.setattr("model.optim.muon_adamw._MAX_BATCH_ELEMENTS", batch)
    model = tiny()
    config = OptimizerConfig(learning_rate=0.02, adamw_learning_rate=0.01, eps=1e-8, ns_dtype="float32")
    fused = model.split_sizes()
    optimizer = MuonAdamW(model.named_parameters(), config, fused)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = {name: [torch.zeros_like(w), torch.zeros_like(w)] for name, w in weights.items()}
    for step in (1, 2, 3):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            if p.dim() > 2 and step > 1:
                p.grad[0] = 0.0  # an expert without tokens
            rows = fused.get(name, p.shape[-2:-1])
            if rule_for(name, p, "muon", rows) == "adamw":
                weights[name], *state[name] = adamw_step(weights[name], p.grad, *state[name], step, 0.01, config)
                continue
            begin = 0
            for count in rows:
                part = slice(begin, begin + count)
                begin += count
                views = (t[..., part, :].flatten(0, -3) if t.dim() > 2 else t[None, part]
                         for t in (weights[name], p.grad, state[name][0]))  # fmt: skip
                for weight, gradient, momentum in zip(*views):
                    new_weight, new_momentum = muon_step(weight, gradient, momentum, 0.02, config, p.dim() > 2)
                    weight.copy_(new_weight)
                    momentum.copy_(new_momentum)
        optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], rtol=1e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("fast", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_selects_the_faster_dtype_of_the_device(fast, dtype, monkeypatch):
    monkeypatch.setattr("model.optim.config.multiplies_bf16_fast", lambda device: fast and device.type == "cpu")
    parameter = nn.Parameter(torch.randn(5, 7))
    assert MuonAdamW([("w", parameter)], OptimizerConfig()).config.ns_dtype == dtype
    assert MuonAdamW([("w", parameter)], OptimizerConfig(ns_dtype="float32")).config.ns_dtype == "float32"


def test_an_update_has_the_size_of_an_adamw_step():
    update = 0.18 * math.sqrt(10) * newton_schulz(torch.randn(6, 10))
    assert 0.12 < update.square().mean().sqrt() < 0.24


def test_fused_projections_are_updated_separately():
    model = tiny()
    fused, parameters = model.split_sizes(), dict(model.named_parameters())
    assert all(sum(rows) == parameters[name].shape[-2] for name, rows in fused.items())
    assert fused["layers.1.attn.compressor.wkv.weight"] == (16, 16)
    assert fused["layers.1.attn.indexer.compressor.wgate.weight"] == (16, 16)
    assert fused["layers.0.attn_residual.fn"] == (4, 4, 16)
    assert "layers.2.attn.compressor.wkv.weight" not in fused  # hca entries do not overlap
    table = {role: shown for role, _, shown, _, _ in MuonAdamW(parameters.items(), OptimizerConfig(), fused).table()}
    assert table["layers.*.attn_residual.fn"] == "4 x (2 x [4, 128] + 1 x [16, 128])"
    assert table["layers.*.ffn.w1"] == "4 x (4 x [16, 32])"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_experts_without_tokens_keep_their_weights_while_their_momentum_decays(dtype):
    """Orthogonalization would turn what is left of the momentum into steps of full size."""
    config = OptimizerConfig(ns_dtype=dtype)
    experts, dense = nn.Parameter(torch.randn(4, 6, 10)), nn.Parameter(torch.randn(6, 10))
    optimizer = MuonAdamW([("experts", experts), ("dense", dense)], config)
    for idle in (False, True, True, False):
        before = experts.detach().clone()
        momentum = optimizer.state_tensors().get("experts/momentum", torch.zeros(4, 6, 10)).clone()
        dense.grad, experts.grad = torch.zeros(6, 10), torch.randn(4, 6, 10)
        if idle:
            experts.grad[1:3] = 0.0
        before_dense = dense.detach().clone()
        optimizer.step()
        moved = (experts != before).flatten(1).any(1).tolist()
        assert moved == [True, not idle, not idle, True]
        assert not torch.equal(dense, before_dense)  # weight decay
        expected = config.momentum * momentum + experts.grad
        torch.testing.assert_close(optimizer.state_tensors()["experts/momentum"], expected)


def test_a_nonfinite_gradient_is_not_a_missing_gradient():
    experts = nn.Parameter(torch.randn(2, 6, 10))
    optimizer = MuonAdamW([("experts", experts)], OptimizerConfig(ns_dtype="float32"))
    experts.grad = torch.zeros(2, 6, 10)
    experts.grad[1] = float("nan")
    optimizer.step()
    assert experts[0].isfinite().all() and experts[1].isnan().all()


def test_parts_too_small_for_muon_go_to_adamw():
    model = tiny(hc_mult=1)
    rules = {
        name: group["rule"]
        for group in MuonAdamW(model.named_parameters(), OptimizerConfig(), model.split_sizes()).param_groups
        for name in group["names"]
    }
    assert rules["layers.0.attn_residual.fn"] == "adamw" and rules["layers.0.attn.wq_a.weight"] == "muon"


@pytest.mark.parametrize("coefficients", [(), ((3.0, float("nan"), 1.0),)])
def test_invalid_newton_schulz_coefficients_are_refused(coefficients):
    with pytest.raises(ConfigError, match=r"ns_coefficients: expected at least one step of finite \(a, b, c\)"):
        OptimizerConfig(ns_coefficients=coefficients)


def test_adamw_equals_torch():
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


def test_state_round_trips_and_foreign_states_are_refused():
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
    with pytest.raises(ConfigError, match="optimizer rule 'muon': no parameter is a matrix"):
        MuonAdamW([("norm.weight", nn.Parameter(torch.ones(4)))], OptimizerConfig())
    with pytest.raises(ConfigError, match="learning_rate: expected a finite number above 0"):
        OptimizerConfig(learning_rate=0.0)


def test_table_tells_apart_equal_names_in_different_mixers():
    model = tiny(layers=("sliding", "csa", "hca", "csa"))
    table = MuonAdamW(model.named_parameters(), OptimizerConfig()).table(model.config.layers)
    roles = [role for role, *_ in table]
    assert len(set(roles)) == len(roles)
    assert {"layers.*.attn.compressor.ape (csa)", "layers.*.attn.compressor.ape (hca)"} <= set(roles)
    assert "layers.*.attn_norm.weight" in roles  # equal in all layers


def test_table_and_share_count_every_element():
    model = tiny()
    optimizer = MuonAdamW(model.named_parameters(), OptimizerConfig())
    assert sum(row[3] for row in optimizer.table()) == model.num_parameters()
    assert 0.5 < optimizer.muon_share() < 1
    assert MuonAdamW(model.named_parameters(), OptimizerConfig(rule="adamw")).muon_share() == 0
