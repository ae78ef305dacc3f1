"""The full network: causality, equality with and without a cache, switches, gradients."""

import itertools
from typing import get_args

import pytest
import torch

from kernels.cache_io import pack, unpack
from model.cache import Cache
from model.config import CACHE_FORMATS, CacheFormat, ModelConfig
from model.costs import cache_bytes, cache_bytes_per_token, fixed_state_bytes
from model.errors import CacheError, ConfigError
from model.forward.aux_outputs import AuxOutputs
from model.forward.context import Context
from model.generation import prefill
from model.mixers.gqa import GroupedQueryAttention
from model.precision import Precision
from tests.model.networks import BF16, EXACT, LATENT, SMALL, build, stored_rows

SCHEDULES = {
    "hybrid": ("sliding", "csa", "hca", "csa"),
    "sliding": ("sliding",),
    "csa": ("csa",),
    "hca": ("hca",),
    "gqa": ("gqa", "gqa"),
    "mamba2": ("mamba2", "csa", "mamba2"),
    "kda": ("kda", "csa", "kda"),
    "mla": ("mla", "mla"),
    "dsa": ("dsa", "dsa"),
    "every mixer": ("mla", "csa", "dsa", "hca", "gqa"),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize("rounded", [False, True])
def test_a_later_token_never_moves_an_earlier_output(schedule, attention, rounded):
    model = build(layers=SCHEDULES[schedule], **({} if rounded else EXACT))
    ids = torch.randint(0, 50, (1, 60))
    with torch.inference_mode():
        before = model(ids, attention=attention)
        for place in (1, 3, 4, 11, 12, 23, 35, 47, 59):
            changed = ids.clone()
            changed[0, place] = (changed[0, place] + 7) % 50
            after = model(changed, attention=attention)
            bound = 1e-2 if rounded else 1e-5
            torch.testing.assert_close(after[:, :place], before[:, :place], rtol=0, atol=bound)
            assert (after[:, place] - before[:, place]).abs().max() > 1e-3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_length_decodes_from_the_cache_like_the_full_forward(schedule):
    # Without quantization, so the tolerance can be tight.
    model = build(layers=SCHEDULES[schedule], **EXACT)
    ids = torch.randint(0, 50, (2, 75))
    with torch.inference_mode():
        full = model(ids)
        cache = Cache(model.config, 2, 75)
        steps = [model(ids[:, t : t + 1], cache) for t in range(75)]
    torch.testing.assert_close(torch.cat(steps, 1), full, rtol=0, atol=2e-4)


@pytest.mark.parametrize("rounded", [False, True])
def test_prefill_may_be_cut_anywhere(rounded):
    model = build(**({} if rounded else EXACT))
    ids = torch.randint(0, 50, (1, 40))
    with torch.inference_mode():
        full = model(ids)
        for cut in range(1, 40):
            cache = Cache(model.config, 1, 40)
            logits = torch.cat((model(ids[:, :cut], cache), model(ids[:, cut:], cache)), 1)
            # With quantization, matmuls of another shape may rarely round to the next code.
            close = ((logits - full).abs().amax(-1) < 2e-4).float().mean()
            assert close > 0.9 if rounded else close == 1, cut


def test_generation_prefill_matches_in_any_chunk():
    model = build(**EXACT)
    ids = torch.randint(0, 50, (1, 33))
    with torch.inference_mode():
        last = model(ids)[:, -1]
    for chunk in (1, 5, 32, 33, 100):
        torch.testing.assert_close(prefill(model, Cache(model.config, 1, 40), ids, chunk), last, rtol=0, atol=2e-4)


def test_training_forward_equals_inference_forward_with_qat():
    model = build(qat=True)
    ids = torch.randint(0, 50, (2, 40))
    with torch.no_grad():
        assert torch.equal(model.train()(ids), model.eval()(ids))
        model = build(qat=False)
        assert not torch.equal(model.train()(ids), model.eval()(ids))


FORMATS = get_args(CacheFormat)
KV = [{"kv_format": body, "rope_format": rope} for body in FORMATS for rope in ("bf16", "fp32")]
STORED = [
    *(("sliding", formats) for formats in KV),
    *(("hca", formats) for formats in KV),
    *(("csa", {**formats, "index_format": index}) for formats in KV for index in FORMATS),
    *(("gqa", {"gqa_format": each}) for each in FORMATS),
    *(("mla", formats) for formats in KV),
    *(("dsa", {**formats, "index_format": index}) for formats in KV for index in FORMATS),
]


@pytest.mark.parametrize(("mixer", "formats"), STORED)
def test_cached_values_are_the_training_forwards_bit_for_bit(mixer, formats):
    # Key-value heads of 40 dims and latents of 152 end within a block.
    latent = {"mixer_options": {name: {**LATENT, "kv_lora_rank": 152} for name in ("mla", "dsa")}}
    model = build(layers=(mixer,), head_dim=40, index_head_dim=64, **latent, **formats)
    ids = torch.randint(0, 50, (1, 72))
    attn = model.layers[0].attn
    precision = attn.precision
    seen = {"main": [], "index": [], "gqa": [], "mla": []}

    original = precision.round_to

    def spy(x, role, layout, training, aux=None):
        out = original(x, role, layout, training, aux)
        seen[role].append(out.detach())
        assert (out is x or torch.equal(out, x)) == (not changes(role)), role
        return out

    def changes(role):
        main = ("kv_format", "rope_format")
        fields = {"main": main, "mla": main, "index": ("index_format",), "gqa": ("gqa_format",)}[role]
        return any(getattr(model.config, field) != "fp32" for field in fields)

    def spy_on_pooling(compressor, role):
        pool = compressor.pool

        def pooled(rows, context, layout):
            out = pool(rows, context, layout)
            seen[role].append(out)
            assert torch.equal(out, pool(rows, context, None)) == (not changes(role)), role
            return out

        compressor.pool = pooled

    precision.round_to = spy
    if mixer in ("csa", "hca"):
        spy_on_pooling(attn.compressor, "main")
    if mixer == "csa":
        spy_on_pooling(attn.indexer.compressor, "index")
    with torch.no_grad():
        model.train()(ids)
        del precision.round_to
        cache = Cache(model.config, 1, 80)
        model.eval()(ids, cache)
    layer = cache.layers[0]

    def stored(entries):
        return unpack(stored_rows(entries), entries.layout)

    if mixer in ("csa", "dsa"):
        queries, keys = seen["index"]
        assert queries.dim() == 4 and torch.equal(stored(layer.index), keys)
    if mixer == "gqa":
        assert torch.equal(stored(layer.entries), seen["gqa"][0])
        return
    if mixer in ("mla", "dsa"):
        assert torch.equal(stored(layer.latents), seen["mla"][0])
        return
    window = model.config.window
    kept = unpack(layer.window.read(window), layer.window.part.layout)
    assert torch.equal(kept, seen["main"][0][:, -window:])
    if mixer != "sliding":
        assert torch.equal(stored(layer.entries), seen["main"][1])


@pytest.mark.parametrize("body", [8, 40, 64, 96])
def test_every_layout_stores_what_training_rounds_to(body):
    for formats in itertools.product(FORMATS, ("bf16", "fp32"), FORMATS, FORMATS):
        sizes = {"head_dim": body + 8, "index_head_dim": 128, "layers": ("csa", "gqa")}
        config = ModelConfig(**{**SMALL, **sizes, **dict(zip(CACHE_FORMATS, formats))})
        precision = Precision(config)
        layouts = {
            "main": precision.main_layout,
            "index": precision.index_layout,
            "gqa": GroupedQueryAttention.layout(config),
        }
        for role in ("main", "index", "gqa"):
            layout = layouts[role]
            x = torch.randn(3, layout.size) * torch.logspace(-3, 2, layout.size)  # different scales
            rounded = precision.round_to(x, role, layout, training=True)
            rows = pack(x, layout)
            assert rows.shape == (3, layout.nbytes)
            assert torch.equal(unpack(rows, layout), rounded), (formats, role)
            for row in range(3):  # rows at different offsets
                assert torch.equal(unpack(rows[row : row + 1], layout), rounded[row : row + 1]), (formats, role)


INDEXED = [("sliding", "csa", "hca", "csa"), ("dsa", "dsa"), ("csa", "dsa")]


@pytest.mark.parametrize("layers", INDEXED)
def test_one_softmax_over_fewer_entries_than_topk_is_dense(layers):
    model = build(layers=layers, index_topk=100)
    ids = torch.randint(0, 50, (1, 60))
    with torch.inference_mode():
        torch.testing.assert_close(model(ids, attention="sparse"), model(ids, attention="dense"))
        sparse = build(layers=layers, index_topk=2)
        assert not torch.allclose(sparse(ids, attention="sparse"), sparse(ids, attention="dense"), atol=1e-3)


@pytest.mark.parametrize("layers", INDEXED)
def test_the_indexer_learns_from_its_own_loss_only(layers):
    model = build(layers=layers).train()
    ids = torch.randint(0, 50, (2, 60))
    aux = AuxOutputs()
    logits = model(ids, attention="sparse", aux=aux)
    indexer = {n: p for n, p in model.named_parameters() if ".indexer." in n}
    others = {n: p for n, p in model.named_parameters() if ".indexer." not in n}
    logits.square().mean().backward(retain_graph=True)
    assert all(p.grad is None for p in indexer.values())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in others.values())
    model.zero_grad()
    aux.loss("indexer_kl").backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in indexer.values())
    assert all(p.grad is None for p in others.values())


