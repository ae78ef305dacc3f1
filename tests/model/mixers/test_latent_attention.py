"""mla and dsa layers: declarations, refused settings, the indexer's loss and training."""

import pytest
import torch
import torch.nn.functional as F

from model import checkpoint
from model.cache import Cache
from model.config import ModelConfig
from model.costs import cache_bytes_per_token
from model.errors import ConfigError
from model.forward.aux_outputs import AuxOutputs
from model.forward.execution import Execution
from model.optim import MuonAdamW, OptimizerConfig
from model.precision import format_table
from model.transformer import Transformer
from tests.model.mixers.latent_oracles import YARN, Case, Pair
from tests.model.networks import BF16, EXACT, LATENT, SMALL, build


def small(mixer="mla", fields=(), **options):
    changes = {"layers": (mixer,), "mixer_options": {mixer: {**LATENT, **options}}, **dict(fields)}
    return ModelConfig(**{**SMALL, **changes})


# --- declarations


@pytest.mark.parametrize(
    ("formats", "size"),
    [
        (BF16, 1152 + 256),
        ({"kv_format": "fp8", "index_format": "fp4"}, 648 + 68),
        ({"kv_format": "fp8_128", "index_format": "fp8_128"}, 656 + 132),
        ({"kv_format": "fp8_128"}, 656 + 68),
    ],
)
def test_a_token_takes_the_released_bytes_at_full_size(formats, size):
    config = ModelConfig.from_preset("v3.2").replace(**{"index_format": "fp4", **formats})
    assert sum(cache_bytes_per_token(config).values()) == 61 * size
    tokens = 2 * config.page_tokens
    assert Cache(config, 1, tokens, "meta").nbytes() == tokens * 61 * size


def test_the_full_size_network_on_the_meta_device():
    """Projections of the published 671B: 187.1M of attention and 14.0M of indexer per layer."""
    config = ModelConfig.from_preset("v3.2").replace(layers=("dsa",), ffn="dense", first_k_dense_replace=0)
    with torch.device("meta"):
        attention = Transformer(config).layers[0].attn
    indexer = sum(p.numel() for p in attention.indexer.parameters())
    assert indexer == 1536 * 64 * 128 + 7168 * (128 + 64) + 2 * 128
    assert sum(p.numel() for p in attention.parameters()) - indexer == 187_107_328
    assert attention.row_layout.nbytes == 656
    assert attention.scale == pytest.approx(192**-0.5 * (0.1 * 3.6888794541139363 + 1) ** 2)


def test_the_precision_table_lists_latents_and_index_keys():
    table = {row[0]: row[1:] for row in format_table(small("dsa", {"kv_format": "fp8_128"}))}
    assert table["latents of keys and values"] == ("fp8_128", "yes", 1)
    assert table["shared rotary keys"] == ("bf16", "yes", 1)
    assert table["index queries and keys (after Hadamard)"] == ("fp4", "yes", 2)


def test_rounding_is_counted_in_training():
    model = build(layers=("mla", "dsa"), qat=True).train()
    aux = AuxOutputs()
    model(torch.randint(0, 50, (1, 20)), aux=aux)
    assert aux.rounded["mla"] == 2 and aux.rounded["index"] == 2


