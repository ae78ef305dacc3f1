"""Mamba-2 checkpoints to and from transformers."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import Mamba2Config, Mamba2ForCausalLM

from benchmarks.lib.family_networks import CONFIGURATIONS, draw, randomize
from model.config import ModelConfig
from model.errors import CheckpointError, ConfigError
from model.hf import export_pretrained, import_pretrained, read_pretrained_config
from model.transformer import Transformer
from pipelines.__main__ import main
from tests.model.hf.family_parity import (
    assert_equal_logits,
    assert_same_folder,
    change_config,
    change_tensors,
    load_oracle,
)

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()


@pytest.fixture
def folder(tmp_path):
    draw("mamba2").save_pretrained(tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize("changes", CONFIGURATIONS["mamba2"].values(), ids=CONFIGURATIONS["mamba2"])
def test_a_network_of_transformers_is_read_and_written_back(tmp_path, changes):
    oracle = draw("mamba2", **changes)
    oracle.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    ours = assert_same_folder(Mamba2ForCausalLM, oracle, tmp_path / "a", tmp_path)
    assert ours.config.layers == ("mamba2", "mamba2") and ours.config.ffn == "none"
    assert_equal_logits(ours, oracle, torch.randint(0, 50, (2, 43)))


@pytest.mark.parametrize(
    "overrides",
    [
        {"tie_word_embeddings": True, "mixer_options": {"mamba2": {"state_format": "bf16", "state_size": 4}}},
        {"max_positions": 77, "mixer_options": {"mamba2": {"num_heads": 6, "time_step_limit": [0.1, 2]}}},
    ],
)
def test_a_network_of_ours_is_read_by_transformers_and_back(tmp_path, overrides):
    sizes = {"vocab_size": 50, "hidden_size": 16, "layers": ("mamba2",) * 3, "ffn": "none", "hyper_connections": False}
    options = {"head_dim": 8, "state_size": 8, "n_groups": 2} | overrides["mixer_options"]["mamba2"]
    config = ModelConfig(**{**sizes, **overrides, "mixer_options": {"mamba2": options}})
    model = randomize(Transformer(config))
    export_pretrained(model, tmp_path / "a")
    oracle = load_oracle(Mamba2ForCausalLM, tmp_path / "a")
    exact = import_pretrained(tmp_path / "a", mixer_options={"mamba2": {**options, "state_format": "fp32"}})
    assert_equal_logits(exact, oracle, torch.randint(0, 50, (1, 20)))
    again = import_pretrained(tmp_path / "a")
    filled = again.config.mixer_options["mamba2"]
    assert filled == {**model.config.mixer_options["mamba2"], **{key: filled[key] for key in ("expand", "num_heads")}}
    assert again.config == model.config.replace(mixer_options={"mamba2": filled})
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in model.state_dict().items())


def test_names_of_the_authors_and_a_stored_copy_of_a_tied_head_are_read(folder):
    change_config(folder, tie_word_embeddings=True)
    change_tensors(folder, lambda t: {n.replace("embeddings", "embedding"): x for n, x in t.items()})
    lines = []
    ours = import_pretrained(folder, report=lines.append)
    assert torch.equal(ours.embed.weight, load_file(folder / "model.safetensors")["backbone.embedding.weight"])
    assert lines == [f"{folder}: not read: lm_head.weight, because 'tie_word_embeddings' is true"]


def test_infinite_limits_are_read_in_both_spellings(folder):
    expected = read_pretrained_config(folder)
    assert expected.mixer_options["mamba2"]["time_step_limit"] == [0.0, None]
    change_config(folder, time_step_limit=[0.0, float("inf")])
    assert "Infinity]" in (folder / "config.json").read_text()
    assert read_pretrained_config(folder) == expected


def test_the_export_step_converts_both_ways(folder, tmp_path, capsys):
    assert main(["export", "--from", str(folder), "--to", str(tmp_path / "ours"), "--format", "fiftyfold"]) == 0
    assert main(["export", "--from", str(tmp_path / "ours"), "--to", str(tmp_path / "back")]) == 0
    assert json.loads((tmp_path / "back/config.json").read_text())["model_type"] == "mamba2"
    assert main(["export", "--from", str(folder), "--to", str(tmp_path / "no"), "--format", "released"]) == 2
    assert "format: 'released' is not one of transformers, which Mamba-2 has" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bias": True}, "'use_bias': expected false, found true"),
        ({"hidden_act": "gelu"}, 'hidden_act.: expected "silu", found "gelu"'),
        ({"n_groups": 3}, "key 'n_groups': expected a divisor of 4 heads, found 3"),
        ({"num_heads": 5}, "'num_heads': 5 heads of head_dim 16 are not expand 2 times hidden_size 32"),
        ({"state_size": 0}, "key 'state_size': expected a whole number of at least 1, found 0"),
        ({"state_size": None}, "'state_size' is missing"),
        ({"time_step_limit": [0.0]}, r"'time_step_limit': expected two numbers, found \[0.0\]"),
        ({"time_step_limit": [2.0, 1.0]}, "key 'time_step_limit': expected two rising numbers"),
        ({"num_hidden_layers": 0}, "key 'num_hidden_layers': expected 1 to 1000 layers, found 0"),
        ({"num_hidden_layers": 3}, "key 'num_hidden_layers' is 3, but the folder has tensors of 2 layers, 0 to 1"),
        ({"state_size": 16}, r"mixer.* has shape .* by .*'state_size' 16.* of config.json"),
        ({"vocab_size": 51}, r"expected \[51, 32\] by 'vocab_size' 51 of config.json"),
        ({"quantization_config": {"quant_method": "awq"}}, "'quantization_config': quantized weights are not supp"),
        ({"fiftyfold": {"state_format": "fp8"}}, "key 'state_format': expected one of fp32, bf16, found 'fp8'"),
        ({"fiftyfold": {"window": 3}}, "'fiftyfold': expected an object of kv_format, .*, state_format, found"),
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
        ({"ffn": "moe"}, "ffn: a Mamba-2 checkpoint needs 'none', found 'moe'"),
        ({"hyper_connections": True}, "hyper_connections: .* needs false, found true"),
        ({"mtp_layers": 1}, "mtp_layers: .* needs 0, found 1"),
        ({"mixer_options": {"mamba2": {"num_heads": 3, "head_dim": 8}}}, "num_heads: .* a multiple of hidden_size 32"),
    ],
)
def test_networks_that_the_format_cannot_describe_are_refused(tmp_path, overrides, message):
    values = {"hidden_size": 32, "layers": ("mamba2",), "ffn": "none", "hyper_connections": False, **overrides}
    with pytest.raises(ConfigError, match=message):
        export_pretrained(Transformer(ModelConfig(**values)), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_the_preset_has_the_released_configuration(tmp_path):
    """state-spaces/mamba2-2.7b as transformers converts it: a vocabulary of 50,277 padded to a multiple of 16."""
    released = Mamba2Config(
        hidden_size=2560, num_heads=80, num_hidden_layers=64, n_groups=1, vocab_size=50_288, tie_word_embeddings=True,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(released.to_json_string(use_diff=False))
    preset = ModelConfig.from_preset("mamba2-2.7b")
    # transformers' default initialization is not that of the authors, who use std 0.02.
    assert read_pretrained_config(tmp_path).replace(qat=False, num_heads=80, init_std=0.02) == preset
