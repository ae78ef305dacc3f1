"""Parity of mla and dsa layers with transformers' DeepSeek-V3, DeepSeek-V3.2 and Kimi Linear.

By default a few lengths and cuts run; the marker ``long`` selects all. Equal index scores are resolved by the library's
top-k in transformers and by the lower token here, so the cases have many index heads and seeds without near ties.
"""

import pytest
import torch

from kernels.index_scores import index_scores
from tests.model.mixers.latent_oracles import YARN, Case, Pair, ours

TOKENS = 300
TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 2e-3
MARGIN = 5e-6
"""Minimum gap between selected and unselected scores for a valid comparison."""
V3 = {
    "three heads": Case(),
    "queries without a latent": Case({"q_lora_rank": None}),
    "wide values, one head": Case({"v_head_dim": 30, "kv_lora_rank": 7}, heads=1),
    "narrow values, seven heads": Case({"v_head_dim": 3, "qk_nope_head_dim": 1, "qk_rope_head_dim": 2}, heads=7),
    "released proportions": Case(
        {"q_lora_rank": 48, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
        hidden=96,
        heads=16,
    ),
    "YaRN as released": Case({"qk_rope_head_dim": 16}, yarn={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "YaRN as in V2": Case({"qk_rope_head_dim": 8}, yarn={**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}),
    "YaRN with two length scalings": Case(yarn={**YARN, "factor": 8.0, "mscale": 0.5, "mscale_all_dim": 1.5}),
    "YaRN without length scalings": Case({"qk_rope_head_dim": 12}, yarn={**YARN, "factor": 4.0}, theta=500.0),
    "no positions": Case(rope=False),
    "no positions, queries without a latent": Case({"q_lora_rank": None}, heads=5, rope=False),
}
V32 = {
    "top 1": Case(index=(32, 8, 1)),
    "top 5": Case(index=(32, 16, 5)),
    "top 64": Case(index=(24, 8, 64), heads=5),
    "top 299": Case(index=(16, 32, 299), heads=2),
    "all selected": Case({"kv_lora_rank": 7, "v_head_dim": 30}, heads=1, index=(3, 8, 512)),
    "released proportions": Case(
        {"q_lora_rank": 48, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
        hidden=96,
        heads=16,
        index=(64, 16, 32),
    ),
    "YaRN as released": Case(
        {"qk_rope_head_dim": 16}, index=(32, 16, 17), yarn={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}
    ),
    "YaRN with two length scalings": Case(
        index=(32, 8, 33), yarn={**YARN, "factor": 8.0, "mscale": 0.5, "mscale_all_dim": 1.5}
    ),
}
CASES = {**{f"V3, {name}": case for name, case in V3.items()}, **{f"V3.2, {name}": case for name, case in V32.items()}}


def inputs(pair, batch=1, tokens=TOKENS):
    return torch.randn(batch, tokens, pair.case.hidden, generator=torch.Generator().manual_seed(7))


def difference(found, expected):
    return float((found - expected).abs().max())


def selection_margin(pair, x):
    """Return the smallest gap between the last selected and the first unselected score over all queries."""
    positions = torch.arange(x.shape[1])[None]
    context = pair.context(positions)
    index = pair.mixer.project(x, context.rotation["dsa"], context, cached=False).indexed
    scores = index_scores(index.query, index.keys, index.weights)
    hidden = positions > positions.transpose(0, 1)
    ranked = scores.masked_fill(hidden, float("-inf")).sort(-1, descending=True).values
    k = pair.case.index[2]
    return float((ranked[..., k - 1] - ranked[..., k])[:, k:].min()) if k < x.shape[1] else float("inf")


def check(name, lengths, cuts, decoded):
    pair = Pair(CASES[name])
    x = inputs(pair)
    with torch.no_grad():
        expected = pair.expected(x)
        assert expected.std() > 0.1
        if pair.case.index is not None:
            assert selection_margin(pair, x) > MARGIN
        for n in lengths:
            assert difference(pair.whole(x[:, :n]), pair.expected(x[:, :n])) < TOLERANCE, n
        steps = pair.cached(list(x[:, :decoded].split(1, dim=1)))
        assert difference(steps, expected[:, :decoded]) < TOLERANCE
        for length, cut in cuts:
            found = pair.cached([x[:, :cut], x[:, cut:length]])
            assert difference(found, expected[:, :length]) < TOLERANCE, (length, cut)
    return pair, x


@pytest.mark.parametrize("name", CASES)
def test_outputs_agree(name):
    cuts = [(21, cut) for cut in (1, 2, 7, 16, 20)] + [(TOKENS, 128), (TOKENS, 299)]
    check(name, [1, 2, 3, 17, 64, 129, TOKENS], cuts, 80)


@pytest.mark.parametrize("name", CASES)
def test_gradients_agree(name):
    pair = Pair(CASES[name])
    x = inputs(pair, batch=2, tokens=90)
    upstream = torch.randn(x.shape)
    given = [x.clone().requires_grad_() for _ in range(2)]
    (pair.mixer.train()(given[0], pair.context(torch.arange(90)[None])) * upstream).sum().backward()
    (pair.expected(given[1]) * upstream).sum().backward()
    found = dict(pair.mixer.named_parameters())
    trained = 0
    for name, p in pair.oracle.named_parameters():
        grad = found[ours(name)].grad
        assert (grad is None) == (p.grad is None), name
        if p.grad is not None:
            trained += 1
            # A softmax over a single token does not depend on the query.
            bound = GRADIENT_TOLERANCE * float(p.grad.abs().max()) if p.grad.any() else TOLERANCE
            assert difference(grad, p.grad) < bound, name
    assert trained >= 5
    assert difference(given[0].grad, given[1].grad) < GRADIENT_TOLERANCE * float(given[1].grad.abs().max())


@pytest.mark.long
@pytest.mark.parametrize("name", CASES)
def test_every_length_and_every_cut(name):
    cuts = [(length, cut) for length in (21, 133, TOKENS) for cut in range(1, length)]
    check(name, range(1, TOKENS + 1), cuts, TOKENS)