@pytest.mark.parametrize(
    ("mixer", "options", "fields", "message"),
    [
        (
            "mla",
            {"qk_rope_head_dim": 3},
            {},
            "mla.qk_rope_head_dim: expected an even number of at least 2, or 0 without rope, found 3",
        ),
        (
            "mla",
            {"qk_rope_head_dim": 0},
            {},
            "mla.qk_rope_head_dim: expected an even number of at least 2, or 0 without rope, found 0",
        ),
        (
            "mla",
            {"qk_rope_head_dim": -2, "rope": False},
            {},
            "qk_rope_head_dim: expected an even number of at least 2, or 0 without rope, found -2",
        ),
        ("mla", {"kv_lora_rank": 0}, {}, "mla.kv_lora_rank: expected a whole number of at least 1, found 0"),
        ("mla", {"kv_lora_rank": None}, {}, "mla.kv_lora_rank: expected a whole number of at least 1, found null"),
        ("mla", {"v_head_dim": 2.0}, {}, "mla.v_head_dim: expected a whole number of at least 1, found 2.0"),
        (
            "mla",
            {"qk_nope_head_dim": True},
            {},
            "mla.qk_nope_head_dim: expected a whole number of at least 1, found true",
        ),
        ("mla", {"q_lora_rank": "8"}, {}, "mla.q_lora_rank: expected a whole number of at least 1 or null, found '8'"),
        ("dsa", {"q_lora_rank": None}, {}, "dsa.q_lora_rank: expected a whole number of at least 1, found null"),
        ("mla", {"rope": "no"}, {}, "mla.rope: expected true or false, found 'no'"),
        ("mla", {"mscale": -1}, {}, "mla.mscale: expected a number of at least 0, found -1"),
        (
            "mla",
            {"mscale_all_dim": float("nan")},
            {},
            "mscale_all_dim: expected a number of at least 0, found .nan",
        ),
        ("dsa", {"rope": False}, {}, "dsa.rope: unknown option; there are q_lora_rank, kv_lora_rank"),
        ("mla", {"kv_rank": 8}, {}, "mla.kv_rank: unknown option; there are q_lora_rank, kv_lora_rank"),
        (
            *("mla", {"kv_lora_rank": 25}, {"kv_format": "fp8"}),
            r"mla.kv_lora_rank: 25 dims in kv_format fp8 end within a value of rope_format bf16; .* a multiple of 2",
        ),
        ("dsa", {}, {"index_head_dim": 12}, "index_head_dim: must be a power of two for the Hadamard rotation"),
        ("dsa", {"qk_rope_head_dim": 16}, {}, r"dsa.qk_rope_head_dim: 16 is wider than index_head_dim 8"),
        ("dsa", {}, {"index_topk": 0}, "index_topk: must be at least 1, found 0"),
    ],
)
def test_refused_settings_are_named(mixer, options, fields, message):
    with pytest.raises(ConfigError, match=message):
        small(mixer, fields, **options)


def test_odd_latents_without_rotary_keys_are_refused_in_fp4_only():
    shape = {"kv_lora_rank": 25, "qk_rope_head_dim": 0, "rope": False}
    with pytest.raises(ConfigError, match="25 dims in kv_format fp4 end within a value"):
        small("mla", {"kv_format": "fp4"}, **shape)
    model = build(layers=("mla",), mixer_options={"mla": {**LATENT, **shape}}, kv_format="fp8")
    ids = torch.randint(0, 50, (1, 30))
    with torch.no_grad():
        cache = Cache(model.config, 1, 30)
        found = torch.cat([model(piece, cache) for piece in ids.split([11, 1, 18], dim=1)], dim=1)
        assert ((found - model(ids)).abs().amax(-1) < 1e-3).float().mean() > 0.9


def test_widths_without_a_batch_invariant_mode_are_named():
    model = build(layers=("mla",), mixer_options={"mla": {**LATENT, "v_head_dim": 10}})
    with pytest.raises(ConfigError, match=r"multiples of 4, mixer_options\.mla\.v_head_dim is 10"):
        model.execution = Execution("batch-invariant")
    model = build(layers=("mla",), mixer_options={"mla": {**LATENT, "q_lora_rank": None}})
    model.execution = Execution("batch-invariant")


# --- the indexer's teacher


