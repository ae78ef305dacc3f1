"""GGUF files: names, shapes and metadata as in llama.cpp's loader, values, and refused networks.

The logits that llama.cpp computes from such a file are compared in tests/benchmarks/test_against_llama_cpp.py.
"""

import re
import sys

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from model.errors import CheckpointError, ConfigError
from model.gguf import export_gguf
from tests.model.networks import build

SHAPES = {"hca_ratio": 128, "index_head_dim": 64, "num_hash_layers": 1, "hidden_size": 64, "expert_size": 32}


@pytest.fixture(scope="module")
def model():
    return build(layers=("sliding", "csa", "hca"), mtp_layers=1, **SHAPES)


def read(path):
    """Return tensors by name, rows first, and plain metadata by key."""
    reader = GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    return tensors, {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def values(tensor):
    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())


def test_every_tensor_that_the_loader_asks_for_is_there_with_its_shape(model, tmp_path):
    export_gguf(model, tmp_path / "a.gguf")
    tensors, _ = read(tmp_path / "a.gguf")
    c = model.config
    wide, mixes, vocab = 4 * c.hidden_size, 24, c.vocab_size
    expected = {  # in llama.cpp's order of dims, from llama_model_deepseek4::load_arch_tensors
        "token_embd.weight": [64, vocab],
        "output.weight": [64, vocab],
        "output_norm.weight": [64],
        "output_hc_fn.weight": [wide, 4],
        "output_hc_base.weight": [4],
        "output_hc_scale.weight": [1],
    }
    for i, mixer in enumerate(c.layers):
        block = {
            "attn_norm.weight": [64],
            "attn_sinks.weight": [4],
            "attn_q_a.weight": [64, 16],
            "attn_q_a_norm.weight": [16],
            "attn_q_b.weight": [16, 4 * 16],
            "attn_kv.weight": [64, 16],
            "attn_kv_a_norm.weight": [16],
            "attn_output_a.weight": [4 * 16 // 2, 8 * 2],
            "attn_output_b.weight": [2 * 8, 64],
            **{f"hc_{part}_fn.weight": [wide, mixes] for part in ("attn", "ffn")},
            **{f"hc_{part}_base.weight": [mixes] for part in ("attn", "ffn")},
            **{f"hc_{part}_scale.weight": [3] for part in ("attn", "ffn")},
            "ffn_norm.weight": [64],
            "ffn_gate_inp.weight": [64, 4],
            "ffn_gate_exps.weight": [64, 32, 4],
            "ffn_down_exps.weight": [32, 64, 4],
            "ffn_up_exps.weight": [64, 32, 4],
            "ffn_gate_shexp.weight": [64, 32],
            "ffn_down_shexp.weight": [32, 64],
            "ffn_up_shexp.weight": [64, 32],
            **({"ffn_gate_tid2eid.weight": [2, vocab]} if i == 0 else {"exp_probs_b.bias": [4]}),
        }
        if mixer != "sliding":
            width, ratio = (32, 4) if mixer == "csa" else (16, 128)
            block["attn_compressor_kv.weight"] = block["attn_compressor_gate.weight"] = [64, width]
            block["attn_compressor_ape.weight"] = [width, ratio]
            block["attn_compressor_norm.weight"] = [16]
        if mixer == "csa":
            block["indexer.proj.weight"] = [64, 8]
            block["indexer.attn_q_b.weight"] = [16, 8 * 64]
            block["indexer_compressor_kv.weight"] = block["indexer_compressor_gate.weight"] = [64, 2 * 64]
            block["indexer_compressor_ape.weight"] = [2 * 64, 4]
            block["indexer_compressor_norm.weight"] = [64]
        expected |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    assert {name: [int(n) for n in tensor.shape] for name, tensor in tensors.items()} == expected


def test_values_are_ours_with_experts_as_the_network_rounds_them(model, tmp_path):
    export_gguf(model, tmp_path / "a.gguf")
    tensors, _ = read(tmp_path / "a.gguf")
    state = model.state_dict()
    for theirs, ours in {
        "token_embd.weight": "embed.weight",
        "blk.1.attn_q_b.weight": "layers.1.attn.wq_b.weight",
        "blk.1.indexer_compressor_ape.weight": "layers.1.attn.indexer.compressor.ape",
        "blk.2.hc_ffn_base.weight": "layers.2.ffn_residual.base",
        "blk.2.attn_output_a.weight": "layers.2.attn.wo_a",
    }.items():
        assert torch.equal(values(tensors[theirs]).flatten(), state[ours].flatten()), theirs
    moe = model.layers[1].ffn
    for theirs, ours in (("gate", moe.w1), ("down", moe.w2), ("up", moe.w3)):
        assert torch.equal(values(tensors[f"blk.1.ffn_{theirs}_exps.weight"]), moe.precision.round_expert(ours))
    table = tensors["blk.0.ffn_gate_tid2eid.weight"]
    assert table.tensor_type == GGMLQuantizationType.I32
    assert table.data.tolist() == model.layers[0].ffn.tid2eid.tolist()


@pytest.mark.parametrize(("weights", "error"), [("f16", 1e-3), ("q8_0", 1e-2)])
def test_large_matrices_take_the_type_and_all_else_stays(model, tmp_path, weights, error):
    export_gguf(model, tmp_path / "a.gguf", weights)
    tensors, metadata = read(tmp_path / "a.gguf")
    types = {name: tensor.tensor_type.name.lower() for name, tensor in tensors.items()}
    assert types["blk.1.ffn_gate_exps.weight"] == types["blk.1.attn_kv.weight"] == types["output.weight"] == weights
    # Rows of 16 values are half a block.
    assert types["blk.1.attn_q_b.weight"] == "f16"
    small = ("norm.weight", "_fn.weight", "_scale.weight", "ape.weight", "gate_inp.weight", "sinks.weight", ".bias")
    assert {types[name] for name in types if name.endswith(small)} == {"f32"}
    assert metadata["general.file_type"] == {"f16": 1, "q8_0": 7}[weights]
    found, expected = values(tensors["blk.1.attn_kv.weight"]), model.layers[1].attn.wkv.weight
    assert 0 < (found - expected).abs().max() < error * expected.abs().max()


def test_metadata_describes_the_network(tmp_path):
    model = build(layers=("sliding", "csa", "hca"), yarn_factor=16.0, yarn_original_positions=4096, **SHAPES)
    export_gguf(model, tmp_path / "a.gguf")
    _, metadata = read(tmp_path / "a.gguf")
    assert metadata["general.architecture"] == "deepseek4"
    assert metadata["tokenizer.ggml.model"] == "none"
    arch = {key.removeprefix("deepseek4."): value for key, value in metadata.items()}
    assert arch["attention.compress_ratios"] == [0, 4, 128]
    assert arch["swiglu_clamp_exp"] == arch["swiglu_clamp_shexp"] == [10.0] * 3
    for key, value in {
        "block_count": 3,
        "vocab_size": 50,
        "embedding_length": 64,
        "embedding_length_out": 256,
        "attention.key_length": 16,
        "attention.sliding_window": 6,
        "attention.indexer.top_k": 3,
        "attention.output_group_count": 2,
        "rope.dimension_count": 8,
        "rope.freq_base": 10_000.0,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 16.0,
        "rope.scaling.original_context_length": 4096,
        "attention.compress_rope_freq_base": 160_000.0,
        "expert_used_count": 2,
        "expert_weights_scale": 1.5,
        "expert_gating_func": 4,
        "hash_layer_count": 1,
        "hyper_connection.count": 4,
        "hyper_connection.sinkhorn_iterations": 20,
    }.items():
        assert arch[key] == value, key


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"layers": ("sliding", "gqa")}, "layers: .* only sliding, csa and hca layers, found 'gqa'"),
        ({"layers": ("csa",), "index_head_dim": 32}, "index_head_dim: .* needs at least 64, found 32"),
        ({"layers": ("csa",), "csa_ratio": 8}, "csa_ratio: .* needs 4, found 8"),
        ({"layers": ("csa", "hca"), "hca_ratio": 32}, "hca_ratio: .* needs 128, found 32"),
        ({"layers": ("sliding", "hca")}, "layers: .* needs at least one csa layer, found .'sliding', 'hca'."),
        ({"layers": ("csa",), "head_dim": 64}, "index_head_dim: .* a width other than head_dim .* found 64"),
        ({"hc_mult": 2}, "hc_mult: .* needs 4, found 2"),
        ({"hyper_connections": False}, "hyper_connections: .* needs true, found false"),
        ({"ffn": "dense", "num_hash_layers": 0}, "ffn: .* needs 'moe', found 'dense'"),
        ({"first_k_dense_replace": 1, "num_hash_layers": 0}, "first_k_dense_replace: .* needs 0, found 1"),
        ({"scoring_func": "sigmoid"}, "scoring_func: .* needs 'sqrtsoftplus', found 'sigmoid'"),
        ({"n_group": 2, "topk_group": 2}, "n_group: .* needs 1, found 2"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings: .* needs false, found true"),
        ({"swiglu_limit": 0.0}, "swiglu_limit: .* a limit above 0, found 0.0"),
        ({"num_shared_experts": 0}, "num_shared_experts: .* needs at least 1, found 0"),
        (
            {"layers": ("csa",), "yarn_factor": 4.0, "yarn_beta_fast": 16.0},
            "yarn_beta_fast: .* needs 32, found 16",
        ),
    ],
)
def test_networks_that_llama_cpp_cannot_hold_are_refused(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        export_gguf(build(**{**SHAPES, **overrides}), tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_type_is_refused(model, tmp_path):
    with pytest.raises(ConfigError, match="weights: 'q4_0' is not one of f32, f16, q8_0") as caught:
        export_gguf(model, tmp_path / "a.gguf", "q4_0")
    assert caught.value.field == "weights"


def test_a_value_that_is_not_finite_leaves_the_old_file(tmp_path):
    model = build(layers=("csa",), **SHAPES)
    (tmp_path / "a.gguf").write_text("old")
    with torch.no_grad():
        model.layers[0].attn.wo_b.weight[0, 0] = float("inf")
    with pytest.raises(CheckpointError, match=r"'layers.0.attn.wo_b.weight' holds values that are not finite"):
        export_gguf(model, tmp_path / "a.gguf")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(("weights", "value", "most"), [("f16", 7e4, "65504"), ("q8_0", -9e6, "8.31901e+06")])
def test_a_value_that_the_type_cannot_hold_is_refused(tmp_path, weights, value, most):
    model = build(layers=("csa",), **SHAPES)
    with torch.no_grad():
        model.embed.weight[0, 0] = value
    message = f"tensor 'embed.weight' holds {abs(value):g}, but {weights} holds values up to {most}"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        export_gguf(model, tmp_path / "new" / "folder" / "a.gguf", weights)
    assert list(tmp_path.iterdir()) == []
    export_gguf(model, tmp_path / "new" / "folder" / "a.gguf", "f32")
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["a.gguf"]


def test_without_the_package_one_sentence_says_what_to_install(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"the package 'gguf'; install it with pip install 'fiftyfold\[gguf\]'"):
        export_gguf(model, tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []
