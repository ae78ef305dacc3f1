"""Chat templates and special tokens that the files beside a tokenizer declare."""

import json

import pytest

from model.errors import ConfigError
from model.tokenizer.side_files import SideFiles


def test_templates_by_precedence(tmp_path):
    assert SideFiles.read(tmp_path).chat_templates() == {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    assert SideFiles.read(tmp_path).chat_templates() == {"default": ("tokenizer_config.json", "config")}
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert SideFiles.read(tmp_path).chat_templates() == {"default": ("chat_template.json", "json")}
    (tmp_path / "chat_template.jinja").write_text("jinja")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert SideFiles.read(tmp_path).chat_templates() == {
        "default": ("chat_template.jinja", "jinja"),
        "tool_use": ("additional_chat_templates/tool_use.jinja", "tools"),
    }


def test_named_templates(tmp_path):
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert {name: text for name, (_, text) in SideFiles.read(tmp_path).chat_templates().items()} == {
        "default": "a",
        "tool_use": "b",
    }


@pytest.mark.parametrize("value", [5, {"default": "a"}, ["a"], [{"name": "a"}], [{"name": 1, "template": "a"}]])
def test_malformed_templates_are_named(tmp_path, value):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
    with pytest.raises(ConfigError, match=r"tokenizer_config.json: chat_template: expected a template or named"):
        SideFiles.read(tmp_path).chat_templates()


def test_a_file_that_is_no_json_is_named(tmp_path):
    (tmp_path / "chat_template.json").write_text("{")
    with pytest.raises(ConfigError, match=r"chat_template.json: not valid JSON"):
        SideFiles.read(tmp_path).chat_templates()


def test_special_tokens_by_role(tmp_path):
    config = {"eos_token": {"content": "</s>"}, "pad_token": "<pad>", "additional_special_tokens": ["<x>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": "<other>", "unk_token": "<unk>"}))
    want = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    assert SideFiles.read(tmp_path).special_token_map() == want