@pytest.mark.parametrize("mixer", ["csa", "dsa"])
def test_the_indexer_can_fit_its_teacher(mixer):
    model = build(layers=(mixer,), qat=False).train()
    ids = torch.randint(0, 50, (4, 60))
    optimizer = torch.optim.AdamW(model.indexer_parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        aux = AuxOutputs(measure_selection=True)
        model(ids, attention="dense", aux=aux)
        loss = aux.loss("indexer_kl")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(aux.by_layer(("indexer_kl", "recall_at_k", "recall_at_k_of_best")))
    assert losses[-1]["indexer_kl"] < 0.5 * losses[0]["indexer_kl"]
    assert losses[-1]["recall_at_k_of_best"] > losses[0]["recall_at_k_of_best"]
    assert all(0 <= m["recall_at_k"] <= m["recall_at_k_of_best"] <= 1 + 1e-6 for m in losses)


SWITCHES = {
    "attention": {"layers": ("gqa",) * 4},
    "precision": {"kv_format": "bf16", "index_format": "bf16"},
    "hyper-connections": {"hyper_connections": False},
    "qat": {"qat": False},
    "experts": {"ffn": "dense"},
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_component_can_be_switched_off_alone(switch):
    full, without = build(), build(**SWITCHES[switch])
    ids = torch.randint(0, 50, (1, 40))
    with torch.no_grad():
        assert not torch.allclose(full.train()(ids), without.train()(ids), atol=1e-4)
    logits = without(ids)
    logits.square().mean().backward()
    assert logits.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 11, 12, 13, 96, 500])
