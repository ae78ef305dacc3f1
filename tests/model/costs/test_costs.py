"""Closed-form costs against published ratios and measured tensors, caches and matrix products."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kernels import native
from model.cache import Cache
from model.config import ModelConfig
from model.costs import (
    FP8_EQUIVALENT,
    cache_bytes,
    cache_bytes_per_token,
    costs_of,
    count_parameters,
    decode_work,
    expert_weight_bytes,
    find_ablations,
    find_crossovers,
    gqa8_costs,
    times,
    v32_costs,
    waterfall,
)
from model.optim import MuonAdamW, OptimizerConfig, rule_for
from model.transformer import Transformer
from tests.model.networks import BF16, EXACT, FP32, build

MILLION = 1 << 20
RELEASES = ("v4-flash", "v4-pro")
FLASH, PRO = (ModelConfig.from_preset(name) for name in RELEASES)


def on_meta(config):
    with torch.device("meta"):
        return Transformer(config)


def giga(account, *, kinds=None, formats=None):
    """GFLOPs of one decode step at a million tokens, limited to kinds and formats."""
    return (
        sum(
            work.flops
            for work in account.work(MILLION)
            if (kinds is None or work.kind in kinds) and (formats is None or work.format in formats)
        )
        / 1e9
    )


# --- cache


@pytest.mark.parametrize(("config", "per_token"), [(FLASH, 3514.25), (PRO, 5031.4375)])
def test_cache_bytes_per_token_are_the_published_ones(config, per_token):
    assert sum(cache_bytes_per_token(config).values()) == per_token
    assert costs_of(config).bytes_per_token == per_token
    assert v32_costs().bytes_per_token == 61 * 788 == 48_068
    assert gqa8_costs(config).bytes_per_token == 4096 * config.num_layers
    assert 0.0195 < per_token / gqa8_costs(config).bytes_per_token < 0.0205


def test_cache_is_as_much_smaller_than_v32_as_published():
    assert round(48_068 / costs_of(FLASH).bytes_per_token, 1) == 13.7
    assert 9.5 <= 48_068 / costs_of(PRO).bytes_per_token < 9.6


@pytest.mark.parametrize("tokens", [128, 4096, MILLION])
@pytest.mark.parametrize("config", [FLASH, PRO])
def test_the_closed_form_is_the_real_cache(config, tokens):
    assert Cache(config, 1, tokens, device="meta").nbytes() == cache_bytes(config, tokens)


# --- FLOPs


@pytest.mark.parametrize(
    ("account", "fp8", "bf16", "experts", "index", "core", "raw"),
    [
        (costs_of(FLASH), 8.8, 4.7, 13.0, 90.2, 23.6, 140),
        (costs_of(PRO), 37.2, 12.1, 48.4, 128.8, 76.7, 303),
        (v32_costs(), 70.8, 4.2, 0.0, 1048, 34.8, 1158),
    ],
    ids=["flash", "pro", "v3.2"],
)
def test_decode_flops_are_those_of_the_recount(account, fp8, bf16, experts, index, core, raw):
    near = lambda expected: pytest.approx(expected, abs=0.06, rel=2e-3)  # noqa: E731
    assert giga(account, kinds=["linear"], formats=["fp8"]) == near(fp8)
    assert giga(account, kinds=["linear", "residual"], formats=["bf16"]) == pytest.approx(bf16, abs=0.11)
    assert giga(account, formats=["fp4 weights"]) == near(experts)
    assert giga(account, kinds=["index"]) == near(index)
    assert giga(account, kinds=["core"]) == near(core)
    assert giga(account) == pytest.approx(raw, abs=0.5)


def test_decode_flops_are_as_much_below_v32_as_published():
    assert FP8_EQUIVALENT == {"bf16": 2.0, "fp8": 1.0, "fp4 weights": 1.0, "fp4": 0.5}
    v32 = v32_costs().equivalent(MILLION)
    assert v32 / costs_of(FLASH).equivalent(MILLION) == pytest.approx(9.68, abs=0.01)
    assert v32 / costs_of(PRO).equivalent(MILLION) == pytest.approx(3.65, abs=0.01)


@pytest.mark.parametrize("config", [FLASH, PRO, ModelConfig.from_preset("tiny"), ModelConfig.from_preset("small")])
def test_linear_flops_are_twice_the_active_matrices(config):
    """Compare the closed form with counted tensors."""
    active = 0
    for name, p in on_meta(config).named_parameters():
        if p.dim() < 2 or name.startswith(("mtp.", "embed.")) or name.endswith(".ape"):
            continue
        stack = name.endswith((".ffn.w1", ".ffn.w2", ".ffn.w3"))
        active += p.numel() // config.num_experts * config.experts_per_token if stack else p.numel()
    work = decode_work(config, 1000)
    linear = sum(w.flops for w in work if w.kind == "linear" or w.part == "hyper-connections: weights")
    assert linear == 2 * active


@pytest.mark.parametrize("tokens", [13, 24, 50])
@pytest.mark.parametrize(
    ("layers", "changes"),
    [
        (("sliding",), {}),
        (("csa",), {}),
        (("hca",), {}),
        (("gqa",), {}),
        (("sliding", "csa", "hca", "csa"), {}),
        (("gqa", "csa"), {"hyper_connections": False}),
        (("hca", "csa"), {"ffn": "dense", **EXACT}),
    ],
)
def test_decode_flops_are_those_of_the_real_matrix_products(layers, changes, tokens, monkeypatch):
    """Count a decode step with torch's counter, which does not see native operators. The window is full because the
    reference implementation pads it."""
    monkeypatch.setattr(native, "level", lambda: None)
    model = build(layers=layers, num_hash_layers=0, **changes)
    c = model.config
    ids = torch.randint(c.vocab_size, (1, tokens))
    cache = Cache(c, 1, tokens)
    with torch.inference_mode():
        model(ids[:, :-1], cache)
        # The counter does not see fused attention on a CPU.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(ids[:, -1:], cache)
    rotated = c.index_heads + (tokens % c.csa_ratio == 0)  # queries, and a key if one is completed
    uncounted = layers.count("csa") * 2 * c.index_head_dim**2 * rotated  # Hadamard rotations
    if c.hyper_connections:  # adding a block's output to the streams is not a product
        uncounted -= 2 * 2 * c.num_layers * c.hc_mult * c.hidden_size
    counted = sum(w.flops for w in decode_work(c, tokens))
    assert counter.get_total_flops() == counted + uncounted


@pytest.mark.parametrize("tokens", [1, 3, 4, 127, 128, 129, 2047, 2048, 100_000])
def test_attention_reaches_what_causality_lets_it_see(tokens):
    parts = {w.part: w.flops for w in decode_work(FLASH, tokens)}
    per_key, window = 4 * 64 * 512, min(tokens, 128)
    assert parts.get("index scores", 0) == 21 * 2 * 64 * 128 * (tokens // 4)
    assert parts["core attention, csa"] == 21 * per_key * (min(512, tokens // 4) + window)
    assert parts["core attention, hca"] == 20 * per_key * (tokens // 128 + window)
    assert parts["core attention, sliding"] == 2 * per_key * window


def test_formats_follow_the_configuration():
    def formats(config):
        return {w.part: w.format for w in decode_work(config, MILLION)}

    assert formats(FLASH)["index scores"] == "fp4" and formats(FLASH)["routed experts"] == "fp4 weights"
    assert formats(FLASH.replace(index_format="fp8"))["index scores"] == "fp8"
    for fmt in ("bf16", "fp32"):
        assert formats(FLASH.replace(index_format=fmt))["index scores"] == "bf16"
    assert formats(FLASH.replace(qat=False))["routed experts"] == "fp8"
    assert {w.format for w in gqa8_costs(FLASH).work(MILLION)} == {"bf16"}


# --- parameters


@pytest.mark.parametrize(
    ("config", "total", "active", "mtp"), [(FLASH, 284.33, 13.27, 6.61), (PRO, 1573.0, 48.85, 25.84)]
)
def test_parameters_counted_from_the_tensors_round_to_the_published(config, total, active, mtp):
    model = on_meta(config)
    count = count_parameters(model)
    assert count.total / 1e9 == pytest.approx(total, abs=0.005)
    assert count.active / 1e9 == pytest.approx(active, abs=0.005)
    assert count.mtp / 1e9 == pytest.approx(mtp, abs=0.005)
    assert count.total + count.mtp == model.num_parameters()
    published = {43: ("284B", "13B"), 61: ("1.6T", "49B")}[config.num_layers]
    said = f"{count.total / 1e9:.0f}B" if count.total < 1e12 else f"{count.total / 1e12:.1f}T"
    assert (said, f"{count.active / 1e9:.0f}B") == published
    embedding = count.components["embedding"]
    assert embedding == (config.vocab_size * config.hidden_size, 0)
    assert count.components["head"] == (embedding[0], embedding[0])


def test_a_dense_baseline_is_all_active_but_its_embedding():
    config = ModelConfig(ffn="dense", layers=("gqa",) * 2, hyper_connections=False)
    count = count_parameters(on_meta(config))
    assert count.total - count.active == config.vocab_size * config.hidden_size and count.mtp == 0
    assert set(count.components) == {"embedding", "head", "norms", "attention", "feed-forward"}


# --- ablations and waterfall


def choices_of(config, muon=True):
    model = on_meta(config)
    moved = sum(p.numel() for n, p in model.named_parameters() if rule_for(n, p, "muon") == "muon")
    return {choice.name: choice for choice in find_ablations(config, count_parameters(model), moved, muon)}


def test_each_choice_taken_away():
    found, own = choices_of(FLASH), costs_of(FLASH)
    assert all(choice.used for choice in found.values()) and len(found) == 5
    sizes = {name: choice.costs.bytes_per_token for name, choice in found.items()}
    assert sizes == {
        "hybrid attention": 43 * 4096,
        "precision per role": 6880.0,
        "Muon": 3514.25,
        "hyper-connections": 3514.25,
        "FP4 quantization-aware training": 3514.25,
    }
    less = {name: own.flops(MILLION) - choice.costs.flops(MILLION) for name, choice in found.items()}
    assert less["Muon"] == less["FP4 quantization-aware training"] == less["precision per role"] == 0
    assert less["hyper-connections"] == giga(own, kinds=["residual"]) * 1e9
    changes = {change.what: change for choice in found.values() for change in choice.changes}
    assert changes["residual stream"].with_choice == 4 * changes["residual stream"].without == 4 * 4096 * 4
    assert changes["cache, if index keys must then stay FP8"].without == 3850.25
    experts = 43 * 256 * 3 * 4096 * 2048
    assert changes["routed experts' weights"].with_choice == expert_weight_bytes(experts, True) == experts * 17 / 32


def test_the_optimizer_state_is_what_the_optimizer_holds():
    config = ModelConfig.from_preset("tiny")
    model = Transformer(config)
    (change,) = choices_of(config)["Muon"].changes
    for rule, expected in (("muon", change.with_choice), ("adamw", change.without)):
        optimizer = MuonAdamW(model.named_parameters(), OptimizerConfig(rule=rule))
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        held = [t for name, t in optimizer.state_tensors().items() if not name.endswith("/steps")]
        assert sum(t.numel() * t.element_size() for t in held) == expected


def test_a_baseline_has_nothing_to_take_away():
    config = ModelConfig(layers=("gqa",) * 4, hyper_connections=False, qat=False)
    found = choices_of(config, muon=False).values()
    assert not any(choice.used or choice.changes for choice in found)
    assert {choice.costs.bytes_per_token for choice in found} == {2048.0}
    assert [step.name for step in waterfall(config, muon=False)] == ["GQA-8, BF16", "the model's own gqa layers"]


@pytest.mark.parametrize("changes", [{}, BF16, FP32, {"kv_format": "fp4", "index_format": "fp8"}])
@pytest.mark.parametrize("name", ["tiny", "small", "base", *RELEASES])
def test_the_waterfalls_factors_multiply_to_the_whole_ratio(name, changes):
    config = ModelConfig.from_preset(name, **changes)
    steps = waterfall(config)
    own = sum(cache_bytes_per_token(config).values())
    assert steps[0].bytes_per_token == 4096 * config.num_layers and steps[-1].bytes_per_token == own
    product = math.prod(step.factor for step in steps[1:])
    assert product == pytest.approx(steps[0].bytes_per_token / own, rel=1e-12)


@pytest.mark.parametrize("fmt", ["fp8", "fp4"])
def test_a_packed_baseline_is_a_precision_per_role(fmt):
    config = ModelConfig.from_preset("tiny", layers=("gqa", "csa", "gqa"), gqa_format=fmt)
    choice = choices_of(config)["precision per role"]
    plain = sum(cache_bytes_per_token(config.replace(**BF16)).values())
    assert choice.used and choice.costs.bytes_per_token == plain
    # Without hybrid attention, keys and values are BF16 even if the model's gqa layers use another format.
    assert choices_of(config)["hybrid attention"].costs.bytes_per_token == 3 * 4096
    steps = {step.name: step for step in waterfall(config)}
    own = sum(cache_bytes_per_token(config).values())
    assert steps[f"gqa layers in {fmt.upper()}"].bytes_per_token == own
    assert math.prod(step.factor for step in list(steps.values())[1:]) == pytest.approx(3 * 4096 / own)
    assert not choices_of(config.replace(layers=("gqa",), gqa_format="fp32"))["precision per role"].used


def test_the_waterfall_of_flash():
    sizes = [step.bytes_per_token for step in waterfall(FLASH)]
    assert sizes == [176_128, 44_032, 41_984, 5536, 6880, 4501.25, 3514.25, 3514.25, 3514.25, 3514.25]
    assert [step.factor for step in waterfall(FLASH)][-3:] == [1, 1, 1]


def test_a_model_of_windows_only_has_no_ratio():
    steps = waterfall(ModelConfig(layers=("sliding",) * 2, num_hash_layers=0))
    assert steps[-1].bytes_per_token == 0 and steps[-1].factor is None
    assert times(1.0, 0.0) is None


# --- crossovers


@pytest.mark.parametrize("name", ["tiny", "small", *RELEASES])
def test_regimes_part_where_they_are_said_to(name):
    config = ModelConfig.from_preset(name)
    own, page = costs_of(config), config.page_tokens
    found = {regime.key: regime for regime in find_crossovers(config, (v32_costs(), gqa8_costs(config)))}

    def cost(n, *kinds, weighted):
        return sum(w.equivalent if weighted else w.flops for w in own.work(n) if w.kind in kinds)

    for key, rising, passed in (
        ("index", ["index"], ["core"]),
        ("attention", ["index", "core"], ["linear", "residual"]),
    ):
        for n, weighted in ((found[key].tokens, False), (found[key].tokens_equivalent, True)):
            if n is not None:
                assert cost(n, *rising, weighted=weighted) >= cost(n, *passed, weighted=weighted)
                assert cost(n - page, *rising, weighted=weighted) < cost(n - page, *passed, weighted=weighted)
    n = found["fixed"].tokens
    growing, fixed = own.bytes_per_token, sum(own.fixed.values())
    assert growing * (n - 1) < fixed <= growing * n
    assert found["topk"].tokens == (config.index_topk + 1) * config.csa_ratio


def test_the_releases_regimes():
    flash, pro = ({r.key: r for r in find_crossovers(config)} for config in (FLASH, PRO))
    # "About 32K and 256K": Flash's raw FLOPs, at 31.75K and 224K.
    assert (flash["index"].tokens, flash["attention"].tokens) == (32_512, 229_376)
    assert (pro["index"].tokens, pro["attention"].tokens) == (170_112, 470_272)
    # In FP8 equivalents Pro's indexer grows more slowly than its core attention, so it never passes it.
    assert pro["index"].tokens_equivalent is None
