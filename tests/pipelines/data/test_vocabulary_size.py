"""The size of the network's vocabulary: the tokenizer's, or a larger one that the recipe sets."""

import pytest
from plain_training import Record, trainer_for

from model import checkpoint
from model.errors import ConfigError
from model.hf import import_pretrained
from model.tokenizer import load_tokenizer
from pipelines.__main__ import main
from pipelines.data.check import check_prepared
from pipelines.data.manifest import read_manifest
from pipelines.recipe.loading import load_recipe, overlay, recipe_from_dict, with_overrides
from pipelines.recipe.yaml_format import dump_yaml


def checked(recipe):
    return check_prepared(recipe, read_manifest(recipe.data_folder))


@pytest.fixture
def file(prepared, tmp_path):
    values = prepared.to_dict()
    del values["model"]["vocab_size"], values["data"]["vocabulary"]
    (tmp_path / "recipe.yaml").write_text(dump_yaml(values))
    return tmp_path / "recipe.yaml"


def test_a_vocabulary_that_nobody_sets_follows_the_tokenizer(file):
    assert checked(load_recipe([file])).model.vocab_size == 258
    assert checked(load_recipe([file], ["model.preset=small"])).model.vocab_size == 258


def test_a_vocabulary_below_the_tokenizer_is_refused(file, tmp_path, capsys):
    for size in (100, 257):
        with pytest.raises(ConfigError, match=rf"^model\.vocab_size: {size} is less than the 258 token IDs of"):
            checked(load_recipe([file], [f"model.vocab_size={size}"]))
    assert main(["train", "--config", str(file), "--model.vocab_size", "100"]) == 2
    assert capsys.readouterr().err.startswith("error: model.vocab_size: 100 is less than")


def test_a_larger_vocabulary_is_kept_however_it_is_set(file, tmp_path):
    (tmp_path / "larger.yaml").write_text("model: {vocab_size: 300}")
    plain = load_recipe([file])
    assert (plain.model.vocab_size, plain.data.vocabulary) == (258, "tokenizer")
    for recipe in (
        load_recipe([file], ["model.vocab_size=300"]),
        load_recipe([file, tmp_path / "larger.yaml"]),
        overlay(plain, tmp_path / "larger.yaml"),
        with_overrides(plain, {"model.vocab_size": 300}),
    ):
        for copy in (recipe, recipe_from_dict(recipe.to_dict()), with_overrides(recipe, {"run.seed": 5})):
            assert checked(copy).model.vocab_size == 300


def test_a_printed_recipe_keeps_following_the_tokenizer_until_a_size_is_set(file, tmp_path):
    (tmp_path / "printed.yaml").write_text(dump_yaml(load_recipe([file], ["model.preset=small"]).to_dict()))
    assert checked(load_recipe([tmp_path / "printed.yaml"])).model.vocab_size == 258
    assert checked(load_recipe([tmp_path / "printed.yaml"], ["model.vocab_size=512"])).model.vocab_size == 512


def test_a_padded_vocabulary_is_trained_saved_and_exported(file, tmp_path):
    recipe = checked(load_recipe([file], ["model.vocab_size=300"]))
    record = Record(keep=tmp_path / "kept")
    trainer_for(recipe, record).run()
    folder = tmp_path / "kept/6"
    model = checkpoint.load(folder)
    assert model.embed.weight.shape[0] == model.head.weight.shape[0] == 300
    tokenizer = load_tokenizer(folder, model_vocab_size=300)
    assert tokenizer.vocab_size == 258 and tokenizer.decode([299, tokenizer.encode("a")[0]]) == "a"
    assert main(["export", "--from", str(folder), "--to", str(tmp_path / "hf")]) == 0
    assert import_pretrained(tmp_path / "hf").config.vocab_size == 300
