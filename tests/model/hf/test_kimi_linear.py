"""Kimi Linear checkpoints to and from transformers."""

import json

import pytest
import torch
import transformers
from transformers import KimiLinearConfig, KimiLinearForCausalLM

from benchmarks.lib.family_networks import CONFIGURATIONS, F, K, draw, randomize
from model.config import ModelConfig
from model.costs import count_parameters
from model.errors import CheckpointError, ConfigError
from model.hf import export_pretrained, import_pretrained, read_pretrained_config
from model.transformer import Transformer
from tests.model.hf.family_parity import (
    assert_equal_logits,
    assert_same_folder,
    change_config,
    change_tensors,
    load_oracle,
    meta_network,
    tensors_of,
)
from tests.model.networks import FP32

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

OURS = {
    "vocab_size": 50,
    "hidden_size": 32,
    "hyper_connections": False,
    "num_hash_layers": 0,
    "scoring_func": "sigmoid",
    "swiglu_limit": 0.0,
    "num_experts": 4,
    "expert_size": 32,
    "layers": ("kda", "mla", "kda"),
    "first_k_dense_replace": 1,
    "max_positions": 128,
    "mixer_options": {"mla": {"rope": False, "q_lora_rank": None}, "kda": {"head_dim": 16}},
}


@pytest.fixture
def folder(tmp_path):
    draw("kimi_linear").save_pretrained(tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize("changes", CONFIGURATIONS["kimi_linear"].values(), ids=CONFIGURATIONS["kimi_linear"])
def test_a_network_of_transformers_is_read_and_written_back(tmp_path, changes):
    oracle = draw("kimi_linear", **changes)
    oracle.save_pretrained(tmp_path / "a", max_shard_size="200KB")
    types = oracle.config.layer_types
    unused = (("linear_",) if K not in types else ()) + (
        ("kv_lora_rank", "qk_", "v_head_dim", "head_dim") if F not in types else ()
    )
    ours = assert_same_folder(KimiLinearForCausalLM, oracle, tmp_path / "a", tmp_path, unused)
    assert_equal_logits(ours, oracle, torch.randint(0, 50, (2, 40)))


def test_the_names_written_are_the_released_ones(folder, tmp_path):
    export_pretrained(import_pretrained(folder), tmp_path / "b")
    names = tensors_of(tmp_path / "b").keys()
    for name in (
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.0.self_attn.q_conv1d.weight",
        "model.layers.0.self_attn.f_a_proj.weight",
        "model.layers.0.self_attn.A_log",
        "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
        "model.layers.1.block_sparse_moe.experts.7.w2.weight",
        "model.layers.1.block_sparse_moe.gate.e_score_correction_bias",
        "model.layers.1.block_sparse_moe.shared_experts.down_proj.weight",
    ):
        assert name in names
    assert tensors_of(tmp_path / "b")["model.layers.0.self_attn.A_log"].shape == (1, 1, 3, 1)


def test_the_names_of_the_modules_are_read(folder, tmp_path):
    draw("kimi_linear").save_pretrained(tmp_path / "modules", save_original_format=False)
    assert "model.layers.0.self_attn.forget_gate.A_log" in tensors_of(tmp_path / "modules")
    stacked, single = (import_pretrained(path).state_dict() for path in (tmp_path / "modules", folder))
    assert all(torch.equal(tensor, single[name]) for name, tensor in stacked.items())


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"layers": ("mla",) * 3, "ffn": "dense", "first_k_dense_replace": 0},
        {"layers": ("kda",) * 3, "mixer_options": {"kda": {"num_heads": 3, "head_dim": 8, "state_format": "bf16"}}},
        {"qat": True, "kv_format": "fp8_128", "num_shared_experts": 2},
    ],
)
def test_a_network_of_ours_is_read_by_transformers_and_back(tmp_path, overrides):
    model = randomize(Transformer(ModelConfig(**{**OURS, "qat": False, **overrides})))
    export_pretrained(model, tmp_path / "a")
    oracle = load_oracle(KimiLinearForCausalLM, tmp_path / "a")
    again = import_pretrained(tmp_path / "a")
    options = {name: dict(values) for name, values in again.config.mixer_options.items()}
    exact = {name: {**values, "state_format": "fp32"} if name == "kda" else values for name, values in options.items()}
    exact = import_pretrained(tmp_path / "a", mixer_options=exact, **FP32)
    assert_equal_logits(exact, oracle, torch.randint(0, 50, (1, 20)))
    if "kda" in options:
        given = model.config.mixer_options["kda"]["num_heads"]
        assert options["kda"]["num_heads"] == (2 if given is None else given)
        options["kda"]["num_heads"] = given
    assert again.config.replace(mixer_options=options) == model.config
    rounded = {name for name, _ in model.named_parameters() if model.config.qat and name.endswith(("w1", "w2", "w3"))}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]) is (name not in rounded), name


