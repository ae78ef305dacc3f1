"""Checkpoints to and from transformers: names, configuration, memory and error messages."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from benchmarks import parity
from model import checkpoint
from model.config import CACHE_FORMATS, ModelConfig
from model.errors import CheckpointError, ConfigError
from model.hf import export_pretrained, import_pretrained, is_pretrained
from model.hf.config_reader import ConfigReader
from model.hf.deepseek_v4.names import BLOCK, MODEL, canonical_name
from model.hf.registry import FAMILIES, family_of_file
from model.hf.safetensors_folder import INDEX
from model.tokenizer import ByteTokenizer, load_tokenizer
from tests.model.networks import FP32, build

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_config(path, content, **overrides):
    r = ConfigReader(path, content)
    return family_of_file(r).read_config(r, **overrides)


def write_config(config, layout, experts):
    return FAMILIES["deepseek_v4"].write_config(config, layout, experts)


def load_oracle(folder):
    oracle, info = DeepseekV4ForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    oracle.set_attn_implementation("eager")
    return oracle.eval()


# --- names and values


def test_both_ways_of_saving_are_read_and_written_back(tmp_path):
    oracle = parity.draw(parity.CONFIGURATIONS["schedule as in Flash"])
    oracle.save_pretrained(tmp_path / "default")
    oracle.save_pretrained(tmp_path / "modules", save_original_format=False)
    oracle.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    assert (tmp_path / "sharded" / INDEX).exists()
    assert is_pretrained(tmp_path / "default")
    ours = import_pretrained(tmp_path / "default")
    checkpoint.save(ours, tmp_path / "ours")
    assert not is_pretrained(tmp_path / "ours")
    assert not ours.training and not ours.config.qat
    assert {getattr(ours.config, name) for name in CACHE_FORMATS} == {"fp32"}
    for name in ("modules", "sharded"):
        assert same_state(import_pretrained(tmp_path / name), ours)
    export_pretrained(ours, tmp_path / "back", max_shard_bytes=300_000)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 3
    back = load_oracle(tmp_path / "back")
    expected = oracle.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in back.state_dict().items())


@pytest.mark.parametrize(
    "overrides",
    [
        {"layers": ("csa",), "num_hash_layers": 0, "csa_ratio": 3},
        {"layers": ("hca", "csa", "sliding"), "num_hash_layers": 3, "yarn_factor": 4.0, "yarn_original_positions": 64},
        {"mtp_layers": 1, "qat": True, "kv_format": "fp4", "index_format": "fp8"},
        {"head_dim": 24, "rope_head_dim": 14, "index_head_dim": 16, "o_groups": 4, "hc_mult": 2},
    ],
)
def test_what_we_write_loads_without_a_missing_or_unexpected_key(tmp_path, overrides):
    model = build(**overrides)
    export_pretrained(model, tmp_path / "a", tokenizer=ByteTokenizer())
    oracle = load_oracle(tmp_path / "a")
    assert oracle.config.eos_token_id == 1 and oracle.generation_config.eos_token_id == 1
    assert load_tokenizer(tmp_path / "a").encode("a") == [99]
    plain = import_pretrained(tmp_path / "a", **FP32)
    ids = torch.randint(0, 50, (2, 70))
    with torch.no_grad():
        torch.testing.assert_close(plain(ids), oracle(ids, use_cache=False).logits, atol=1e-4, rtol=0)
    again = import_pretrained(tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(again(ids), model(ids), atol=1e-5, rtol=0)
        for moe in model.moe_layers() if model.config.qat else ():  # exported as rounded in the forward pass
            for weight in (moe.w1, moe.w2, moe.w3):
                weight.copy_(moe.precision.round_expert(weight))
    assert same_state(again, model)
    assert again.config == model.config.replace(zero_init_output=False)


def test_a_prediction_module_is_built_where_there_is_one_and_wanted(tmp_path):
    model = build(mtp_layers=1)
    export_pretrained(model, tmp_path / "a")
    assert import_pretrained(tmp_path / "a").config.mtp_layers == 1
    assert len(import_pretrained(tmp_path / "a", mtp_layers=0).mtp) == 0
    parity.draw({}).save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b/config.json").read_text())["num_nextn_predict_layers"] == 1
    assert import_pretrained(tmp_path / "b").config.mtp_layers == 0
    with pytest.raises(CheckpointError, match=r"tensor 'mtp.0.* is missing"):
        import_pretrained(tmp_path / "b", mtp_layers=1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layers": ("sliding", "gqa")}, "layers: no checkpoint format has layers of sliding, gqa together"),
        ({"hyper_connections": False}, "hyper_connections: .* needs true, found false"),
        ({"ffn": "dense"}, "ffn: .* needs 'moe', found 'dense'"),
        ({"num_shared_experts": 2}, "num_shared_experts: .* needs 1, found 2"),
    ],
)
def test_networks_that_no_such_checkpoint_can_describe_are_refused(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        export_pretrained(build(**overrides), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_is_not_finite_is_not_written(tmp_path):
    model = build()
    with torch.no_grad():
        model.layers[1].attn.wkv.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"'model.layers.1.self_attn.kv_proj.weight' holds values that are not"):
        export_pretrained(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


# --- configuration


@pytest.mark.parametrize("layout", ["transformers", "released"])
@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(),
        ModelConfig(layers=("hca", "hca", "csa"), hca_ratio=128, num_hash_layers=3, mtp_layers=1),
        ModelConfig(yarn_factor=16.0, yarn_beta_fast=16.0, yarn_original_positions=4096, rope_theta=5000.0),
        ModelConfig(head_dim=44, rope_head_dim=30, index_head_dim=32, swiglu_limit=7.0),  # int(44 * (30 / 44)) is 29
        ModelConfig.from_preset("v4-flash"),
        ModelConfig.from_preset("v4-pro"),
    ],
)
def test_configurations_round_trip(tmp_path, config, layout):
    content = json.loads(json.dumps(write_config(config, layout, "fp4")))
    assert read_config(tmp_path, content) == config


def released_config(**changes):
    """The published configuration of V4-Flash."""
    content = {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "expert_dtype": "fp4",
        "hc_eps": 1e-6,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "head_dim": 512,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "index_head_dim": 128,
        "index_n_heads": 64,
        "index_topk": 512,
        "initializer_range": 0.02,
        "max_position_embeddings": 1048576,
        "moe_intermediate_size": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 64,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 43,
        "num_hash_layers": 3,
        "num_key_value_heads": 1,
        "num_nextn_predict_layers": 1,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "q_lora_rank": 1024,
        "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-6,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 16,
            "original_max_position_embeddings": 65536,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
        "sliding_window": 128,
        "swiglu_limit": 10.0,
        "tie_word_embeddings": False,
        "topk_method": "noaux_tc",
        "vocab_size": 129280,
        "compress_rope_theta": 160000,
        "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    }
    return {**content, **changes}


def test_the_released_configurations_are_the_presets(tmp_path):
    assert read_config(tmp_path, released_config()) == ModelConfig.from_preset("v4-flash")
    pro = released_config(
        hidden_size=7168,
        index_topk=1024,
        moe_intermediate_size=3072,
        n_routed_experts=384,
        num_attention_heads=128,
        num_hidden_layers=61,
        o_groups=16,
        q_lora_rank=1536,
        routed_scaling_factor=2.5,
        compress_ratios=[128, 128, *[4, 128] * 29, 4, 0],
    )
    assert read_config(tmp_path, pro) == ModelConfig.from_preset("v4-pro")


def test_transformers_reads_released_configurations_alike(tmp_path):
    oracle = DeepseekV4Config(**{k: v for k, v in released_config().items() if k != "quantization_config"})
    ours = read_config(tmp_path, released_config())
    theirs = read_config(tmp_path, oracle.to_dict())
    assert theirs == ours


def test_older_keys_are_read(tmp_path):
    content = released_config(compress_rate_csa=4, compress_rate_hca=128, partial_rotary_factor=0.125)
    assert read_config(tmp_path, content) == ModelConfig.from_preset("v4-flash")
    draft_stages = released_config(compress_ratios=[0, 0, *[4, 128] * 20, 4, 0, 0, 0])
    assert read_config(tmp_path, draft_stages, mtp_layers=0).mtp_layers == 0
    other_ratio = released_config(compress_ratios=[0, 0, *[4, 64] * 20, 4, 0])
    assert read_config(tmp_path, other_ratio).hca_ratio == 64


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "deepseek_v3"}, r"'model_type': expected one of .*deepseek_v4.*, found .deepseek_v3."),
        ({"scoring_func": "softmax"}, 'scoring_func.: expected "sqrtsoftplus", found "softmax"'),
        ({"attention_bias": True}, "'attention_bias': expected false, found true"),
        ({"tie_word_embeddings": True}, "'tie_word_embeddings': expected false, found true"),
        ({"norm_topk_prob": False}, "'norm_topk_prob': expected true, found false"),
        ({"n_shared_experts": 2}, "'n_shared_experts': expected 1, found 2"),
        ({"num_key_value_heads": 8}, "'num_key_value_heads': expected 1, found 8"),
        ({"hidden_act": "gelu"}, 'hidden_act.: expected "silu", found "gelu"'),
        ({"num_nextn_predict_layers": -1}, "'num_nextn_predict_layers': expected 0 or more, found -1"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"hidden_size": "4096"}, "key 'hidden_size': expected a whole number, found '4096'"),
        (
            {"num_hidden_layers": 45},
            "'compress_ratios': has 44 entries, but 'num_hidden_layers' is 45; add the ratio of every layer, or ",
        ),
        (
            {"compress_ratios": [0, 0, *[4, 128] * 20, 4, 0, 4]},
            r"has 45 entries, but 'num_hidden_layers' is 43: entry 44 \(from 0\) is 4, and entries after the layers",
        ),
        (
            {"compress_ratios": [1, 64, *[4, 128] * 20, 4, 0]},
            r"at most one other ratio, found 64 \(first at layer 1\) and 128 \(first at layer 3\)",
        ),
        ({"compress_ratios": [0, 4.0] * 22}, r"'compress_ratios\[1\]': expected a whole number .*, found 4.0"),
        ({"compress_ratios": [0, 0, True] * 22}, r"'compress_ratios\[2\]': expected a whole number .*, found true"),
        ({"compress_ratios": [0, -1] * 22}, r"'compress_ratios\[1\]': expected a whole number .*, found -1"),
        ({"compress_ratios": "0, 4"}, "'compress_ratios': expected a list, found \"0, 4\""),
        ({"compress_ratios": None}, "'layer_types' and 'compress_ratios' are both missing"),
        (
            {"compress_ratios": None, "attention": {"compress_ratios": [0] * 43}},
            "are both missing at the top level; there is 'attention.compress_ratios'",
        ),
        ({"layer_types": ["sliding_attention"] * 42}, "'layer_types': has 42 entries, but 'num_hidden_layers' is 43"),
        (
            {"layer_types": ["sliding_attention"] * 43},
            r"'compress_ratios\[2\]': expected 0 as in 'layer_types' and 'compress_rates', found 4",
        ),
        ({"layer_types": [["csa"]] * 43}, r"'layer_types\[0\]': expected one of .*, found \[.csa.\]"),
        ({"layer_types": ["full_attention"] * 43}, r"'layer_types\[0\]': expected one of .*, found .full_attention."),
        (
            {"mlp_layer_types": ["moe", "hash_moe"] + ["moe"] * 41},
            r"'mlp_layer_types': entry 1 \(from 0\) is 'hash_moe' after a 'moe' entry",
        ),
        ({"mlp_layer_types": ["moe"] * 42}, "'mlp_layer_types': has 42 entries, but 'num_hidden_layers' is 43"),
        ({"num_hash_layers": None}, "'num_hash_layers' is missing"),
        ({"num_attention_heads": 60}, "key 'num_attention_heads': 60 heads do not divide into o_groups 8 groups"),
        ({"partial_rotary_factor": 0.25}, "'partial_rotary_factor': expected 64 rotary dims as in .*, found 128"),
        ({"qk_rope_head_dim": None}, "'qk_rope_head_dim' and 'partial_rotary_factor' are both missing"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 'rope_scaling.type.: expected "default" or "yarn"'),
        ({"rope_scaling": [16]}, r"'rope_scaling': expected an object, found \[16\]"),
        ({"rope_theta": None}, "'rope_theta' is missing, at the top level and in 'rope_parameters'"),
        (
            {"rope_parameters": {"rope_theta": 5000}},
            "'rope_parameters.rope_theta': expected 10000.0 as in 'rope_theta'",
        ),
        (
            {"rope_parameters": {"main": {"rope_theta": 1e4}}},
            "'rope_parameters.compress': expected an object, as for the",
        ),
        (
            {"rope_scaling": None, "rope_parameters": {"rope_type": "yarn"}},
            "'rope_parameters.original_max_position_emb",
        ),
        ({"rms_norm_eps": float("nan")}, "'rms_norm_eps': expected a finite number, found .nan"),
        ({"hidden_size": float("inf")}, "'hidden_size': expected a whole number, found .inf"),
        ({"num_experts_per_tok": 300}, "'num_experts_per_tok': 300 exceeds n_routed_experts 256"),
        ({"qk_rope_head_dim": 512}, "'qk_rope_head_dim': 512 leaves no unrotated dims in head_dim 512"),
        (
            {
                "compress_ratios": None,
                "compress_rates": {"compressed_sparse_attention": 1},
                "layer_types": ["compressed_sparse_attention"] * 43,
            },
            "key 'compress_rates': must be at least 2, found 1",
        ),
        ({"rope_scaling": {"type": "yarn"}}, "'rope_scaling.original_max_position_embeddings': expected a whole"),
        ({"swiglu_limit": 0.0}, "key 'swiglu_limit': expected a number above 0, found 0.0"),
        ({"expert_dtype": "int4"}, 'expert_dtype.: expected "fp4" or "fp8", found "int4"'),
        ({"hidden_size": 10**30}, r"key 'hidden_size': must be below 2 \*\* 31, found 1000"),
        (
            {"fiftyfold": {"head_dim": 3}},
            "'fiftyfold': expected an object of kv_format, rope_format, index_format, gqa_format, qat, found",
        ),
        ({"fiftyfold": {"qat": "maybe"}}, "key 'qat': expected true or false, found 'maybe'"),
        ({"quantization_config": {"quant_method": "awq"}}, 'quantization_config.quant_method.: expected "fp8"'),
        ({"quantization_config": {"weight_block_size": [32, 32]}}, r"weight_block_size': expected \[128, 128\], found"),
    ],
)
def test_what_the_network_does_not_implement_is_named(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message) as error:
        read_config(tmp_path / "config.json", released_config(**changes))
    assert "\n" not in str(error.value)


def test_an_amplitude_other_than_one_is_refused(tmp_path):
    content = write_config(ModelConfig(yarn_factor=4.0), "transformers", "fp4")
    content["rope_parameters"]["compress"]["attention_factor"] = 1.2
    with pytest.raises(CheckpointError, match=r"compress.attention_factor': expected 1.0, found 1.2"):
        read_config(tmp_path, content)
    del content["rope_parameters"]["compress"]["attention_factor"]  # transformers would compute one
    with pytest.raises(CheckpointError, match=r"compress.attention_factor': expected 1.0, found null"):
        read_config(tmp_path, content)
    content["rope_parameters"]["main"]["rope_type"] = "yarn"
    with pytest.raises(CheckpointError, match=r'main.rope_type.: expected "default", found "yarn"'):
        read_config(tmp_path, content)


# --- damaged folders


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "a"
    export_pretrained(build(), folder, max_shard_bytes=60_000)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "a")


def change_tensor(folder, name, change):
    index = json.loads((folder / INDEX).read_text())
    shard = folder / index["weight_map"][name]
    tensors = load_file(shard)
    changed = change(tensors[name])
    if changed is None:
        del tensors[name], index["weight_map"][name]
        (folder / INDEX).write_text(json.dumps(index))
    else:
        tensors[name] = changed
    save_file(tensors, shard)


NAME = "model.layers.1.self_attn.kv_proj.weight"
TABLE = "model.layers.0.mlp.gate.tid2eid"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (NAME, lambda t: None, rf"tensor '{NAME}' is missing, expected shape \[16, 32\]"),
        (NAME, lambda t: t[:, :-1].clone(), rf"tensor '{NAME}' has shape \[16, 31\], expected \[16, 32\]"),
        (NAME, lambda t: t.fill_(float("nan")), rf"tensor '{NAME}' holds values that are not finite"),
        (NAME, lambda t: t.to(torch.int64), rf"tensor '{NAME}' is I64, expected .*F32"),
        (NAME, lambda t: t.to(torch.float8_e4m3fn), r"tensor '.*kv_proj.scale' is missing, expected shape \[1, 1\]"),
        (TABLE, lambda t: t + 1, rf"tensor '{TABLE}' names experts outside 0..3"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(folder, name, change, message):
    change_tensor(folder, name, change)
    with pytest.raises(CheckpointError, match=message) as error:
        import_pretrained(folder)
    assert "\n" not in str(error.value)


def test_damaged_folders_are_named(folder):
    shards = sorted(folder.glob("*.safetensors"))
    index = json.loads((folder / INDEX).read_text())

    tensors = load_file(shards[0])
    save_file({**tensors, "extra": torch.zeros(1)}, shards[0])
    with pytest.raises(CheckpointError, match="holds tensor 'extra', which the index puts in no shard"):
        import_pretrained(folder)
    with_extra = {**index["weight_map"], "extra": shards[0].name}
    (folder / INDEX).write_text(json.dumps({"weight_map": with_extra}))
    with pytest.raises(CheckpointError, match="tensor 'extra' is not part of this model"):
        import_pretrained(folder)

    save_file(tensors, shards[0])
    with pytest.raises(CheckpointError, match="tensor 'extra' is named in the index but missing here"):
        import_pretrained(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {**index["weight_map"], "a": "../a.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"shard '\.\./a\.safetensors' is not a file name in this folder"):
        import_pretrained(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": 3}))
    with pytest.raises(CheckpointError, match="'weight_map' is not an object"):
        import_pretrained(folder)
    (folder / INDEX).write_text(json.dumps(index))

    whole = shards[1].read_bytes()
    shards[1].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=rf"{shards[1].name}: damaged: cut short, it holds [\d,]+ of [\d,]+"):
        import_pretrained(folder)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=rf"names {len(shards)} shards, of which missing: {shards[1].name}"):
        import_pretrained(folder)
    (folder / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"found neither model\.safetensors nor"):
        import_pretrained(folder)

    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="expected an object at the top level, found a list"):
        import_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not valid JSON"):
        import_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config.json: No such file"):
        import_pretrained(folder)
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        import_pretrained(folder / "nowhere")


def test_one_tensor_under_two_names_is_refused(tmp_path):
    parity.draw({}).save_pretrained(tmp_path / "a")
    tensors = load_file(tmp_path / "a/model.safetensors")
    save_file({**tensors, "embed.weight": torch.zeros(1)}, tmp_path / "a/model.safetensors")
    with pytest.raises(CheckpointError, match=r"'embed.weight' and 'model.embed_tokens.weight' are two names"):
        import_pretrained(tmp_path / "a")


# --- memory

MEASURE = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from model.hf import import_pretrained
def kilobytes(key):
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0])
import_pretrained(sys.argv[1])
before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
model = import_pretrained(sys.argv[2])
print(1024 * (kilobytes("VmHWM") - before), sum(t.nbytes for t in model.state_dict().values()))
"""


@pytest.mark.parametrize("layout", ["transformers", "released"])
def test_reading_needs_little_more_memory_than_the_network(tmp_path, exported, layout):
    torch.manual_seed(0)
    layers = ("sliding", "csa", "hca") * 2
    big = build(hidden_size=256, expert_size=256, num_experts=24, experts_per_token=2, layers=layers)
    export_pretrained(big, tmp_path / "big", format=layout)
    assert len(list((tmp_path / "big").glob("*.safetensors"))) == 1  # the worst case: everything in one file
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(exported), str(tmp_path / "big")],
        capture_output=True,
        text=True,
        check=True,
    )
    peak, size = map(int, run.stdout.split())
    assert size > 50e6
    assert peak < 1.5 * size


def test_both_layouts_have_one_spelling():
    """The table of names and the rules of ``canonical_name`` agree."""
    for prefix, rows in (("", MODEL), ("layers.7.", BLOCK)):
        for row in rows:
            theirs = (f"model.{prefix}" if prefix else "") + row.transformers
            assert canonical_name(theirs) == canonical_name(prefix + row.released) == prefix + row.released
