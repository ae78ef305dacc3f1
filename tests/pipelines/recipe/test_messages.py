"""Errors of a recipe name the key in the user's terms."""

import re

import pytest

from model.errors import ConfigError
from model.wording import quote
from pipelines.recipe.loading import load_recipe
from pipelines.recipe.schema import Recipe
from tests.pipelines.test_hostile_input import KEYS, TEXT_KEYS

PYTHON = ("tuple", "dict", "RunSection", "Section", "instance", "byte string", "function", "mapping cannot", "should")


def refusal(tmp_path, text, *overrides):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_recipe([tmp_path / "a.yaml"], overrides)
    message = str(caught.value).replace(str(tmp_path), "")
    assert "\n" not in message and not [word for word in PYTHON if word in message]
    return message


STAGES = "train: {stages: [{steps: 3}]}"


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (STAGES, ["train.stages.0.steps=5"], "train.stages.0.steps: cannot be set to 5 (train.stages is a list, which"),
        ("{}", ["train.stages.0.steps=5"], "train.stages: expected a list"),
        ("{}", ["run.name=x", "run.name.y=1"], "run.name.y: cannot be set to 1 (run.name is a single value"),
        ("data: {sources: /x}", [], "data.sources: expected a list, found '/x'"),
        ("evaluate: {lengths: 5}", [], "evaluate.lengths: expected a list, found 5"),
        ("run:", [], "run: expected a section of settings, found null"),
        ("train: {optimizer: 5}", [], "train.optimizer: expected a section of settings, found 5"),
        ("data: {task_settings: 5}", [], "data.task_settings: expected a mapping, found 5"),
        ("run: {name: ../x}", [], "run.name: expected letters, digits, '_', '.' and '-', beginning with a letter or"),
        ("promote: {alias: 9}", [], "promote.alias: expected text; put it in quotes, found 9"),
        ("train: {stages: []}", [], "train.stages: must not be empty, found []"),
        ("train: {grad_clip: 0}", [], "train.grad_clip: must be above 0, found 0"),
        ("serve: {temperature: 1}", [], "serve.temperature: unknown key"),
        ("train: {seed: 1}", [], "train.seed: unknown key; did you mean 'run.seed', 'data.seed' or 'evaluate.seed'?"),
        ("model: {learning_rate: 1}", [], "model.learning_rate: unknown key; did you mean 'train.optimizer."),
        ("seed: 1", [], "seed: unknown key; did you mean 'run.seed'"),
        ("model: {window: null}", [], "model.window: expected a whole number, found null"),
        ("model: {window: true}", [], "model.window: expected a whole number, found true"),
        ("model: {qat: 5}", [], "model.qat: expected true or false, found 5"),
        ("model: {norm_eps: .inf}", [], "model.norm_eps: expected a finite number, found .inf"),
        ("run: {seed: 1.5}", [], "run.seed: expected a whole number, found 1.5"),
        ("compare: {seeds: [3, 4, 3]}", [], "compare.seeds: has the value 3 twice"),
        ("ablate: {rates: [1, 1.0]}", [], "ablate.rates: has the value 1.0 twice"),
        ("sweep: {space: {model.index_topk: [2, 2]}}", [], "sweep.space.model.index_topk: has the value 2 twice"),
        ("sweep: {space: {model.index_topk: []}}", [], "sweep.space.model.index_topk: must not be empty, found []"),
        (
            "sweep: {space: {model.index_top: [2]}}",
            [],
            "sweep.space.model.index_top: unknown key; did you mean 'index_",
        ),
        (
            "sweep: {space: {train.window: [2]}}",
            [],
            "sweep.space.train.window: unknown key; did you mean 'model.window",
        ),
        ("sweep: {space: {model.preset: [tiny]}}", [], "sweep.space.model.preset: cannot be changed here"),
        ("sweep: {overrides: {train.stepz: 2}}", [], "sweep.overrides.train.stepz: unknown key"),
        ("sweep: {overrides: {run.seed.x: 2}}", [], "sweep.overrides.run.seed.x: run.seed is a single value"),
        (
            "sweep: {space: {model.mixer_options.gqa.kernel: [2]}}",
            [],
            "sweep.space.model.mixer_options.gqa.kernel: unknown option; there are conv_kernel",
        ),
        (
            "ablate: {variants: {a: {modle.window: 2}}}",
            [],
            "ablate.variants.a.modle: unknown key; did you mean 'model'?",
        ),
        ("serve: {models: {a b: /x}}", [], "serve.models: expected letters, digits, '_', '.' and '-', beginning"),
        ("serve: {replicas: 2, max_replicas: 1}", [], "serve.max_replicas: must be at least replicas (2), found 1"),
        ("train: {sharding: fsdp, workers: 1}", [], "train.sharding: fsdp needs several workers"),
        ("a: [b", [], "--config: /a.yaml: not valid YAML: while parsing a flow sequence in line 1, column 4"),
        ("a: \x00", [], "--config: /a.yaml: not valid YAML"),
    ],
)
def test_errors_name_the_key_and_no_python_type(tmp_path, text, overrides, message):
    assert refusal(tmp_path, text, *overrides).startswith(message)


