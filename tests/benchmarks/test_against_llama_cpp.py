"""Comparison with llama.cpp: equal logits, bytes read per token, and the script."""

import pytest
import torch
from gguf import GGUFReader

from benchmarks import against_llama_cpp
from benchmarks.against_llama_cpp import active_file_bytes, active_weight_bytes, attended_bytes, logit_difference
from benchmarks.lib import llama_cpp, start_up
from benchmarks.lib.llama_cpp import LlamaCpp
from model.cache import Cache
from model.config import CACHE_FORMATS, ModelConfig
from model.errors import FiftyfoldError
from model.gguf import export_gguf
from model.transformer import Transformer

FP32 = dict.fromkeys(CACHE_FORMATS, "fp32")
needs_llama_cpp = pytest.mark.skipif(not llama_cpp.available(), reason="needs the package llama_cpp")


def network(**overrides):
    """Return a network with shapes that llama.cpp supports and no parameter at 0 or 1."""
    torch.manual_seed(0)
    shape = {"hca_ratio": 128, "index_head_dim": 64, "index_heads": 16, "index_topk": 16, "window": 8, "init_std": 0.1}
    model = Transformer(ModelConfig(**{**shape, **overrides})).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith((".sink", ".ape", ".base", ".scale")):
                p.normal_(std=0.5)
            elif p.dim() == 1:
                p.uniform_(0.5, 1.5)
        for moe in model.moe_layers():
            moe.router_bias.normal_(std=0.1)
    return model


@needs_llama_cpp
@pytest.mark.parametrize(
    "overrides",
    [
        pytest.param({"layers": ("sliding", "csa", "hca")}, id="all kinds of layer"),
        pytest.param({"layers": ("csa", "hca"), "num_hash_layers": 0, "yarn_factor": 16.0}, id="YaRN"),
        pytest.param({"layers": ("sliding", "hca", "csa"), "swiglu_limit": 0.5, "qat": False}, id="clamped experts"),
    ],
)
def test_llama_cpp_computes_the_same_logits(tmp_path, overrides):
    """Compare logits over 300 tokens, where some entries are not selected and hca blocks are complete.

    Nearly tied entries or experts may be selected differently for a few tokens.
    """
    model = network(yarn_original_positions=64, **FP32, **overrides)
    export_gguf(model, tmp_path / "model.gguf")
    ids = torch.randint(2, 258, (300,)).tolist()
    with LlamaCpp(tmp_path / "model.gguf", 512) as theirs:
        difference = logit_difference(model, theirs, ids)
        assert difference.median() < 1e-2 and (difference > 3e-2).float().mean() < 0.1
        token_by_token = theirs.decode(ids[-1:], 1)[-1]
        theirs.clear()
        theirs.prefill(ids, 2)
        state = theirs.state()
        again = theirs.decode(ids[-1:], 1)[-1]
        theirs.clear()
        theirs.restore(state)
        assert abs(again - token_by_token).max() < 1e-2 * again.std()
        assert abs(theirs.decode(ids[-1:], 1)[-1] - again).max() < 1e-4 * again.std()


@needs_llama_cpp
def test_an_invalid_file_is_named(tmp_path):
    (tmp_path / "bad.gguf").write_text("not a model")
    with pytest.raises(FiftyfoldError, match=r"bad\.gguf: llama\.cpp cannot load this file"):
        LlamaCpp(tmp_path / "bad.gguf", 256)


@needs_llama_cpp
def test_script():
    small = "--preset tiny --depths 0 512 --prompts 256 --rounds 1 --tokens 4 --threads 1 --types f32 q8_0"
    text = against_llama_cpp.main([*small.split(), "--parts", "decode", "prefill"])
    parts = ("| 512 | ours, float32 (", "| 512 | llama.cpp, q8_0 | ", "| 256 | ours, float32, pieces of 512")
    for part in (*parts, "defaults", "fastest", "Memory bandwidth, reading: ", "of their standard deviation"):
        assert part in text


@pytest.mark.skipif(llama_cpp.available(), reason="llama_cpp is installed")
def test_a_missing_package_is_named():
    with pytest.raises(FiftyfoldError, match="cannot import the package 'llama_cpp'; install llama-cpp-python"):
        against_llama_cpp.main(["--preset", "tiny"])


def test_both_networks_have_equally_many_active_weights(tmp_path):
    model = network(layers=("sliding", "csa", "hca"), num_hash_layers=0)
    export_gguf(model, tmp_path / "model.gguf")
    stored = sum(int(t.n_bytes) for t in GGUFReader(tmp_path / "model.gguf").tensors)
    biases = sum(4 * moe.router_bias.numel() for moe in model.moe_layers())
    active = active_weight_bytes(model)
    assert active_file_bytes(tmp_path / "model.gguf", model.config) == active + biases
    experts = sum(4 * (moe.w1.numel() + moe.w2.numel() + moe.w3.numel()) for moe in model.moe_layers())
    assert stored - (active + biases) == experts // 2 + 4 * model.embed.weight.numel()  # half of the experts are active


def test_attended_bytes():
    config = ModelConfig(layers=("sliding", "csa", "hca"), hca_ratio=128, index_topk=16, window=8, **FP32)
    entry, key = 4 * config.head_dim, 4 * config.index_head_dim
    assert attended_bytes(config, 4) == 3 * 4 * entry + entry + key
    assert attended_bytes(config, 1024) == 3 * 8 * entry + 16 * entry + 256 * key + 8 * entry
    assert attended_bytes(config, 1024, 2.0) == attended_bytes(config, 1024) / 2
    packed = config.replace(kv_format="fp8", rope_format="bf16", index_format="fp4")
    cache = Cache(packed, 1, 1024)
    assert attended_bytes(packed, 1024) < attended_bytes(config, 1024) / 3 < cache.nbytes()


def test_a_process_without_a_token_is_an_error(tmp_path):
    with pytest.raises(FiftyfoldError, match="start-up of ours: the process exited with status 1 and printed no token"):
        start_up.start_up("ours", tmp_path / "nothing", "float32", 1, rounds=1)
