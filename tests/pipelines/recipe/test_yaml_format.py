"""YAML that a recipe is printed as."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines import __main__ as cli
from pipelines.recipe.yaml_format import dump_yaml, parse_yaml


@settings(max_examples=300)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
def test_any_text_survives_printing(text):
    assert parse_yaml(dump_yaml({"a": text, "b": [text]})) == {"a": text, "b": [text]}


@pytest.mark.parametrize("mark", ["\x85", "\u2028", "\u2029", "\ufeff", "\x00", "\x1b", "\n", "\r\n", "\t", "\xa0"])
def test_tokens_with_unprintable_characters_survive_a_printed_recipe(tmp_path, capsys, mark):
    assert cli.main(["train", "--data.eos_token", f"a{mark}b{mark}", "--print-config"]) == 0
    assert parse_yaml(capsys.readouterr().out)["data"]["eos_token"] == f"a{mark}b{mark}"