@pytest.mark.parametrize("layers", SCHEDULES.values())
@pytest.mark.parametrize("formats", [{}, BF16, {"kv_format": "fp4", "index_format": "fp8", "gqa_format": "fp8"}])
def test_cache_bytes_are_the_closed_form(tokens, layers, formats):
    config = ModelConfig(**{**SMALL, "layers": layers, **formats})
    cache = Cache(config, 3, tokens)
    page = config.page_tokens
    rounded = -(-tokens // page) * page
    assert cache.nbytes() == pytest.approx(3 * cache_bytes(config, rounded), rel=1e-12)
    for component, size in fixed_state_bytes(config).items():
        assert cache.nbytes(component) == 3 * size
    assert sum(map(cache.nbytes, cache.components)) == cache.nbytes()


def test_released_bytes_per_token():
    released = {
        "num_heads": 64,
        "head_dim": 512,
        "rope_head_dim": 64,
        "index_head_dim": 128,
        "hca_ratio": 128,
        "o_groups": 8,
    }
    flash = ModelConfig(layers=("sliding", "sliding", *("csa", "hca") * 20, "csa"), **released)
    pro = ModelConfig(layers=("hca", "hca", *("csa", "hca") * 29, "csa"), **released)
    assert sum(cache_bytes_per_token(flash).values()) == 3514.25
    assert sum(cache_bytes_per_token(pro).values()) == 5031.4375


def test_tiny_cache_agrees_with_the_closed_form_at_64k():
    config = ModelConfig.from_preset("tiny")
    measured = Cache(config, 1, 65_536).bytes_per_token()
    assert abs(measured / sum(cache_bytes_per_token(config).values()) - 1) < 0.02


def test_cache_refuses_what_does_not_fit_and_stays_as_it_was():
    model = build()
    cache = Cache(model.config, 1, 10)
    ids = torch.randint(0, 50, (1, 8))
    with torch.inference_mode():
        model(ids, cache)
        before = cache.fork()
        with pytest.raises(CacheError, match="3 more tokens do not fit: the cache holds 8 of at most 10"):
            model(ids[:, :3], cache)
        with pytest.raises(CacheError, match="cannot truncate from 8 to 5"):
            cache.truncate(5)
        assert torch.equal(model(ids[:, :2], cache), model(ids[:, :2], before))
    with pytest.raises(CacheError, match="max_positions of 512"):
        Cache(model.config, 1, 513)
    cache.truncate(0)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids, cache), model(ids), rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ("csa", "lstm")}, "'lstm' is not one of"),
        ({"layers": ({},)}, "layers: {} is not one of"),
        ({"num_heads": 3}, "3 heads do not divide into o_groups 2"),
        ({"index_head_dim": 24}, "power of two"),
        ({"experts_per_token": 9}, "exceeds num_experts"),
        ({"window": 0}, "window: must be at least 1"),
        ({"kv_format": "fp2"}, "kv_format: 'fp2' is not one of fp4, fp8, fp8_128, bf16, fp32"),
        ({"rope_format": "fp8"}, "rope_format: 'fp8' is not one of bf16, fp32"),
        ({"head_dim": 18, "kv_format": "fp4"}, "10 unrotated dims in kv_format fp4 end .* expected a multiple of 4"),
        ({"head_dim": 18, "rope_format": "fp32"}, "10 unrotated dims in kv_format fp8 end .* expected a multiple of 4"),
        ({"head_dim": 20, "kv_format": "fp4", "rope_format": "fp32"}, "12 .* in rope_format fp32 .* a multiple of 8"),
        ({"head_dim": "wide"}, "expected a whole number, found 'wide'"),
        ({"csa_ratio": True}, "expected a whole number, found true"),
        ({"num_hash_layers": 9}, "does not fit a schedule of 4 layers"),
        ({"init_std": float("nan")}, "expected a finite number, found .nan"),
    ],
)
def test_bad_configurations_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{**SMALL, **change})
    with pytest.raises(ConfigError, match="did you mean 'index_topk'"):
        ModelConfig.from_dict({"index_topkk": 3})


