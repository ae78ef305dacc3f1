"""Values of the command line: text as typed, everything else as YAML."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.errors import ConfigError
from pipelines import __main__ as cli
from pipelines.recipe.loading import load_recipe, read_yaml, recipe_from_dict, with_overrides
from pipelines.recipe.yaml_format import dump_yaml, parse_yaml

ODD = ["2024", "007", "1e5", "on", "12:30:45", "null", "1_000", "0x10", "2024-01-01", "true", ".5"]


@pytest.mark.parametrize("name", [text for text in ODD if ":" not in text and text[0].isalnum()])
def test_a_name_may_look_like_a_number_or_a_word_of_yaml(name, capsys):
    for key in ("run.name", "data.name", "sweep.name", "promote.registered_name"):
        section, field = key.split(".")
        assert getattr(getattr(load_recipe([], [f"{key}={name}"]), section), field) == name
    assert cli.main(["train", "--run.name", name, "--print-config"]) == 0
    assert parse_yaml(capsys.readouterr().out)["run"]["name"] == name


@pytest.mark.parametrize(
    "text", [*ODD, "x #b", "${HOME}", "$x", "a: b", "'q'", '"q"', "[a", "{a}", "-", "--x", "é", "=a="]
)
def test_text_is_taken_as_typed(text, tmp_path, capsys):
    for arguments in (["--tracking.experiment", text], [f"--tracking.experiment={text}"]):
        assert cli.main(["train", *arguments, "--print-config"]) == 0
        printed = capsys.readouterr().out
        assert parse_yaml(printed)["tracking"]["experiment"] == text
    (tmp_path / "printed.yaml").write_text(printed)
    again = load_recipe([tmp_path / "printed.yaml"])
    assert again.tracking.experiment == text
    assert with_overrides(again, {"run.seed": 1}).tracking.experiment == text


@settings(max_examples=60)
@given(st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]), min_size=1, max_size=20).filter(str.strip))
def test_any_printable_text_survives_a_printed_recipe(text):
    if not text.isprintable() or text.isspace():
        return
    recipe = load_recipe([], [f"data.text_field={text}"])
    assert recipe.data.text_field == text
    assert recipe_from_dict(parse_yaml(dump_yaml(recipe.to_dict()))) == recipe


def test_a_list_of_text_is_one_value_as_typed_or_a_bracketed_list():
    def sources(value: str) -> tuple[str, ...]:
        return load_recipe([], [f"data.sources={value}"]).data.sources

    assert sources("input.txt") == ("input.txt",)
    assert sources("*.txt") == ("*.txt",)
    assert sources("[v2] notes.txt") == ("[v2] notes.txt",)
    assert sources("a #b.txt") == ("a #b.txt",)
    assert sources("[007, on, 'a b', \"*.txt\", /x/**/*.md]") == ("007", "on", "a b", "*.txt", "/x/**/*.md")
    assert sources("[]") == ()
    assert load_recipe([], ["model.layers=[csa, hca]"]).model.layers == ("csa", "hca")
    with pytest.raises(ConfigError, match=r"^data\.sources: cannot be set to '\[a: b, \*c\]' \("):
        sources("[a: b, *c]")
    with pytest.raises(ConfigError, match=r"^data\.sources\.0: expected a path"):
        sources("[a: b]")


def test_other_settings_are_parsed_as_yaml():
    recipe = load_recipe(
        [],
        [
            *("train.batch_rows=1_024", "train.use_gpu=on", "train.grad_clip=1e-1", "run.seed=-3"),
            *("evaluate.depths=[0, .5, 1e-1]", "train.stability.spike=null", "data.max_text_bytes=010"),
            *("model.qat=false", "train.stages=[{steps: 3, qat: off}]", "sweep.space={model.qat: [on, off]}"),
        ],
    )
    assert (recipe.train.batch_rows, recipe.train.use_gpu, recipe.train.grad_clip) == (1024, True, 0.1)
    assert (recipe.run.seed, recipe.evaluate.depths, recipe.train.stability.spike) == (-3, (0, 0.5, 0.1), None)
    assert recipe.data.max_text_bytes == 10  # no octal number
    assert (recipe.model.qat, recipe.train.stages[0].qat) == (False, False)
    assert recipe.sweep.space == {"model.qat": [True, False]}


@pytest.mark.parametrize("value", ["7", "2024", "1e5", "on", "1.5"])
def test_a_number_in_a_file_where_text_is_expected_says_to_quote_it(value, tmp_path):
    path = tmp_path / "r.yaml"
    for key in ("run: {name: ", "tracking: {experiment: ", "data: {text_field: "):
        path.write_text(f"{key}{value}}}\n")
        with pytest.raises(ConfigError, match=r"^[a-z_.]+: expected text; put it in quotes, found "):
            load_recipe([path])
    path.write_text(f"run: {{folder: {value}}}\n")
    with pytest.raises(ConfigError, match=r"^run\.folder: expected a path; put it in quotes, found "):
        load_recipe([path])
    path.write_text(f"run: {{name: '{value}'}}\n")
    assert load_recipe([path]).run.name == value


def test_a_dollar_in_a_file_is_text(tmp_path):
    (tmp_path / "r.yaml").write_text("tracking: {experiment: '${HOME} ${a.b} ${'}\n")
    assert load_recipe([tmp_path / "r.yaml"]).tracking.experiment == "${HOME} ${a.b} ${"


def test_overrides_of_a_sweep_merge_into_sections():
    base = {"overrides": {"train.workers": 1, "train.optimizer": {"rule": "adamw"}}}
    recipe = recipe_from_dict({"sweep": base})
    assert recipe.sweep.overrides == {"train.workers": 1, "train.optimizer.rule": "adamw"}
    assert load_recipe([], ["sweep.overrides.train.workers=3"]).sweep.overrides == {"train.workers": 3}


@pytest.mark.parametrize("key", ["a..b", ".x", "run.", "run.name.x", "run.name[0]", "train.stages.0.steps", "é.x", "."])
def test_malformed_keys_are_refused_with_one_sentence(key, capsys):
    assert cli.main(["train", "--config", "configs/tiny.yaml", f"--{key}", "3"]) == cli.USER_ERROR
    assert capsys.readouterr().err.count("\n") == 1


BOMB = "a: &k0 [x]\n" + "".join(f"b{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9)}]\n" for i in range(1, 9))
"""A few lines that expand to millions of values."""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("run: {name: a, name: b}", "duplicate key 'name'"),
        ("1: 2", "the key 1 is not text"),
        ("run: {on: 2}", "the key true is not text"),
        ("a: &a [*a]", "nested too deeply"),
        ("a: " + "[" * 2000, "nested too deeply"),
        (BOMB, "holds more than"),
        ("a: " + "9" * 5000, "4300"),
        ("a: !!timestamp 2024-13-45", "month must be in"),
        ("a: !!python/name:os.system x", "could not determine a constructor"),
        ("a: !!set {b}", "holds a set"),
        ("a: !!binary aGk=", "holds a bytes"),
        ("a: \x01", "unacceptable character"),
        ("a: b\x00", "unacceptable character"),
    ],
)
def test_malformed_yaml_is_refused_with_one_sentence(content, message, tmp_path):
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_yaml(tmp_path / "r.yaml")
    assert str(caught.value).startswith(f"{tmp_path}/r.yaml: not valid YAML: ") and "\n" not in str(caught.value)


def test_quoted_values_are_shortened():
    with pytest.raises(ConfigError) as caught:
        recipe_from_dict({"run": {"seed": "x" * 100_000, "name": ["y" * 1000] * 1000}})
    assert len(str(caught.value)) < 2000


def test_bounds_are_exact_and_long_names_and_numbers_are_cut():
    with pytest.raises(
        ConfigError, match=r"^run\.seed: must be at most 9223372036854775807, found 9223372036854775808$"
    ):
        load_recipe([], [f"run.seed={2**63}"])
    with pytest.raises(ConfigError) as caught:
        load_recipe([], [f"run.seed=1{'0' * 300}"])
    assert len(str(caught.value)) < 150
    for key in ("run.", "model.", "train.optimizer."):
        with pytest.raises(ConfigError, match="unknown key") as caught:
            load_recipe([], [f"{key}{'x' * 10_000}=1"])
        assert len(str(caught.value)) < 200
