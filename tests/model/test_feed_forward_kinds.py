"""Feed-forward kinds per layer, sigmoid routing in groups, and tied embeddings, through the whole network."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from model import checkpoint
from model.cache import Cache
from model.config import ModelConfig
from model.costs import count_parameters, decode_work, feed_forward_work
from model.distributed.dtensor import is_sharded
from model.distributed.fsdp import shard
from model.errors import ConfigError
from model.feed_forward import DenseFeedForward
from model.forward.aux_outputs import AuxOutputs
from model.forward.execution import Execution
from model.moe import MixtureOfExperts
from model.optim.config import OptimizerConfig
from model.optim.muon_adamw import rule_for
from model.precision import format_table
from tests.gloo import on_ranks
from tests.model.networks import EXACT, build

V32 = {
    "num_hash_layers": 0,
    "first_k_dense_replace": 1,
    "ffn_size": 48,
    "scoring_func": "sigmoid",
    "num_experts": 8,
    "experts_per_token": 3,
    "n_group": 4,
    "topk_group": 2,
    "swiglu_limit": 0.0,
    "routed_scaling_factor": 2.5,
}
KINDS = {
    "dense, then sigmoid experts": V32,
    "without hyper-connections": {**V32, "hyper_connections": False},
    "dense": {"ffn": "dense"},
    "none": {"ffn": "none"},
    "none, without hyper-connections": {"ffn": "none", "hyper_connections": False},
    "tied": {"tie_word_embeddings": True, "num_hash_layers": 2},
    "everything": {**V32, "tie_word_embeddings": True, "mtp_layers": 1},
}


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def overrides(request):
    return request.param


@pytest.fixture
def ids():
    torch.manual_seed(3)
    return torch.randint(0, 50, (2, 45))


@torch.no_grad()
def test_decoding_equals_the_whole_sequence(overrides, ids):
    model = build(**EXACT, **overrides)
    expected = model(ids)
    cache = Cache(model.config, 2, 45)
    pieces = [model(ids[:, :20], cache), *(model(ids[:, t : t + 1], cache) for t in range(20, 45))]
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_batch_invariant_bits_do_not_depend_on_the_batch(overrides, ids):
    exact = build(**EXACT, **overrides)  # a rounded value next to a border could differ by a whole step
    plain = exact(ids)
    exact.execution = Execution("batch-invariant")
    torch.testing.assert_close(exact(ids), plain, rtol=1e-4, atol=1e-4)
    model = build(**overrides)
    model.execution = Execution("batch-invariant")
    whole = model(ids)
    cache = Cache(model.config, 1, 45)
    alone = torch.cat([model(piece, cache) for piece in ids[:1].split([7, 1, 37], dim=1)], dim=1)
    assert torch.equal(alone, whole[:1])


def test_a_checkpoint_restores_the_network(overrides, ids, tmp_path):
    model = build(**overrides)
    checkpoint.save(model, tmp_path / "a")
    again = checkpoint.load(tmp_path / "a")
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(again(ids), model(ids))


def test_every_parameter_learns(overrides, ids):
    model = build(**EXACT, **overrides).train()
    aux = AuxOutputs()
    aux.predict_ahead = bool(model.mtp)
    logits = model(ids, aux=aux)
    loss = cross_entropy(logits.flatten(0, 1), ids.roll(-1, 1).flatten())
    if aux.predict_ahead:
        loss = loss + cross_entropy(aux.mtp_logits.flatten(0, 1), ids[:, 1:].flatten())
    for losses in aux.losses.values():
        loss = loss + sum(losses.values())
    assert torch.isfinite(loss)
    loss.backward()
    silent = [n for n, p in model.named_parameters() if ".indexer." not in n and (p.grad is None or not p.grad.any())]
    assert silent == []


def test_flops_count_every_matrix_product(overrides):
    """Each weight of a feed-forward block multiplies a token once if it is active: two FLOPs."""
    model = build(**{**overrides, "mtp_layers": 0})
    parts = count_parameters(model).components
    names = ("router", "shared experts", "routed experts", "feed-forward")
    active = sum(parts[name][1] for name in names if name in parts)
    assert sum(work.flops for work in feed_forward_work(model.config)) == 2 * active
    residual = [work.flops for work in decode_work(model.config, 50) if work.part == "hyper-connections: weights"]
    expected = 2 * sum(p.numel() for n, p in model.named_parameters() if n.endswith(".fn"))
    assert sum(residual) == expected


def test_blocks_are_of_the_declared_kind():
    model = build(**V32, mtp_layers=1)
    kinds = [type(block.ffn) for block in (*model.layers, *model.mtp)]
    assert kinds == [DenseFeedForward, *[MixtureOfExperts] * 4]
    assert model.layers[0].ffn.w1.weight.shape == (48, 32)
    assert model.config.ffn_kinds == ["dense", "moe", "moe", "moe"]
    bare = build(ffn="none", mtp_layers=1)
    assert not [n for n, _ in bare.named_parameters() if "ffn" in n]
    rows = {row[0]: row[3] for row in format_table(model.config)}
    assert rows["routed expert weights"] == 3 * 4
    assert "routed expert weights" not in {row[0] for row in format_table(bare.config)}


@torch.no_grad()
def test_a_layer_without_feed_forward_adds_its_mixer_only(ids):
    model = build(**EXACT, layers=("gqa",), hyper_connections=False, ffn="none")
    block, context = model.layers[0], model._context(ids, None, None, "sparse", None, None)
    x = torch.randn(2, 45, 32)
    torch.testing.assert_close(block(x, ids, context), x + block.attn(block.attn_norm(x), context))


def test_zero_initialized_outputs_leave_the_embedding(ids):
    for kinds in (V32, {"ffn": "none"}):
        model = build(**kinds, zero_init_output=True, hyper_connections=False, layers=("sliding", "gqa"))
        with torch.no_grad():
            expected = model.project(model.norm(model.embed(ids)))
            torch.testing.assert_close(model(ids), expected)


@torch.no_grad()
def test_limit_0_does_not_bound_the_activation(ids):
    free, loose, tight = (build(**EXACT, **{**V32, "swiglu_limit": limit}, init_std=1.5) for limit in (0.0, 1e9, 1.0))
    assert torch.equal(free(ids), loose(ids))
    assert not torch.allclose(free(ids), tight(ids), atol=1e-2)
    single = ids[:1, :1]  # few tokens run in one operation
    assert torch.equal(free(single), loose(single))


def test_tied_embeddings_are_one_tensor(ids, tmp_path):
    model, free = build(tie_word_embeddings=True), build()
    assert model.head is None and "head.weight" not in model.state_dict()
    assert free.num_parameters() - model.num_parameters() == 50 * 32
    with torch.no_grad():
        free.load_state_dict({**model.state_dict(), "head.weight": model.embed.weight})
        assert torch.equal(free(ids), model(ids))
    total = {name: count_parameters(m).components["embedding"] for name, m in (("tied", model), ("free", free))}
    assert total == {"tied": (1600, 1600), "free": (1600, 0)}
    assert rule_for("embed.weight", model.embed.weight, OptimizerConfig().rule, (50,)) == "adamw"


def train_on_two_ranks(rank, world, ids, expected):
    """Compare the gradients of sharded networks with those of whole ones."""
    for kinds, (loss, gradients) in zip(KINDS.values(), expected):
        model = build(**EXACT, **kinds).train()
        shard(model, "cpu")
        assert is_sharded(model.embed.weight) and is_sharded(model.layers[0].attn.wo_b.weight)
        found = next_token_loss(model, ids)
        found.backward()
        torch.testing.assert_close(found.detach(), loss)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and is_sharded(parameter):  # replicas are averaged by the trainer
                torch.testing.assert_close(parameter.grad.full_tensor(), gradients[name], rtol=1e-3, atol=1e-5)


def next_token_loss(model, ids):
    return cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten())


def test_sharded_networks_have_the_gradients_of_whole_ones(ids):
    expected = []
    for kinds in KINDS.values():
        model = build(**EXACT, **kinds).train()
        loss = next_token_loss(model, ids)
        loss.backward()
        expected.append((loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    on_ranks(2, train_on_two_ranks, ids, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"first_k_dense_replace": 4}, "first_k_dense_replace: .* fewer than all 4 layers, found 4"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace: .*, found -1"),
        ({"ffn": "dense"}, "first_k_dense_replace: .* with ffn 'moe'"),
        ({"num_hash_layers": 1}, "num_hash_layers: 1 leading layers cannot be hash-routed, because first_k_dense"),
        ({"scoring_func": "softmax"}, "scoring_func: 'softmax' is not one of sqrtsoftplus, sigmoid"),
        ({"n_group": 3}, r"n_group: 8 experts \(num_experts\) do not divide into 3 groups"),
        ({"n_group": 8}, "n_group: 8 experts .* into 8 groups of at least 2"),
        ({"n_group": 0}, "n_group: must be at least 1"),
        ({"topk_group": 5}, "topk_group: 5 exceeds n_group 4"),
        ({"topk_group": 1}, "experts_per_token: 3 exceeds the 2 experts of topk_group 1 groups"),
        ({"swiglu_limit": -1.0}, "swiglu_limit: must not be negative"),
        ({"ffn": "swiglu"}, "ffn: 'swiglu' is not one of moe, dense, none"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected true or false, found 'yes'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{**V32, **changes})
