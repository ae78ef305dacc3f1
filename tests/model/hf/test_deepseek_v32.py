"""DeepSeek-V3.2 checkpoints to and from transformers."""

import json

import pytest
import torch
import transformers
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

from benchmarks.lib.family_networks import CONFIGURATIONS, YARN, draw, randomize
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
    "num_experts": 8,
    "experts_per_token": 3,
    "n_group": 4,
    "topk_group": 2,
    "expert_size": 32,
    "layers": ("dsa", "dsa", "dsa"),
    "first_k_dense_replace": 2,
    "index_head_dim": 16,
    "index_topk": 64,
    "max_positions": 128,
}


@pytest.fixture
def folder(tmp_path):
    draw("deepseek_v32").save_pretrained(tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize("changes", CONFIGURATIONS["deepseek_v32"].values(), ids=CONFIGURATIONS["deepseek_v32"])
def test_a_network_of_transformers_is_read_and_written_back(tmp_path, changes):
    oracle = draw("deepseek_v32", **changes)
    oracle.save_pretrained(tmp_path / "a", max_shard_size="200KB")
    ours = assert_same_folder(DeepseekV32ForCausalLM, oracle, tmp_path / "a", tmp_path)
    assert_equal_logits(ours, oracle, torch.randint(0, 50, (2, 40)))


def test_stacked_experts_are_read(folder, tmp_path):
    draw("deepseek_v32").save_pretrained(tmp_path / "modules", save_original_format=False)
    stacked, single = (import_pretrained(path).state_dict() for path in (tmp_path / "modules", folder))
    assert all(torch.equal(tensor, single[name]) for name, tensor in stacked.items())


@pytest.mark.parametrize(
    "overrides",
    [
        {"yarn_factor": 4.0, "yarn_original_positions": 32, "mixer_options": {"dsa": {"mscale": 0.5}}},
        {"ffn": "dense", "first_k_dense_replace": 0, "mixer_options": {"dsa": {"q_lora_rank": 12, "v_head_dim": 20}}},
        {"qat": True, "kv_format": "fp8_128", "mixer_options": {"dsa": {"kv_lora_rank": 128}}},
    ],
)
def test_a_network_of_ours_is_read_by_transformers_and_back(tmp_path, overrides):
    model = randomize(Transformer(ModelConfig(**{**OURS, "qat": False, **overrides})))
    export_pretrained(model, tmp_path / "a")
    oracle = load_oracle(DeepseekV32ForCausalLM, tmp_path / "a")
    assert_equal_logits(import_pretrained(tmp_path / "a", **FP32), oracle, torch.randint(0, 50, (1, 20)))
    again = import_pretrained(tmp_path / "a")
    assert again.config == model.config
    rounded = {name for name, _ in model.named_parameters() if model.config.qat and name.endswith(("w1", "w2", "w3"))}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]) is (name not in rounded), name


def released_config(**changes):
    """The published configuration, without quantization."""
    content = {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "ep_size": 1,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "index_head_dim": 128,
        "index_n_heads": 64,
        "index_topk": 2048,
        "initializer_range": 0.02,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "v_head_dim": 128,
        "vocab_size": 129280,
    }
    return {**content, **changes}


