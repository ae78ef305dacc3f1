"""The export step: round trips between the three checkpoint formats."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import checkpoint
from model.config import CACHE_FORMATS, ModelConfig
from model.errors import CheckpointError, ConfigError
from model.hf import import_pretrained
from model.tokenizer import ByteTokenizer, load_tokenizer
from model.transformer import Transformer
from pipelines.__main__ import main
from pipelines.steps.export import run


@pytest.fixture()
def ours(tmp_path):
    torch.manual_seed(0)
    # Select all entries of 60 tokens: ties at zero would be broken differently elsewhere.
    model = Transformer(ModelConfig(mtp_layers=1, index_topk=15)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # ones would hide a lost norm
                parameter.uniform_(0.5, 1.5)
    checkpoint.save(model, tmp_path / "ours", ByteTokenizer())
    return tmp_path / "ours"


def logits(folder):
    ids = torch.arange(60).unsqueeze(0)
    with torch.inference_mode():
        return checkpoint.load(folder)(ids)


def export(source, target, *options):
    return main(["export", "--from", str(source), "--to", str(target), *options])


def close(a, b):
    torch.testing.assert_close(logits(a), logits(b), rtol=1e-4, atol=1e-5)


def test_a_round_trip_keeps_the_network(ours, tmp_path, capsys):
    assert export(ours, tmp_path / "hf") == 0
    assert "transformers keeps its cache in floats" in capsys.readouterr().out
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "deepseek_v4"
    assert export(tmp_path / "hf", tmp_path / "back", "--format", "fiftyfold") == 0
    assert checkpoint.load_config(ours) == checkpoint.load_config(tmp_path / "back")
    close(ours, tmp_path / "back")
    before, after = checkpoint.load(ours).state_dict(), checkpoint.load(tmp_path / "back").state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():  # experts are written as the network uses them, quantized
        assert torch.equal(tensor, after[name]) or re.search(r"ffn\.w[123]$", name), name
    assert isinstance(load_tokenizer(tmp_path / "back"), ByteTokenizer)


def test_the_released_format_rounds_what_it_must_and_no_more(ours, tmp_path):
    assert export(ours, tmp_path / "released", "--format", "released") == 0
    assert export(tmp_path / "released", tmp_path / "again", "--format", "fiftyfold") == 0
    before, after = checkpoint.load(ours).state_dict(), checkpoint.load(tmp_path / "again").state_dict()
    for name in ("layers.0.attn.wq_a.weight", "layers.1.ffn.w1", "mtp.0.e_proj.weight"):
        error = (before[name] - after[name]).abs().max() / before[name].abs().max()
        assert 0 < error < 0.2, name
    for name in ("layers.0.attn_residual.fn", "layers.0.attn.sink", "layers.1.attn.compressor.ape"):
        assert torch.equal(before[name], after[name]), name
    assert export(tmp_path / "again", tmp_path / "twice", "--format", "released") == 0
    assert export(tmp_path / "twice", tmp_path / "thrice", "--format", "fiftyfold") == 0
    close(tmp_path / "again", tmp_path / "thrice")


@pytest.mark.parametrize("format", ["transformers", "released"])
def test_an_export_prints_how_far_it_rounds_weights(ours, tmp_path, capsys, format):
    assert export(ours, tmp_path / "there", "--format", format) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("weights are rounded to")]
    assert export(tmp_path / "there", tmp_path / "back", "--format", "fiftyfold") == 0
    before, after = checkpoint.load(ours).state_dict(), checkpoint.load(tmp_path / "back").state_dict()
    changes = {name: (tensor - after[name]).abs().max().item() for name, tensor in before.items()}
    experts = max(change for name, change in changes.items() if re.search(r"ffn\.w[123]$", name))
    assert f"FP4 (by at most {experts:.2g})" in line
    for name, others in (("FP8", r"attn\.wq_a\.weight$"), ("BF16", r"^embed")):
        printed = re.search(rf"{name} \(by at most (\S+)\)", line)
        assert bool(printed) == (format == "released")
        if printed:
            assert 0 < max(change for name, change in changes.items() if re.search(others, name)) <= float(printed[1])
    # Values that were rounded once are written as they are.
    assert export(tmp_path / "there", tmp_path / "again", "--format", format) == 0
    assert "weights are rounded" not in capsys.readouterr().out


@pytest.mark.parametrize("format", ["transformers", "released"])
@pytest.mark.parametrize(("qat", "precision"), [(False, "bf16"), (True, "fp4")])
def test_how_the_network_rounds_is_not_lost(tmp_path, format, qat, precision):
    model = Transformer(ModelConfig(qat=qat, kv_format=precision, index_format="fp8", rope_format="fp32"))
    checkpoint.save(model, tmp_path / "ours")
    assert export(tmp_path / "ours", tmp_path / "there", "--format", format) == 0
    assert export(tmp_path / "there", tmp_path / "back", "--format", "fiftyfold") == 0
    config = checkpoint.load_config(tmp_path / "back")
    assert config == model.config
    if format == "released":  # FP4 only for networks trained with it
        w1, again = model.layers[1].ffn.w1, checkpoint.load(tmp_path / "back").layers[1].ffn.w1
        assert ((w1 - again).abs().max() / w1.abs().max() < 0.08) == (not qat)


def test_transformers_reads_model_and_tokenizer(ours, tmp_path):
    from transformers import AutoTokenizer, DeepseekV4ForCausalLM

    assert export(ours, tmp_path / "hf") == 0
    again = checkpoint.load(ours)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("naïve", add_special_tokens=False)["input_ids"] == ByteTokenizer().encode("naïve")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    theirs, info = DeepseekV4ForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(60).unsqueeze(0)
    with torch.inference_mode():
        exact = import_pretrained(tmp_path / "hf", **dict.fromkeys(CACHE_FORMATS, "fp32"))(ids)
        torch.testing.assert_close(theirs(ids).logits, exact, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(exact, again(ids), atol=1e-4)
    # Saved by transformers: other names for three norms, and no prediction module.
    theirs.save_pretrained(tmp_path / "theirs")
    assert export(tmp_path / "theirs", tmp_path / "home", "--format", "fiftyfold") == 0
    home = checkpoint.load(tmp_path / "home")
    assert home.config == again.config.replace(mtp_layers=0)
    with torch.inference_mode():
        torch.testing.assert_close(home(ids), again(ids), rtol=1e-4, atol=1e-5)


def test_a_file_for_llama_cpp(tmp_path, capsys):
    from gguf import GGUFReader

    config = ModelConfig(layers=("csa", "hca"), hca_ratio=128, index_head_dim=64, mtp_layers=1)
    checkpoint.save(Transformer(config), tmp_path / "ours", ByteTokenizer())
    target = tmp_path / "new" / "model.gguf"
    assert export(tmp_path / "ours", target, "--format", "gguf", "--type", "q8_0") == 0
    assert GGUFReader(target).get_field("deepseek4.block_count").contents() == 2
    printed = capsys.readouterr().out
    parts = ("(gguf q8_0, ", "llama.cpp keeps its cache in floats", "without a vocabulary", "without the multi-")
    for part in (*parts, "weights of routed experts are rounded to FP4"):
        assert part in printed
    assert export(tmp_path / "ours", target, "--format", "gguf") == 2
    assert "already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--from", "OURS"], "--to: is missing; it names the folder to write, or the file for --format gguf"),
        (["--from", "OURS", "--to", "OURS"], "already exists"),
        (["--from", "OURS", "--to", "new", "--format", "onnx"], "'onnx' is not one of fiftyfold"),
        (["--from", "OURS", "--to", "new", "--format", "gguf", "--experts", "fp4"], "--experts: changes nothing in"),
        (["--from", "OURS", "--to", "new", "--experts", "fp8"], "--experts: changes nothing in format 'transformers'"),
        (["--from", "OURS", "--to", "new", "--type", "f16"], "--type: changes nothing in format 'transformers'"),
        (
            ["--from", "OURS", "--to", "new", "--format", "gguf"],
            "error: --from: index_head_dim: llama.cpp's deepseek4 needs at least 64, found 16",
        ),
        (["--from", "OURS", "--to", "new", "--model.window", "4"], "--model.window would change nothing"),
        (["--from", "nowhere", "--to", "new"], "error: --from: nowhere: no such checkpoint folder"),
        (["--from", "OURS", "--to", "new", "--tokenizer", "none.json"], "none.json: No such file"),
    ],
)
def test_bad_requests_are_one_sentence_and_write_nothing(ours, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["export", *(str(ours) if option == "OURS" else option for option in options)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_what_a_format_cannot_hold_is_refused(tmp_path, capsys):
    checkpoint.save(Transformer(ModelConfig(layers=("gqa",))), tmp_path / "gqa")
    assert export(tmp_path / "gqa", tmp_path / "out") == 2
    assert "--from: layers: no checkpoint format has layers of gqa; there" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("gguf", "--type", "f16"), "holds 3.4e+38, but f16 holds values up to 65504; write f32"),
        (("released",), "holds values that are too large for BF16"),
    ],
)
def test_a_weight_that_a_format_cannot_hold_is_named_with_the_option(tmp_path, capsys, options, message):
    model = Transformer(ModelConfig(layers=("csa", "hca"), hca_ratio=128, index_head_dim=64))
    with torch.no_grad():
        model.embed.weight[0, 0] = 3.4e38
    checkpoint.save(model, tmp_path / "ours")
    assert export(tmp_path / "ours", tmp_path / "out", "--format", *options) == 2
    assert f"error: --from: tensor 'embed.weight' {message}\n" == capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_an_unknown_type_of_weights_is_named_by_its_option(ours, tmp_path):
    with pytest.raises(ConfigError, match=r"^--type: 'q4_0' is not one of f32, f16, q8_0$"):
        run(None, ours, tmp_path / "out", "gguf", weight_type="q4_0")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_what_is_left_out_of_a_folder_is_printed(ours, tmp_path, capsys):
    assert export(ours, tmp_path / "released", "--format", "released") == 0
    shard = next((tmp_path / "released").glob("*.safetensors"))
    stages = {"mtp.0.main_proj.weight": torch.ones(2), "mtp.2.main_proj.weight": torch.ones(2)}
    save_file({**load_file(shard), **stages}, tmp_path / "released" / "model.safetensors")
    shard.unlink()
    next((tmp_path / "released").glob("*.index.json")).unlink()
    capsys.readouterr()
    assert export(tmp_path / "released", tmp_path / "main", "--format", "fiftyfold") == 0
    assert "tensors of draft modules" in capsys.readouterr().out
    assert checkpoint.load_config(tmp_path / "main") == checkpoint.load_config(ours).replace(mtp_layers=0)


@pytest.mark.parametrize("source", ["ours/config.json", "hf/config.json", "hf/model-00001-of-00001.safetensors"])
def test_a_file_instead_of_a_folder_is_named(ours, tmp_path, capsys, source):
    assert export(ours, tmp_path / "hf") == 0
    assert export(tmp_path / source, tmp_path / "new") == 2
    assert f"{source}: is not a folder, expected the checkpoint folder that holds" in capsys.readouterr().err


def test_other_steps_say_what_to_do_with_a_folder_of_another_kind(ours, tmp_path, capsys):
    assert export(ours, tmp_path / "hf") == 0
    with pytest.raises(CheckpointError, match="model_type 'deepseek_v4' in another format; convert it with"):
        checkpoint.load(tmp_path / "hf")
    capsys.readouterr()
    assert main(["budget", "--model", str(tmp_path / "hf"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["config"]["layers"] == ["sliding", "csa", "hca", "csa"]
