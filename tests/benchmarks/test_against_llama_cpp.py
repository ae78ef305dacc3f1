"""llama.cpp beside our network: the same logits, the bytes of the floor, and the script."""

import pytest
import torch
from gguf import GGUFReader

from benchmarks import against_llama_cpp
from benchmarks.against_llama_cpp import active_file_bytes, active_weight_bytes, attended_bytes, logit_difference
from benchmarks.lib import llama_cpp as llama_cpp_side
from benchmarks.lib import start_up
from benchmarks.lib.llama_cpp import LlamaCpp
from model.cache import Cache
from model.config import CACHE_FORMATS, ModelConfig
from model.errors import FiftyfoldError
from model.gguf_format import export_gguf
from model.transformer import Transformer

FP32 = dict.fromkeys(CACHE_FORMATS, "fp32")
needs_llama_cpp = pytest.mark.skipif(not llama_cpp_side.available(), reason="needs the package llama_cpp")


def network(**overrides):
    """A network of llama.cpp's shapes, with no parameter at zero or one."""
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
    """Entries are left out and hca blocks complete within 300 tokens. Where entries or experts are nearly tied the two
    choose differently, at a few of the tokens."""
    model = network(yarn_original_positions=64, **FP32, **overrides)
    export_gguf(model, tmp_path / "model.gguf")
    ids = torch.randint(2, 258, (300,)).tolist()
    with LlamaCpp(tmp_path / "model.gguf", 512) as theirs:
        difference = logit_difference(model, theirs, ids)
        assert difference.median() < 1e-2 and (difference > 3e-2).float().mean() < 0.1
        token_by_token = theirs.decode(ids[-1:], 1)[-1]
        theirs.clear()
        theirs.read(ids, 2)
        state = theirs.state()
        again = theirs.decode(ids[-1:], 1)[-1]
        theirs.clear()
        theirs.restore(state)
        assert abs(again - token_by_token).max() < 1e-2 * again.std()
        assert abs(theirs.decode(ids[-1:], 1)[-1] - again).max() < 1e-4 * again.std()


@needs_llama_cpp
def test_what_llama_cpp_cannot_load_is_one_sentence(tmp_path):
    (tmp_path / "bad.gguf").write_text("not a model")
    with pytest.raises(FiftyfoldError, match=r"bad\.gguf: llama\.cpp cannot load it"):
        LlamaCpp(tmp_path / "bad.gguf", 256)


@needs_llama_cpp
def test_the_whole_script():
    small = "--preset tiny --depths 0 512 --prompts 256 --rounds 1 --tokens 4 --threads 1 --types f32 q8_0"
    text = against_llama_cpp.main([*small.split(), "--parts", "decode", "prefill"])
    parts = ("| 512 | ours, float32 (", "| 512 | llama.cpp, q8_0 | ", "| 256 | ours, float32, pieces of 512")
    for part in (*parts, "defaults", "fastest", "Memory bandwidth, reading: ", "of their standard deviation"):
        assert part in text


@pytest.mark.skipif(llama_cpp_side.available(), reason="llama_cpp is there")
def test_without_llama_cpp_one_sentence_says_so():
    with pytest.raises(FiftyfoldError, match="the package 'llama_cpp' is not importable; install llama-cpp-python"):
        against_llama_cpp.main(["--preset", "tiny"])


def test_both_sides_read_as_many_numbers(tmp_path):
    model = network(layers=("sliding", "csa", "hca"), num_hash_layers=0)
    export_gguf(model, tmp_path / "model.gguf")
    stored = sum(int(t.n_bytes) for t in GGUFReader(tmp_path / "model.gguf").tensors)
    biases = sum(4 * moe.router_bias.numel() for moe in model.moe_layers())
    active = active_weight_bytes(model)
    assert active_file_bytes(tmp_path / "model.gguf", model.config) == active + biases
    experts = sum(4 * (moe.w1.numel() + moe.w2.numel() + moe.w3.numel()) for moe in model.moe_layers())
    assert stored - (active + biases) == experts // 2 + 4 * model.embed.weight.numel()  # half of them are chosen


def test_the_entries_that_a_token_reads():
    config = ModelConfig(layers=("sliding", "csa", "hca"), hca_ratio=128, index_topk=16, window=8, **FP32)
    entry, key = 4 * config.head_dim, 4 * config.index_head_dim
    assert attended_bytes(config, 4) == 3 * 4 * entry + entry + key
    assert attended_bytes(config, 1024) == 3 * 8 * entry + 16 * entry + 256 * key + 8 * entry
    assert attended_bytes(config, 1024, 2.0) == attended_bytes(config, 1024) / 2
    packed = config.replace(kv_format="fp8", rope_format="bf16", index_format="fp4")
    cache = Cache(packed, 1, 1024)
    assert attended_bytes(packed, 1024) < attended_bytes(config, 1024) / 3 < cache.nbytes()


def test_a_process_that_prints_no_token_is_an_error(tmp_path):
    with pytest.raises(FiftyfoldError, match="start-up of ours: the process ended with status 1, no token"):
        start_up.start_up("ours", tmp_path / "nothing", "float32", 1, rounds=1)