def test_the_teacher_is_the_attention_of_every_head():
    """Compute the divergence from the definition: probabilities of all heads, normalized, against the index scores."""
    pair = Pair(Case(index=(16, 8, 9), yarn={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}))
    x = torch.randn(2, 40, 40)
    context = pair.context(torch.arange(40)[None])
    query, rows, index = pair.mixer.project(x, context.rotation["dsa"], context, cached=True)
    logits = torch.einsum("bshc,btc->bhst", query, rows) * pair.mixer.scale
    products = torch.einsum("bshc,btc->bsht", index.query, index.keys).relu()
    scores = torch.einsum("bsh,bsht->bst", index.weights, products)
    visible = torch.ones(40, 40, dtype=torch.bool).tril().expand(2, -1, -1)
    best = scores.masked_fill(~visible, float("-inf")).topk(9, dim=-1).indices
    chosen = torch.zeros(2, 40, 40, dtype=torch.bool).scatter_(-1, best, True) & visible
    for attention, mask in (("dense", visible), ("sparse", chosen)):
        aux = AuxOutputs()
        pair.mixer.train()
        pair.whole(x, aux, attention=attention)
        teacher = logits.masked_fill(~mask.unsqueeze(1), float("-inf")).softmax(-1).sum(1)
        target = (teacher / teacher.sum(-1, keepdim=True)).detach()
        log_choice = scores.masked_fill(~mask, float("-inf")).log_softmax(-1).masked_fill(~mask, 0.0)
        expected = (torch.xlogy(target, target) - target * log_choice).sum(-1).mean()
        torch.testing.assert_close(aux.losses["indexer_kl"][0], expected, rtol=1e-4, atol=1e-6)
        parameters = list(pair.mixer.indexer.parameters())
        losses = aux.loss("indexer_kl"), expected
        for one, other in zip(*(torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses)):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


# --- gathered latents and keys per head


def test_latents_are_gathered_where_that_takes_fewer_multiplications():
    """At V3.2's sizes, 2,048 latents of 1,088 multiply-adds for 128 + 16 heads, all tokens of 320 for 128."""
    config = ModelConfig.from_preset("v3.2").replace(layers=("dsa",), ffn="dense", first_k_dense_replace=0)
    with torch.device("meta"):
        attention = Transformer(config).layers[0].attn
    assert not attention.gathers(2048, 2048) and not attention.gathers(7833, 2048)
    assert attention.gathers(7834, 2048)


