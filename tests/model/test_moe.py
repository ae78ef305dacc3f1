import torch

from model.config import ModelConfig
from model.mixers.base import Context
from model.moe import MixtureOfExperts, hash_table, sequence_balance, swiglu

CONTEXT = Context(torch.zeros(1, 1, dtype=torch.int64), {})


def build(layer=1, **overrides):
    torch.manual_seed(0)
    values = {"hidden_size": 16, "expert_size": 8, "qat": False, **overrides}
    moe = MixtureOfExperts(ModelConfig(**values), layer)
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.5)
    with torch.no_grad():
        moe.reset(0.5)
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


def test_swiglu_clamps():
    gate, up = torch.tensor([50.0, -50.0, 1.0]), torch.tensor([20.0, -20.0, 2.0])
    limited = swiglu(gate, up, 10.0)
    expected = torch.nn.functional.silu(torch.tensor([10.0, -50.0, 1.0])) * torch.tensor([10.0, -10.0, 2.0])
    torch.testing.assert_close(limited, expected)


def test_hash_layers_route_by_token_id():
    moe = build(layer=0)
    table = moe.tid2eid
    assert (table[:, 0] != table[:, 1]).all()
    load = torch.bincount(table[:, 0], minlength=4).float()
    assert load.min() > 0.9 * load.mean()
    assert not torch.equal(hash_table(258, 4, 2, 0), hash_table(258, 4, 2, 1))
    x, ids = torch.randn(1, 4, 16), torch.tensor([[7, 7, 8, 9]])
    moe.train()(x, ids, CONTEXT)
    assert moe.expert_load.tolist() == torch.bincount(table[ids].flatten(), minlength=4).tolist()


def test_balance_loss_is_one_when_even_and_more_when_not():
    even = sequence_balance(torch.ones(1, 4, 4), torch.tensor([[[0, 1], [2, 3], [0, 1], [2, 3]]]))
    torch.testing.assert_close(even, torch.tensor(1.0))
    skewed = torch.ones(1, 4, 4)
    skewed[..., 0] = 9
    assert sequence_balance(skewed, torch.tensor([[[0, 1], [0, 2], [0, 3], [0, 1]]])) > 1.3


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
    assert torch.equal(changed, moe(x, ids, CONTEXT).detach())
