"""The export step keeps what belongs to a tokenizer, or names what it leaves behind."""

import json

import pytest
from tokenizer_files import byte_level, write_files

from model import checkpoint
from model.config import ModelConfig
from model.hf import export_pretrained
from model.tokenizer import ByteTokenizer, load_tokenizer
from model.transformer import Transformer
from pipelines.__main__ import main

CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def export(source, target, *options):
    return main(["export", "--from", str(source), "--to", str(target), *options])


def pretrained(folder, in_config):
    """Write a checkpoint folder with a chat tokenizer, the template in ``tokenizer_config.json`` or in a file."""
    content = byte_level(added=["<|im_start|>", "<|im_end|>", "<pad>"])
    content["padding"] = {"strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 260}
    content["padding"] |= {"pad_type_id": 0, "pad_token": "<pad>"}
    export_pretrained(Transformer(ModelConfig(vocab_size=261)), folder)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<s>", "__type": "AddedToken"},
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        **({"chat_template": CHAT} if in_config else {}),
    }
    settings = {"eos_token_id": [1, 259], "pad_token_id": 260, "temperature": 0.6, "top_p": 0.95}
    write_files(folder, content, tokenizer_config=config, generation_config=settings)
    if not in_config:
        (folder / "chat_template.jinja").write_text(CHAT)
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/tools.jinja").write_text("tools")
    return folder


@pytest.mark.parametrize("in_config", [True, False])
def test_a_round_trip_keeps_the_tokenizer(tmp_path, in_config, capsys):
    from transformers import AutoTokenizer, GenerationConfig

    assert export(pretrained(tmp_path / "hf", in_config), tmp_path / "ours", "--format", "fiftyfold") == 0
    assert export(tmp_path / "ours", tmp_path / "back") == 0
    assert "left behind" not in capsys.readouterr().out
    before, after = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("hf", "back"))
    for name in ("chat_template", "pad_token_id", "eos_token_id", "bos_token_id", "all_special_ids"):
        assert getattr(after, name) == getattr(before, name), name
    messages = [{"role": "user", "content": "hi"}]
    assert after.apply_chat_template(messages, tokenize=False) == "<|im_start|>user\nhi<|im_end|>\n"
    assert after("abc", add_special_tokens=False)["input_ids"] == [ord(c) + 2 for c in "abc"]  # no padding
    settings = GenerationConfig.from_pretrained(tmp_path / "back")
    assert (settings.eos_token_id, settings.pad_token_id, settings.temperature) == ([1, 259], 260, 0.6)
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, [1, 259], 260)
    assert load_tokenizer(tmp_path / "ours").stop_ids == {1, 259}


def test_files_left_behind_are_printed(tmp_path, capsys):
    folder = pretrained(tmp_path / "hf", in_config=False)
    (folder / "README.md").write_text("x")
    (folder / ".cache").mkdir()
    (folder / ".cache/x").write_text("x")
    assert export(folder, tmp_path / "ours", "--format", "fiftyfold") == 0
    assert "left behind: README.md\n" in capsys.readouterr().out
    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    assert export(folder, tmp_path / "bare", "--format", "fiftyfold") == 0
    printed = capsys.readouterr().out
    assert "without a tokenizer: the source has no tokenizer.json" in printed
    assert (
        "left behind: README.md, additional_chat_templates/tools.jinja, chat_template.jinja, generation_config.json, "
        "tokenizer.model, tokenizer_config.json\n"
    ) in printed


def test_ids_of_the_model_configuration_are_kept(tmp_path):
    folder = pretrained(tmp_path / "hf", in_config=True)
    (folder / "generation_config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": [259, 1], "pad_token_id": 260}))
    assert export(folder, tmp_path / "ours", "--format", "fiftyfold") == 0
    assert export(tmp_path / "ours", tmp_path / "back", "--format", "released") == 0
    settings = json.loads((tmp_path / "back/generation_config.json").read_text())
    assert settings == {"bos_token_id": 0, "eos_token_id": [259, 1], "pad_token_id": 260}


def test_a_tokenizer_without_declared_tokens_takes_them_from_options(tmp_path, capsys):
    checkpoint.save(Transformer(ModelConfig()), tmp_path / "ours")
    folder = write_files(tmp_path / "tokenizer", byte_level(names=("<|start|>", "<|return|>")))
    assert export(tmp_path / "ours", tmp_path / "out", "--eos-token", "<|return|>") == 2
    assert "--eos-token: " in (error := capsys.readouterr().err) and "has no tokenizer.json; name one with" in error
    options = ("--tokenizer", str(folder), "--format", "fiftyfold")
    assert export(tmp_path / "ours", tmp_path / "out", *options) == 2
    assert "--eos-token: must be given" in capsys.readouterr().err
    assert export(tmp_path / "ours", tmp_path / "out", *options, "--eos-token", "<|return|>") == 0
    assert load_tokenizer(tmp_path / "out").eos_id == 1


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path, capsys):
    checkpoint.save(Transformer(ModelConfig()), tmp_path / "ours", ByteTokenizer())
    folder = write_files(tmp_path / "tokenizer", byte_level(added=["<pad>"]))
    assert export(tmp_path / "ours", tmp_path / "out", "--tokenizer", str(folder)) == 2
    assert "has token IDs up to 258, but the model has a vocabulary of 258" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