def test_the_released_configuration_is_read_as_transformers_reads_it(tmp_path):
    for name, content in (
        ("ours", released_config()),
        ("theirs", json.loads(DeepseekV32Config(**released_config()).to_json_string(use_diff=False))),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    config = read_pretrained_config(tmp_path / "ours")
    assert config == read_pretrained_config(tmp_path / "theirs")
    assert config.ffn_kinds == ["dense"] * 3 + ["moe"] * 58 and set(config.layers) == {"dsa"}
    assert (config.yarn_factor, config.n_group, config.topk_group, config.num_experts) == (40.0, 8, 4, 256)
    options = {"q_lora_rank": 1536, "kv_lora_rank": 512, "v_head_dim": 128, "mscale": 1.0, "mscale_all_dim": 1.0}
    assert options.items() <= config.mixer_options["dsa"].items()
    counted = count_parameters(meta_network(config))
    preset = ModelConfig.from_preset("v3.2")
    assert config.replace(kv_format="fp8_128", index_format="fp8_128", qat=False) == preset
    # DeepSeek-V3 has 671.03B without its prediction module; V3.2 adds the indexers.
    assert counted.total - counted.components["indexers"][0] == pytest.approx(671.03e9, rel=1e-5)


def test_the_prediction_layer_after_the_last_is_left_out(folder):
    def add(tensors):
        extra = {n.replace("layers.2.", "layers.3."): t.clone() for n, t in tensors.items() if ".layers.2." in n}
        return tensors | extra | {"model.layers.3.eh_proj.weight": torch.ones(64, 128)}

    expected = import_pretrained(folder).state_dict()
    change_tensors(folder, add)
    change_config(folder, num_nextn_predict_layers=1)
    lines = []
    found = import_pretrained(folder, report=lines.append).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(t, expected[name]) for name, t in found.items())
    assert len(lines) == 1 and "draft modules" in lines[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"quantization_config": {"quant_method": "fp8"}},
            "'quantization_config': quantized weights are not supported",
        ),
        ({"scoring_func": "softmax"}, 'scoring_func.: expected "sigmoid", found "softmax"'),
        ({"norm_topk_prob": False}, "'norm_topk_prob': expected true, found false"),
        ({"num_key_value_heads": 2}, "'num_key_value_heads': expected 4 as in 'num_attention_heads', found 2"),
        ({"q_lora_rank": None}, "'q_lora_rank' is missing"),
        ({"kv_lora_rank": 0}, "key 'kv_lora_rank': expected a whole number of at least 1"),
        ({"index_head_dim": 12}, "key 'index_head_dim': must be a power of two"),
        ({"topk_group": 1}, "key 'num_experts_per_tok': 3 exceeds the 2 experts of topk_group 1 groups"),
        ({"n_group": 3}, r"key 'n_group': 8 experts \(n_routed_experts\) do not divide into 3 groups"),
        (
            {"layer_types": ["full_attention"] * 3},
            r"'layer_types\[0\]': expected one of indexed_attention, found .full_",
        ),
        ({"mlp_layer_types": ["sparse", "dense", "sparse"]}, r"entry 1 \(from 0\) is 'dense' after a 'sparse' entry"),
        ({"moe_layer_freq": 2}, "'moe_layer_freq': expected 1, found 2"),
        ({"rope_parameters": {"rope_type": "default"}}, "'rope_theta' is missing, at the top level and in"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_type": "linear"}}, "'rope_parameters.rope_type': expected .def"),
        ({"rope_parameters": {**YARN, "attention_factor": 1.1}}, "'rope_parameters.attention_factor': expected none"),
        ({"kv_lora_rank": 48}, r"kv_a.* has shape .* by 'kv_lora_rank' 48.* of config.json"),
        (
            {"num_hidden_layers": 2, "layer_types": None, "mlp_layer_types": None},
            "'num_hidden_layers' is 2, but the folder has tensors of 3 layers",
        ),
    ],
)
def test_what_does_not_fit_is_named(folder, changes, message):
    change_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        import_pretrained(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layers": ("dsa", "dsa", "csa")}, "layers: no checkpoint format has layers of dsa, csa together"),
        ({"scoring_func": "sqrtsoftplus"}, "scoring_func: a DeepSeek-V3.2 checkpoint needs 'sigmoid'"),
        ({"num_shared_experts": 0}, "num_shared_experts: .* needs at least 1, found 0"),
        ({"swiglu_limit": 10.0}, "swiglu_limit: .* needs 0.0, found 10.0"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: .* needs false, found true"),
        ({"ffn": "none", "first_k_dense_replace": 0}, "ffn: .* needs 'moe' or 'dense', found 'none'"),
    ],
)
def test_networks_that_the_format_cannot_describe_are_refused(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        export_pretrained(Transformer(ModelConfig(**{**OURS, **overrides})), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