def numbers(value):
    return isinstance(value, int | float) and not isinstance(value, bool)


RECIPE = Recipe().to_dict()


def value_of(key):
    value = RECIPE
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


@pytest.mark.parametrize("key", [key for key in KEYS if numbers(value_of(key))])
def test_no_number_can_be_a_boolean(tmp_path, key):
    assert refusal(tmp_path, "{}", f"{key}=true").startswith(f"{key}: ")


@pytest.mark.parametrize("key", [key for key in KEYS if isinstance(value_of(key), bool)])
def test_no_boolean_can_be_a_number(tmp_path, key):
    assert refusal(tmp_path, "{}", f"{key}=1").startswith(f"{key}: ")


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("evaluate: {lengths: [64, true]}", "evaluate.lengths.1"),
        ("data: {task_settings: {mqar: {keys: true}}}", "data.task_settings.mqar.keys"),
        ("data: {max_text_bytes: false}", "data.max_text_bytes"),
        ("train: {stages: [{steps: true}]}", "train.stages.0.steps"),
        ("train: {optimizer: {learning_rate: true}}", "train.optimizer.learning_rate"),
        ("serve: {port: true}", "serve.port"),
    ],
)
def test_nested_numbers_cannot_be_booleans(tmp_path, text, key):
    assert re.match(f"{re.escape(key)}: expected a number, found (true|false)", refusal(tmp_path, text))


def test_the_keys_cover_the_recipe():
    assert len([key for key in KEYS if numbers(value_of(key))]) > 60


@pytest.mark.parametrize("key", [key for key in TEXT_KEYS if not key.startswith("train.stages.")])
@pytest.mark.parametrize(
    "value", ["data", "~nobody-here", "s3://b", "ftp://b/c", "models:/x", "a b/c", "latest", "\x1b["]
)
def test_a_refused_text_is_named_by_its_key_and_quoted_once(tmp_path, key, value):
    try:
        load_recipe([], [f"{key}={value}"])
    except ConfigError as error:
        assert str(error).startswith(key) and len(re.findall(re.escape(quote(value)), str(error))) == 1


def test_keys_within_mappings_and_lists_are_left_to_the_values():
    changes = "train.stages.0.steps: 2, data.task_settings.mqar.keys: 3, train.stability.anticipatory_routing.lag: 3"
    load_recipe([], [f"sweep.overrides={{{changes}}}", "sweep.space={model.mixer_options.gqa.conv_kernel: [2, 3]}"])
    assert load_recipe([], ["sweep.space={model.qat: [1, true]}"]).sweep.space == {"model.qat": [1, True]}