@pytest.mark.parametrize("positions", [None, [*range(31), *range(2), *range(12), -1, -1, -1]])
def test_both_forms_of_sparse_attention_agree(positions, monkeypatch):
    """Compare outputs, the indexer's loss, metrics and all gradients, alone and with packed documents."""
    model = build(layers=("dsa", "dsa"), index_topk=4, **EXACT).train()
    ids = torch.randint(0, 50, (2, 48))
    places = None if positions is None else torch.tensor(positions).expand(2, -1)
    results = []
    for gathers in (True, False):
        for layer in model.layers:
            monkeypatch.setattr(layer.attn, "gathers", lambda *sizes, gathers=gathers: gathers)
        model.zero_grad()
        aux = AuxOutputs(measure_selection=True)
        logits = model(ids, positions=places, aux=aux)
        (logits.square().mean() + aux.loss("indexer_kl")).backward()
        metrics = aux.by_layer(("indexer_kl", "recall_at_k", "recall_at_k_of_best"))
        results.append(
            (logits.detach(), metrics, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        )
    (gathered, some, gradients), (masked, others, expected) = results
    torch.testing.assert_close(gathered, masked, rtol=1e-4, atol=1e-5)
    assert len(some) == 9 and some == pytest.approx(others, rel=1e-3)
    assert gradients.keys() == expected.keys() and any("indexer" in name for name in gradients)
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() < 1e-3 * expected[name].abs().max() + 1e-7, name


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_long_sequences_are_computed_by_blocks_of_queries(attention, monkeypatch):
    """Blocks of queries change neither the output, nor the indexer's loss, nor its metrics."""
    model = build(layers=("dsa", "dsa"), index_topk=40, **EXACT)
    ids, results = torch.randint(0, 50, (2, 61)), []
    for queries in (61, 7):
        monkeypatch.setattr("model.mixers.dsa._QUERIES", queries)
        monkeypatch.setattr("model.mixers.indexer._MEASURED_QUERIES", queries)
        for operation, name in (("indexer_kl", "_MAX_SCORES"), ("index_topk", "_MAX_BLOCK_SCORES")):
            monkeypatch.setattr(f"kernels.{operation}.eager.{name}", queries * 2 * 61)
        aux = AuxOutputs(measure_selection=True)
        with torch.no_grad():
            logits = model(ids, aux=aux, attention=attention)
        results.append((logits, aux.loss("indexer_kl"), *aux.metrics["recall_at_k"].values()))
    for one, other in zip(*results):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# --- training


@pytest.mark.parametrize("layers", [("mla", "mla"), ("dsa", "csa", "mla")])
def test_it_trains_under_muon(layers):
    model = build(layers=layers).train()
    optimizer = MuonAdamW(model.named_parameters(), OptimizerConfig(), model.split_sizes())
    ids, losses = torch.randint(0, 50, (4, 40)), []
    for _ in range(8):
        aux = AuxOutputs()
        loss = F.cross_entropy(model(ids[:, :-1], aux=aux).flatten(0, 1), ids[:, 1:].flatten())
        model.zero_grad()
        (loss + (aux.loss("indexer_kl") if "dsa" in layers else 0)).backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    rules = {role.removeprefix("layers.*.attn."): rule for role, rule, *_ in optimizer.table()}
    assert rules["wkv_b.weight"] == rules["wkv_a.weight"] == "muon" and rules["kv_norm.weight"] == "adamw"
    if "dsa" in layers:
        assert rules["indexer.wk.weight"] == "muon" and rules["indexer.k_norm.bias"] == "adamw"


def test_muon_orthogonalizes_every_projection_alone():
    model = build(layers=("mla",), num_heads=2)
    sizes = model.split_sizes()
    assert sizes["layers.0.attn.wkv_b.weight"] == (8, 12, 8, 12)
    assert sizes["layers.0.attn.wkv_a.weight"] == (24, 4)
    attention = model.layers[0].attn
    keys, values = attention._key_and_value_weights()
    parts = attention.wkv_b.weight.split(sizes["layers.0.attn.wkv_b.weight"])
    assert all(torch.equal(part, own) for part, own in zip(parts, (keys[0], values[0], keys[1], values[1])))


@pytest.mark.parametrize("layers", [("mla",), ("dsa",)])
def test_bf16_autocast_is_close_to_float32(layers):
    model = build(layers=layers, index_topk=100, init_std=0.05, **EXACT).train()
    ids, gradients = torch.randint(0, 50, (2, 40)), []
    for enabled in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for name, exact in gradients[0].items():
        if "attn." in name:
            assert gradients[1][name].dtype == torch.float32
            assert (gradients[1][name] - exact).norm() < 0.05 * exact.norm(), name


def test_weights_in_bf16_decode_close_to_float32():
    model = build(layers=("mla", "dsa"), index_topk=100, init_std=0.05)
    ids = torch.randint(0, 50, (1, 30))
    with torch.inference_mode():
        exact = model(ids)
        model.cast_weights(torch.bfloat16)
        assert model.layers[1].attn.wkv_b.weight.dtype == torch.bfloat16
        assert model.layers[1].attn.indexer.weights_proj.weight.dtype == torch.float32
        cache = Cache(model.config, 1, 30)
        found = torch.cat([model(piece, cache) for piece in ids.split([20, 1, 9], dim=1)], dim=1)
    assert (found - exact).norm() < 0.03 * exact.norm()


def test_checkpoints_keep_the_options(tmp_path):
    model = build(layers=("mla", "dsa"), mixer_options={"mla": {**LATENT, "q_lora_rank": None}, "dsa": LATENT})
    checkpoint.save(model, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model")
    assert loaded.config == model.config and loaded.config.mixer_options["mla"]["q_lora_rank"] is None
    ids = torch.randint(0, 50, (1, 20))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids), model(ids))