def test_routers_compressors_and_residuals_stay_float32_under_autocast():
    model = build().train()
    block = model.layers[1]
    streams, x = torch.randn(2, 24, 4, 32), torch.randn(2, 24, 32)
    compressor, context = block.attn.compressor, Context(torch.arange(24).unsqueeze(0), {})

    def connected():
        y, mixing = block.attn_residual.enter(streams, block.attn_norm)
        return block.attn_residual.leave(streams, mixing, torch.zeros_like(y))

    parts = {
        "hyper-connection": connected,
        "hyper head": lambda: model.hyper_head(streams),
        "compressor": lambda: compressor.pool(compressor.project(x), context, None),
    }
    for name, part in parts.items():
        expected = part()
        with torch.autocast("cpu", torch.bfloat16):
            found = part()
        assert found.dtype == torch.float32 and torch.equal(found, expected), name
    with torch.autocast("cpu", torch.bfloat16):
        assert block.attn.wq_a(x).dtype == torch.bfloat16
        assert model(torch.randint(0, 50, (1, 24))).dtype == torch.float32


def test_bf16_weights_halve_all_but_full_precision_matrices():
    model = build().eval()
    exact = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    experts = [m.stored_experts() for m in model.moe_layers()]
    ids = torch.randint(0, SMALL["vocab_size"], (1, 40))
    with pytest.raises(ValueError, match=r"cast_weights: expected a floating-point type, found torch\.int8"):
        model.cast_weights(torch.int8)
    with torch.inference_mode():
        before = model(ids)
        model.cast_weights(torch.bfloat16)
        after = model(ids)
        cache = Cache(model.config, 1, 40)
        decoded = torch.cat([model(token, cache) for token in ids.split(1, dim=1)], dim=1)
    narrow = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.bfloat16}
    kept = [name for name in exact if name not in narrow]
    assert all(torch.equal(model.state_dict()[name], exact[name]) for name in kept)
    for part in ("router", "compressor", "weights_proj", "hyper_head", "norm", "_residual", "embed", "sink"):
        assert not any(part in name for name in narrow)
    assert {"layers.0.attn.wo_a", "layers.0.attn.wq_a.weight", "layers.0.ffn.shared.w2.weight"} <= narrow
    # FP4 experts are exact in BF16 and are not stored twice.
    for module, stacks in zip(model.moe_layers(), experts):
        with torch.inference_mode():
            stored = module.stored_experts()
        assert all(torch.equal(a.float(), b) for a, b in zip(stored, stacks))
        assert stored[0] is module.w1 and module.w1.dtype == torch.bfloat16
    assert not torch.equal(after, before)
    for logits in (after, decoded):
        assert (logits - before).abs().mean() < 0.1 * before.abs().mean()
