from dataclasses import replace

import pytest
import torch

from kernels.swiglu import swiglu
from model.config import ModelConfig
from model.forward.aux_outputs import AuxOutputs
from model.forward.context import Context
from model.moe import MixtureOfExperts, hash_table, sequence_balance
from tests.model.memory import AllocationRecorder

CONTEXT = Context(torch.zeros(1, 1, dtype=torch.int64), {})


def build(layer=1, **overrides):
    torch.manual_seed(0)
    values = {"hidden_size": 16, "expert_size": 8, "qat": False, **overrides}
    moe = MixtureOfExperts(ModelConfig(**values), layer)
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.5)
    with torch.no_grad():
        moe.init_weights(0.5)
    return moe


def test_routing_follows_the_formula():
    moe = build()
    x, ids = torch.randn(2, 5, 16), torch.zeros(2, 5, dtype=torch.int64)
    moe.router_bias.copy_(torch.tensor([0.0, 3.0, 0.0, 0.0]))
    out = moe.eval()(x, ids, CONTEXT)
    for b in range(2):
        for s in range(5):
            token = x[b, s]
            affinity = torch.nn.functional.softplus(moe.router.weight @ token).sqrt()
            chosen = (affinity + moe.router_bias).topk(2).indices  # the bias chooses ...
            weights = affinity[chosen] / affinity[chosen].sum() * 1.5  # ... and does not weigh
            expected = moe.shared(token)
            for e, w in zip(chosen, weights):
                expected = expected + moe.w2[e] @ (swiglu(moe.w1[e] @ token, moe.w3[e] @ token, 10.0) * w)
            torch.testing.assert_close(out[b, s], expected, rtol=1e-4, atol=1e-4)


def test_hash_layers_route_by_token_id():
    moe = build(layer=0)
    table = moe.tid2eid
    assert (table[:, 0] != table[:, 1]).all()
    load = torch.bincount(table[:, 0], minlength=4).float()
    assert load.min() > 0.9 * load.mean()
    assert not torch.equal(hash_table(258, 4, 2, 0), hash_table(258, 4, 2, 1))
    x, ids = torch.randn(1, 4, 16), torch.tensor([[7, 7, 8, 9]])
    aux = AuxOutputs()
    moe.train()(x, ids, replace(CONTEXT, aux=aux))
    assert aux.expert_load[0].tolist() == torch.bincount(table[ids].flatten(), minlength=4).tolist()


def test_balance_loss_is_one_when_even_and_more_when_not():
    even = sequence_balance(torch.ones(1, 4, 4), torch.tensor([[[0, 1], [2, 3], [0, 1], [2, 3]]]))
    torch.testing.assert_close(even, torch.tensor(1.0))
    skewed = torch.ones(1, 4, 4)
    skewed[..., 0] = 9
    assert sequence_balance(skewed, torch.tensor([[[0, 1], [0, 2], [0, 3], [0, 1]]])) > 1.3


def test_the_balance_loss_makes_no_tensor_of_tokens_times_choices_times_experts():
    tokens, experts, k = 50, 16, 3
    affinities, counted = torch.rand(2, tokens, experts), torch.rand(2, tokens) < 0.7
    chosen = torch.rand(2, tokens, experts).argsort(-1)[..., :k]
    with AllocationRecorder() as made:
        found = sequence_balance(affinities, chosen, counted)
    assert max(made.all) <= 4 * affinities.numel()
    used = torch.nn.functional.one_hot(chosen, experts).sum(2) * counted.unsqueeze(-1)
    load = used.sum(1) * experts / (k * counted.sum(1, keepdim=True))
    share = (affinities / affinities.sum(-1, keepdim=True) * counted.unsqueeze(-1)).sum(1)
    torch.testing.assert_close(found, (load * share / counted.sum(1, keepdim=True)).sum(-1).mean())