def released_config(**changes):
    """The published configuration of Kimi-Linear-48B-A3B-Instruct."""
    full = [4, 8, 12, 16, 20, 24, 27]
    content = {
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "dtype": "bfloat16",
        "first_k_dense_replace": 1,
        "head_dim": 72,
        "hidden_act": "silu",
        "hidden_size": 2304,
        "initializer_range": 0.02,
        "intermediate_size": 9216,
        "kv_lora_rank": 512,
        "linear_attn_config": {
            "full_attn_layers": full,
            "head_dim": 128,
            "kda_layers": [n for n in range(1, 28) if n not in full],
            "num_heads": 32,
            "short_conv_kernel_size": 4,
        },
        "mla_use_nope": True,
        "model_max_length": 1048576,
        "moe_intermediate_size": 1024,
        "moe_layer_freq": 1,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "num_attention_heads": 32,
        "num_expert_group": 1,
        "num_experts": 256,
        "num_experts_per_token": 8,
        "num_hidden_layers": 27,
        "num_key_value_heads": 32,
        "num_nextn_predict_layers": 0,
        "num_shared_experts": 1,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "routed_scaling_factor": 2.446,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "use_grouped_topk": True,
        "v_head_dim": 128,
        "vocab_size": 163840,
    }
    return {**content, **changes}


def write_config(folder, content):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_the_released_configuration_is_read_as_transformers_reads_it(tmp_path):
    theirs = json.loads(KimiLinearConfig(**released_config()).to_json_string(use_diff=False))
    config = read_pretrained_config(write_config(tmp_path / "ours", released_config()))
    assert config == read_pretrained_config(write_config(tmp_path / "theirs", theirs))
    assert [n for n, name in enumerate(config.layers, start=1) if name == "mla"] == [4, 8, 12, 16, 20, 24, 27]
    assert config.layers.count("kda") == 20
    assert config.ffn_kinds == ["dense"] + ["moe"] * 26
    assert config.replace(kv_format="bf16", qat=False) == ModelConfig.from_preset("kimi-linear-48b-a3b")
    counted = count_parameters(meta_network(config))
    assert (round(counted.total / 1e9), round(counted.active / 1e9)) == (49, 3)  # published: 48B, 3B active
    assert config.mixer_options["mla"] | {"rope": False, "q_lora_rank": None} == config.mixer_options["mla"]
    assert config.mixer_options["kda"] | {"num_heads": 32, "head_dim": 128} == config.mixer_options["kda"]


LISTS = {"full_attn_layers": [2], "kda_layers": [1, 3], "head_dim": 16, "num_heads": 3, "short_conv_kernel_size": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mla_use_nope": False}, "'mla_use_nope': expected true, found false"),
        ({"moe_renormalize": False}, "'moe_renormalize': expected true, found false"),
        ({"moe_router_activation_func": "softmax"}, 'moe_router_activation_func.: expected "sigmoid"'),
        ({"quantization_config": {"quant_method": "fp8"}}, "'quantization_config': quantized weights"),
        ({"layer_types": None}, "keys 'layer_types' and 'linear_attn_config' are both missing"),
        ({"linear_attn_config": {**LISTS, "kda_layers": [1]}}, "lists layer 3 of 3 neither as full nor as kda"),
        ({"linear_attn_config": {**LISTS, "kda_layers": [1, 2, 3]}}, "kda_layers': lists layer 2 a second time"),
        ({"linear_attn_config": {**LISTS, "kda_layers": [0, 2]}}, r"a list of layers from 1 to 3, found \[0, 2\]"),
        ({"linear_attn_config": {**LISTS, "head_dim": "16"}}, "'linear_attn_config.head_dim': expected a whole number"),
        ({"linear_head_dim": 0}, "key 'linear_head_dim': expected a whole number of at least 1"),
        ({"linear_head_dim": 8}, r"has shape .* by .*'linear_head_dim' 8.* of config.json"),
        ({"kv_lora_rank": 48}, r"has shape .* by .*'kv_lora_rank' 48.* of config.json"),
        ({"num_experts": 4}, r"has shape .* by 'num_experts' 4 of config.json|is not part of this model"),
    ],
)
def test_what_does_not_fit_is_named(folder, changes, message):
    if "linear_attn_config" in changes:
        changes = {**changes, "layer_types": None}
    change_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        import_pretrained(folder)
    assert "\n" not in str(error.value)


def test_one_missing_piece_of_a_projection_is_named(folder):
    missing = "model.layers.0.self_attn.k_proj.weight"
    change_tensors(folder, lambda tensors: {name: t for name, t in tensors.items() if name != missing})
    with pytest.raises(CheckpointError, match=rf"'{missing}' is missing, expected shape \[48, 64\]"):
        import_pretrained(folder)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layers": ("kda", "csa", "kda")}, "layers: no checkpoint format has layers of kda, csa together"),
        ({"mixer_options": {"mla": {"rope": True}}}, "mixer_options.mla.rope: .* needs false, found true"),
        ({"num_shared_experts": 0}, "num_shared_experts: a Kimi Linear checkpoint needs at least 1"),
    ],
)
def test_networks_that_the_format_cannot_describe_are_refused(tmp_path, overrides, message):
    options = {"mixer_options": {**OURS["mixer_options"], **overrides.get("mixer_options", {})}}
    with pytest.raises(ConfigError, match=message):
        export_pretrained(Transformer(ModelConfig(**{**OURS, **overrides, **options})), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
