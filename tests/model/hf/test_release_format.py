"""The released checkpoint format: DeepSeek's names, and FP8 and FP4 weights whose scales are preserved bit for bit."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import DeepseekV4ForCausalLM, FineGrainedFP8Config

from model.config import ModelConfig
from model.errors import CheckpointError, ConfigError
from model.hf import export_pretrained, import_pretrained
from model.hf.exporting import _writer
from model.hf.safetensors_folder import INDEX, list_tensors
from model.transformer import Transformer
from tests.model.networks import EXACT, build

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
SIZES = {"hidden_size": 64, "expert_size": 32, "vocab_size": 64}
WHOLE_TILES = {"hidden_size": 128, "expert_size": 128, "q_lora_rank": 128, "head_dim": 64, "o_lora_rank": 64}


def tensors_of(folder):
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def rewrite(folder, change):
    """Replace stored tensors by ``change(name, tensor)``; None keeps a tensor."""
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            changed = change(name, tensor)
            if changed is not None:
                tensors[name] = changed
        save_file(tensors, shard)


def forget_who_wrote(folder):
    """Remove our own key from config.json."""
    content = json.loads((folder / "config.json").read_text())
    del content["fiftyfold"]
    (folder / "config.json").write_text(json.dumps(content))


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def assert_same_bytes(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(bits(a[name]), bits(b[name])), name


def random_codes(name, tensor):
    """Return random stored bytes: all FP4 codes, all finite FP8 codes, and scales larger than necessary."""
    if tensor.dtype == torch.int8:
        return torch.randint(-128, 128, tensor.shape, dtype=torch.int8)
    if tensor.dtype == torch.float8_e4m3fn:
        codes = torch.randint(0, 127, tensor.shape, dtype=torch.uint8)  # 127 is NaN
        return (codes | (torch.randint(0, 2, tensor.shape, dtype=torch.uint8) << 7)).view(torch.float8_e4m3fn)
    if tensor.dtype == torch.float8_e8m0fnu:
        return torch.randint(0, 240, tensor.shape, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    return None


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_a_round_trip_is_bit_exact_whatever_the_codes(tmp_path, experts):
    export_pretrained(build(**SIZES, mtp_layers=1), tmp_path / "a", format="released", experts=experts)
    torch.manual_seed(1)
    rewrite(tmp_path / "a", random_codes)
    forget_who_wrote(tmp_path / "a")
    ours = import_pretrained(tmp_path / "a")
    assert ours.config.qat is (experts == "fp4") and (ours.config.kv_format, ours.config.index_format) == ("fp8", "fp4")
    export_pretrained(ours, tmp_path / "b", format="released", max_shard_bytes=100_000)
    stored = tensors_of(tmp_path / "a")
    assert_same_bytes(tensors_of(tmp_path / "b"), stored)
    assert (bits(stored["layers.0.attn.wq_b.weight"]) == 0x80).any()  # a negative zero
    assert (tmp_path / "b" / INDEX).exists() and len(list((tmp_path / "b").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("code", [0, 254])
def test_the_ends_of_the_scale_range(tmp_path, code):
    export_pretrained(build(**SIZES), tmp_path / "a", format="released")

    def change(name, tensor):
        if name == "layers.1.attn.wkv.weight":  # 0, 2 ** -9 and 1.75, negative and positive
            codes = torch.tensor([0x00, 0x01, 0x3E, 0x80, 0x81, 0xBE], dtype=torch.uint8)
            return codes[torch.arange(tensor.numel()) % 6].view_as(tensor).view(torch.float8_e4m3fn)
        if name == "layers.1.attn.wkv.scale":
            return torch.full_like(bits(tensor), code).view(torch.float8_e8m0fnu)
        if name == "layers.1.ffn.experts.2.w1.weight":
            return torch.full_like(tensor, 0x12)  # 1.0 and 0.5
        if name == "layers.1.ffn.experts.2.w1.scale":
            return torch.full_like(bits(tensor), code).view(torch.float8_e8m0fnu)
        return None

    rewrite(tmp_path / "a", change)
    ours = import_pretrained(tmp_path / "a")
    scale = 2.0 ** (code - 127)
    assert ours.layers[1].attn.wkv.weight.flatten()[:3].tolist() == [0.0, 2.0**-9 * scale, 1.75 * scale]
    assert ours.layers[1].ffn.w1[2, 0, :2].tolist() == [1.0 * scale, 0.5 * scale]
    export_pretrained(ours, tmp_path / "b", format="released")
    assert_same_bytes(tensors_of(tmp_path / "b"), tensors_of(tmp_path / "a"))


def test_a_changed_weight_gets_a_scale_that_fits_and_the_others_keep_theirs(tmp_path):
    export_pretrained(build(**SIZES), tmp_path / "a", format="released")
    rewrite(tmp_path / "a", random_codes)
    ours = import_pretrained(tmp_path / "a")
    before = tensors_of(tmp_path / "a")
    with torch.no_grad():
        ours.layers[1].ffn.w1[2, 5, 32:] = torch.linspace(-1, 1, 32)
        ours.layers[2].attn.wq_b.weight[:] = torch.randn_like(ours.layers[2].attn.wq_b.weight)
    export_pretrained(ours, tmp_path / "b", format="released")
    after = tensors_of(tmp_path / "b")
    name = "layers.1.ffn.experts.2.w1.scale"
    changed = (bits(after[name]) != bits(before[name])).nonzero().tolist()
    assert changed == [[5, 1]] and bits(after[name])[5, 1] == 127 - 2  # 1 / 6 lies between 2 ** -3 and 2 ** -2
    again = import_pretrained(tmp_path / "b")
    torch.testing.assert_close(again.layers[2].attn.wq_b.weight, ours.layers[2].attn.wq_b.weight, rtol=2**-4, atol=1e-2)
    differing = {n for n in after if not torch.equal(bits(after[n]), bits(before[n]))}
    assert differing == {
        name,
        "layers.1.ffn.experts.2.w1.weight",
        "layers.2.attn.wq_b.weight",
        "layers.2.attn.wq_b.scale",
    }


def test_names_shapes_and_dtypes_are_the_released_ones(tmp_path):
    """V4-Pro's table of tensors at test sizes: weight, scale."""
    model = build(**SIZES, mtp_layers=1, layers=("hca", "csa"), num_hash_layers=1)
    export_pretrained(model, tmp_path / "a", format="released")
    found = {name: (t.dtype, t.shape) for name, t in list_tensors(tmp_path / "a").items()}
    d, q, heads, c = 64, 16, 4, 16
    expected = {
        "embed.weight": ("BF16", (64, d)),
        "head.weight": ("BF16", (64, d)),
        "norm.weight": ("BF16", (d,)),
        "hc_head_base": ("F32", (4,)),
        "hc_head_fn": ("F32", (4, 4 * d)),
        "hc_head_scale": ("F32", (1,)),
        "layers.0.ffn.gate.tid2eid": ("I64", (64, 2)),
        "layers.1.ffn.gate.bias": ("F32", (4,)),
        "mtp.0.ffn.gate.bias": ("F32", (4,)),
    }
    for block in ("layers.0", "layers.1", "mtp.0"):
        fp8 = {
            "attn.wq_a": (q, d),
            "attn.wq_b": (heads * c, q),
            "attn.wkv": (c, d),
            "attn.wo_a": (2 * 8, heads * c // 2),
            "attn.wo_b": (d, 2 * 8),
            "ffn.shared_experts.w1": (32, d),
            "ffn.shared_experts.w2": (d, 32),
            "ffn.shared_experts.w3": (32, d),
        }
        if block == "mtp.0":
            fp8 |= {"e_proj": (d, d), "h_proj": (d, d)}
            expected |= {f"mtp.0.{n}.weight": ("BF16", (d,)) for n in ("enorm", "hnorm", "norm")}
            expected |= {
                "mtp.0.hc_head_base": ("F32", (4,)),
                "mtp.0.hc_head_fn": ("F32", (4, 4 * d)),
                "mtp.0.hc_head_scale": ("F32", (1,)),
            }
        if block == "layers.1":
            fp8["attn.indexer.wq_b"] = (8 * 8, q)
            expected[f"{block}.attn.indexer.weights_proj.weight"] = ("BF16", (8, d))
        for prefix, rows, width, ratio in (
            ("layers.0.attn.compressor", c, c, 12),
            ("layers.1.attn.compressor", 2 * c, c, 4),
            ("layers.1.attn.indexer.compressor", 2 * 8, 8, 4),
        ):
            if prefix.startswith(block):
                expected |= {f"{prefix}.{n}.weight": ("BF16", (rows, d)) for n in ("wkv", "wgate")}
                expected |= {f"{prefix}.norm.weight": ("BF16", (width,)), f"{prefix}.ape": ("F32", (ratio, rows))}
        for name, (rows, columns) in fp8.items():
            expected[f"{block}.{name}.weight"] = ("F8_E4M3", (rows, columns))
            expected[f"{block}.{name}.scale"] = ("F8_E8M0", (-(-rows // 128), -(-columns // 128)))
        for e in range(4):
            for w, (rows, columns) in {"w1": (32, d), "w2": (d, 32), "w3": (32, d)}.items():
                expected[f"{block}.ffn.experts.{e}.{w}.weight"] = ("I8", (rows, columns // 2))
                expected[f"{block}.ffn.experts.{e}.{w}.scale"] = ("F8_E8M0", (rows, columns // 32))
        expected |= {f"{block}.{n}.weight": ("BF16", (d,)) for n in ("attn_norm", "ffn_norm")}
        expected |= {
            f"{block}.attn.q_norm.weight": ("BF16", (q,)),
            f"{block}.attn.kv_norm.weight": ("BF16", (c,)),
            f"{block}.attn.attn_sink": ("F32", (heads,)),
            f"{block}.ffn.gate.weight": ("BF16", (4, d)),
        }
        for n in ("attn", "ffn"):
            expected |= {
                f"{block}.hc_{n}_fn": ("F32", (24, 4 * d)),
                f"{block}.hc_{n}_base": ("F32", (24,)),
                f"{block}.hc_{n}_scale": ("F32", (3,)),
            }
    assert found == expected
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert config["compress_ratios"] == [12, 4, 0] and config["expert_dtype"] == "fp4"
    assert config["quantization_config"]["scale_fmt"] == "ue8m0"


@pytest.mark.parametrize(
    ("preset", "tensors", "size"), [("v4-flash", 69_187, 159_609_485_896), ("v4-pro", 145_116, 864_704_792_696)]
)
def test_the_releases_come_out_to_the_tensor_and_the_byte(preset, tensors, size):
    # Flash: the sum of its files. Pro: the published 805.32 GiB.
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_preset(preset))
    found = _writer(model, "released", "fp4")[1]
    assert len(found) == tensors and sum(found.values()) == size


def test_a_saved_size_is_the_announced_one(tmp_path):
    model = build(**SIZES, mtp_layers=1)
    for layout in ("transformers", "released"):
        export_pretrained(model, tmp_path / layout, format=layout)
        assert {n: t.nbytes for n, t in tensors_of(tmp_path / layout).items()} == _writer(model, layout, "fp4")[1]
        index = json.loads((tmp_path / layout / INDEX).read_text())
        assert index["metadata"]["total_size"] == sum(_writer(model, layout, "fp4")[1].values())


@pytest.mark.parametrize("experts", ["fp4", "fp8"])
def test_transformers_reads_the_same_values_from_what_we_write(tmp_path, monkeypatch, experts):
    # transformers checks for this library even though dequantizing on a CPU does not use it.
    monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda: True)
    model = build(**WHOLE_TILES, mtp_layers=1, layers=("sliding", "csa", "hca", "csa"), yarn_factor=4.0)
    export_pretrained(model, tmp_path / "a", format="released", experts=experts)
    oracle, info = DeepseekV4ForCausalLM.from_pretrained(
        tmp_path / "a", quantization_config=FineGrainedFP8Config(dequantize=True), output_loading_info=True
    )
    assert not any(info.values()), info
    oracle = oracle.float().eval()
    oracle.set_attn_implementation("eager")
    ours = import_pretrained(tmp_path / "a", **EXACT)
    ids = torch.randint(0, 50, (1, 90))
    with torch.no_grad():
        expected = oracle(ids, use_cache=False).logits
        torch.testing.assert_close(ours(ids), expected, atol=1e-4 * float(expected.std()), rtol=0)


def test_fp4_experts_are_written_as_fp8_without_loss(tmp_path):
    model = build(**SIZES, qat=True)
    export_pretrained(model, tmp_path / "fp4", format="released")
    fp4 = import_pretrained(tmp_path / "fp4")
    export_pretrained(fp4, tmp_path / "fp8", format="released", experts="fp8")
    assert json.loads((tmp_path / "fp8/config.json").read_text())["expert_dtype"] == "fp8"
    fp8 = import_pretrained(tmp_path / "fp8")
    assert all(torch.equal(a, b) for a, b in zip(fp4.state_dict().values(), fp8.state_dict().values()))
    with torch.no_grad():
        fp4.layers[2].ffn.w2[1] = 2.0
        fp4.layers[2].ffn.w2[1, 0] = 2.0**-30
    with pytest.raises(CheckpointError, match=r"'layers.2.ffn.experts.1.w2.weight' cannot be written .* tile \[0, 0\]"):
        export_pretrained(fp4, tmp_path / "no", format="released", experts="fp8")
    assert not (tmp_path / "no").exists()


def test_experts_rounded_in_training_are_written_as_they_computed(tmp_path):
    model = build(**SIZES, qat=True).eval()
    export_pretrained(model, tmp_path / "a", format="released")
    again = import_pretrained(tmp_path / "a")
    rounded = model.layers[1].ffn.stored_experts()
    for ours, stack in zip(rounded, ("w1", "w3", "w2")):
        assert torch.equal(ours, getattr(again.layers[1].ffn, stack))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({**SIZES, "expert_size": 40}, "expert_size: .* a multiple of 32, .*, found 40"),
        ({**SIZES, "hidden_size": 48}, "hidden_size: .* a multiple of 32, .*, found 48"),
        ({**SIZES, "csa_ratio": 8}, "csa_ratio: .* needs 4 in the released layout, found 8"),
        ({**SIZES, "hca_ratio": 4}, "hca_ratio: .* other than 4 in the released layout, found 4"),
    ],
)
def test_networks_that_the_format_cannot_hold_are_refused(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        export_pretrained(build(**overrides), tmp_path / "a", format="released")


WEIGHT, SCALE = "layers.1.attn.wkv.weight", "layers.1.attn.wkv.scale"
EXPERT = "layers.1.ffn.experts.3.w2"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            WEIGHT,
            lambda t: torch.full_like(bits(t), 0x7F).view(t.dtype),
            f"'{WEIGHT}' holds values that are not finite",
        ),
        (SCALE, lambda t: torch.full_like(bits(t), 255).view(t.dtype), f"'{SCALE}' holds values that are not finite"),
        (SCALE, lambda t: torch.full_like(bits(t), 254).view(t.dtype), f"'{WEIGHT}' holds values that are not finite"),
        (SCALE, lambda t: bits(t), f"'{SCALE}' is U8, expected F8_E8M0"),
        (WEIGHT, lambda t: bits(t).view(torch.int8), f"'{WEIGHT}' is I8, expected BF16, F16, F32, F8_E4M3"),
        (SCALE, lambda t: torch.cat((t, t)), rf"'{SCALE}' has shape \[2, 1\], expected \[1, 1\]"),
        (f"{EXPERT}.weight", lambda t: t[:, 1:].clone(), r"w2.weight' has shape \[64, 15\], expected \[64, 16\]"),
        (f"{EXPERT}.scale", lambda t: t[1:].clone(), r"w2.scale' has shape \[63, 1\], expected \[64, 1\]"),
    ],
)
def test_quantized_tensors_that_do_not_fit_are_named(tmp_path, name, change, message):
    export_pretrained(build(**SIZES), tmp_path / "a", format="released")
    rewrite(tmp_path / "a", lambda n, tensor: change(tensor) if n == name else None)
    with pytest.raises(CheckpointError, match=message) as error:
        import_pretrained(tmp_path / "a")
    assert "\n" not in str(error.value)


def test_quantized_tensors_without_quantization_config_are_refused(tmp_path):
    export_pretrained(build(**SIZES), tmp_path / "a", format="released")
    path = tmp_path / "a/config.json"
    content = json.loads(path.read_text())
    del content["quantization_config"]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"'quantization_config' is missing, but tensor 'layers.0.* is F8_E4M3"):
        import_pretrained(tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "huggingface"}, "format: 'huggingface' is not one of"),
        ({"experts": "int4"}, "experts: 'int4' is not"),
    ],
)
def test_unknown_formats_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        export_pretrained(build(), tmp_path / "a", **options)
    assert not list(tmp_path.iterdir())