@pytest.mark.parametrize(
    ("scoring", "affinity"),
    [("sigmoid", torch.sigmoid), ("sqrtsoftplus", lambda logits: torch.nn.functional.softplus(logits).sqrt())],
)
def test_the_balance_loss_compares_load_and_affinity(scoring, affinity):
    moe = build(scoring_func=scoring).train()
    x, ids, aux = torch.randn(1, 9, 16), torch.zeros(1, 9, dtype=torch.int64), AuxOutputs()
    moe(x, ids, replace(CONTEXT, aux=aux))
    affinities = affinity(x[0] @ moe.router.weight.T)
    share = (affinities / affinities.sum(-1, keepdim=True)).mean(0)
    load = torch.bincount(aux.expert_ids[1].flatten(), minlength=4) * 4 / (2 * 9)
    torch.testing.assert_close(aux.losses["balance"][1], (load * share).sum())


def test_kept_rounded_experts_follow_the_weights():
    moe = build(qat=True).eval()
    x, ids = torch.randn(1, 6, 16), torch.zeros(1, 6, dtype=torch.int64)
    with torch.no_grad():
        first = moe(x, ids, CONTEXT)
        assert torch.equal(moe(x, ids, CONTEXT), first)
        moe.w2.mul_(-1.0)
        moe.w1.copy_(moe.w1 * 2)
        changed = moe(x, ids, CONTEXT)
    assert not torch.allclose(changed, first, atol=1e-3)
    torch.testing.assert_close(changed, moe(x, ids, CONTEXT).detach())


@torch.no_grad()
def test_experts_cast_without_qat_are_rounded_once_qat_is_on():
    moe = build(qat=False, hidden_size=32, expert_size=32).eval()
    moe.cast_weights(torch.float32)
    moe.set_config(moe.config.replace(qat=True))
    assert all(torch.equal(x, moe.precision.round_expert(x)) for x in moe.stored_experts())
    assert not torch.equal(moe.stored_experts()[0], moe.w1)
    moe.cast_weights(torch.float32)
    moe.set_config(moe.config.replace(qat=False))
    rounded = moe.w1.clone()
    moe.cast_weights(torch.float32)
    assert torch.equal(moe.stored_experts()[0], rounded)


@torch.no_grad()
def test_casting_frees_the_rounded_copies():
    moe = build(qat=True, hidden_size=32, expert_size=32).eval()
    moe.stored_experts()
    assert moe._rounded
    moe.cast_weights(torch.bfloat16)
    assert not moe._rounded


def test_gradients_are_those_of_every_expert_over_every_token():
    moe = build().train()
    moe.shared = None
    x, ids = torch.randn(2, 9, 16), torch.zeros(2, 9, dtype=torch.int64)

    def as_written(x):
        logits, chosen, weights = moe.route(x, ids, CONTEXT)
        gains = torch.zeros_like(logits).scatter(-1, chosen, weights)
        inner = swiglu(*(torch.einsum("bsh,eih->bsei", x, w) for w in (moe.w1, moe.w3)), 10.0)
        return torch.einsum("bsei,ehi,bse->bsh", inner, moe.w2, gains)

    found = []
    for run in (lambda x: moe(x, ids, CONTEXT), as_written):
        moe.zero_grad()
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        out.square().sum().backward()
        found.append([out.detach(), leaf.grad, *(p.grad for p in moe.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("qat", [False, True])
def test_padding_rows_do_not_change_bf16_products(qat, monkeypatch):
    moe = build(qat=qat, hidden_size=32, expert_size=32).train()
    x, ids = torch.randn(2, 21, 32), torch.zeros(2, 21, dtype=torch.int64)
    results = []
    for rows in (1, 8):
        monkeypatch.setattr("model.moe._PAD_TO", rows)
        moe.zero_grad()
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            out = moe(leaf, ids, CONTEXT)
        out.square().sum().backward()
        results.append([out.detach(), leaf.grad, *(p.grad for p in moe.parameters())])
    torch.testing.assert_close(*results, rtol=0.01, atol=0.01 * float(results[0][1].abs().max()))
    with torch.no_grad():
        exact = moe(x, ids, CONTEXT)
    torch.testing.assert_close(results[1][0], exact, rtol=0.05, atol=0.05 * float(exact.abs().max()))
