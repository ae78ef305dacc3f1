"""Every step, given hostile files, names and values: it succeeds, or prints one sentence and returns status 2."""

from __future__ import annotations

import json
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from model import checkpoint
from model.errors import FiftyfoldError
from model.tokenizer import ByteTokenizer
from model.transformer import Transformer
from pipelines import __main__ as cli
from pipelines.experiments import experiment
from pipelines.recipe.key_types import fields_of, is_list_of_text, is_text, type_of
from pipelines.recipe.loading import with_overrides
from pipelines.recipe.schema import Recipe
from pipelines.recipe.yaml_format import dump_yaml
from pipelines.steps import demo, deploy, evaluate, sweep, train
from pipelines.tracking.mlflow_store import open_tracking
from pipelines.tracking.registry import WEIGHTS_TAG, weights_digest
from pipelines.tracking.run_folder import TRAINING_SECTIONS, write_settings

WORDS = [
    *("", " ", "\0", "\n", "a\nb", "\x1b[31m", "\ud800", "\udcff", "é", "😀", "​", "a" * 300, "a" * 70_000),
    *(
        ".",
        "..",
        "/",
        "//",
        "../..",
        "~",
        "~nobody",
        "-",
        "--",
        "*",
        "**",
        "[",
        "[]",
        "[a",
        "{}",
        "{a: b}",
        "%",
        "${HOME}",
    ),
    *(
        "null",
        "true",
        "on",
        "007",
        "1e5",
        "12:30:45",
        "x #b",
        "a: b",
        "&a",
        "*a",
        "!!set {a}",
        "'",
        '"',
        "latest",
        "v2",
    ),
    *("s3://b/c", "file:///", "file://h/x", "file:x", "models:/x", "models:/a@b", "http://", "http://[", "http://a:b"),
    *("sqlite:///", "sqlite:////nowhere/x.db", "sqlite://", "postgresql://x/y", "databricks", "databricks://x", "uc:x"),
    *("/dev/null", "/dev/null/x", "/dev/zero", "/proc/self/mem", "/nowhere/x", "FOLDER", "FILE", "RUNS", "FINAL"),
]
VALUES = [
    *("", "x", "-1", "0", "1.5", "nan", ".inf", "-.inf", "1e400", "2147483647", "9" * 30, "9" * 5000, "null", "true"),
    *(
        "[]",
        "[1]",
        "[[]]",
        "{}",
        "{a: 1}",
        "[null]",
        "[-1]",
        "[x, 1]",
        "{a: {b: [1]}}",
        "[{}]",
        "[{steps: 0}]",
        "{1: 2}",
    ),
]


def keys_of(section: object, prefix: str = "") -> list[str]:
    found = []
    for name, annotation in fields_of(section).items():
        inner = next((item for item in (annotation, *get_args(annotation)) if fields_of(item)), None)
        found += keys_of(inner, f"{prefix}{name}.") if inner else [prefix + name]
    return found


KEYS = keys_of(Recipe)
TEXT_KEYS = [key for key in KEYS if is_text(type_of(key)) or is_list_of_text(type_of(key))]


class Place:
    def __init__(self, folder: Path, recipe: Recipe, file: Path):
        self.folder, self.recipe, self.file = folder, recipe, file


@contextmanager
def no_ray(num_cpus=0):
    raise FiftyfoldError("this test starts no Ray cluster")
    yield


@pytest.fixture(scope="module")
def place(prepared, tmp_path_factory):
    """A run folder with data, an evaluated run and its checkpoint, a recipe file for it, and odd files beside it."""
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copytree(prepared.data_folder, folder / "runs/data/small")
    recipe = with_overrides(prepared, {"run.folder": str(folder / "runs"), "run.name": "mine"})
    tracking = open_tracking(recipe)
    with tracking.start_run("mine", kind="train", recipe=recipe) as run:
        torch.manual_seed(0)
        checkpoint.save(Transformer(recipe.model), recipe.final_checkpoint, ByteTokenizer())
        (recipe.run_folder / "run.json").write_text(json.dumps({"run_id": run.run_id, "tracking_uri": tracking.uri}))
        write_settings(recipe.run_folder, recipe, TRAINING_SECTIONS)
        digest = weights_digest(recipe.final_checkpoint)
        run.set_tags({"checkpoint": str(recipe.final_checkpoint), WEIGHTS_TAG: digest})
        run.log_metrics({"eval/recall": 0.5, "cache/bytes_per_token": 1})
    (folder / "file").write_text("x")
    (folder / "recipe.yaml").write_text(dump_yaml({**recipe.to_dict(), "serve": {"port": 1}}))
    return Place(folder, recipe, folder / "recipe.yaml")


@pytest.fixture(autouse=True)
def cheap(monkeypatch, place):
    """Neither Ray nor an evaluation starts; the working folder is one to look for stray files in."""
    for step in (train, sweep, demo, deploy, experiment):
        monkeypatch.setattr(step, "ray_session", no_ray)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # other tests of this process may have started Ray
    monkeypatch.setattr(evaluate, "score_tasks", lambda *_, **__: {"eval/recall": 0.5})
    work = place.folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    monkeypatch.chdir(work)


@pytest.fixture
def run(place, capsys):
    def run(*arguments: str) -> int:
        places = {"FOLDER": place.folder, "FILE": place.folder / "file", "RUNS": place.recipe.run.folder,
                  "FINAL": place.recipe.final_checkpoint}  # fmt: skip
        arguments = tuple(str(places.get(argument, argument)) for argument in arguments)
        capsys.readouterr()
        status = cli.main(list(arguments))
        error = capsys.readouterr().err
        if status != 0:
            assert status == cli.USER_ERROR
            (line,) = (line for line in error.splitlines() if " WARNING mlflow" not in line)
            assert line.startswith("error: ") and len(line) < 3000
            assert "an input file is nested" not in line  # which one?
            line.encode()
            run.error = line
        return status

    return run


def quick(examples: int):
    return settings(
        max_examples=examples, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    )


STEPS = [step for step in cli.STEPS if step not in ("export", "budget")]


@quick(100)
@given(st.sampled_from(STEPS), st.sampled_from(TEXT_KEYS), st.sampled_from(WORDS) | st.text(max_size=8))
@example("promote", "promote.alias", "latest")
@example("train", "tracking.uri", "http://[")
@example("promote", "tracking.uri", "databricks://x")
@example("prepare", "run.folder", "s3://bucket/runs")
@example("prepare", "data.sources", "~nobody/x")
@example("deploy", "serve.model_uri", "models:/x@y/z")
def test_text_settings_succeed_or_fail_with_one_sentence(run, place, step, key, value):
    run(step, "--config", str(place.file), f"--{key}", value)
    stray = {path for path in Path.cwd().iterdir() if path.name != "sqlite"}
    for path in stray:
        shutil.rmtree(path)
    assert not stray or key == "run.folder"


SECTIONS = st.sampled_from(["train", "sweep", "ablate", "compare", "report", "promote", "budget"])


@quick(80)
@given(SECTIONS, st.sampled_from(KEYS), st.sampled_from(VALUES))
@example("train", "model.mtp_layers", "9" * 30)
@example("train", "run.seed", "9" * 30)
@example("train", "train.workers", "9" * 30)
@example("train", "data.text_field", "9" * 5000)
@example("promote", "promote.metric", "9" * 5000)
def test_other_settings_succeed_or_fail_with_one_sentence(run, place, step, key, value):
    run(step, "--config", str(place.file), f"--{key}", value)


@quick(60)
@given(st.lists(st.sampled_from([*WORDS, "--config", "--run.name", "--print-config", "--model", "--to", "--from"])))
@example(["a" * 70_000])
def test_arguments_in_any_order_fail_with_at_most_one_sentence(run, arguments):
    for step in ("export", "budget"):
        if "-h" not in arguments:
            run(step, *arguments)


@quick(60)
@given(
    st.sampled_from(["train", "budget"]),
    st.binary(max_size=40) | st.text(st.characters(codec="utf-8"), max_size=40).map(str.encode),
)
@example("train", b"\xff\xfe")
@example("train", b"a: 2024-13-45")
@example("train", b"run: {1: 2}")
@example("train", b"train: [1]")
@example("train", b"model: {1: 2, preset: tiny}")
@example("budget", b"model: []")
def test_any_recipe_file_is_read_or_refused_with_one_sentence(run, place, step, content):
    path = place.folder / "any.yaml"
    path.write_bytes(content)
    run(step, "--config", str(path), "--run.folder", str(place.folder / "none"))
    run("budget", "--model", str(path))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
NAMES = st.text(max_size=8)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3))


@quick(60)
@given(st.dictionaries(st.sampled_from(["model", "train", "sweep", "data", "run", "evaluate", "serve", "x"]), JSON))
def test_recipes_of_any_structure_are_read_or_refused_with_one_sentence(run, place, content):
    path = place.folder / "any.yaml"
    path.write_text(json.dumps(content))
    run("train", "--config", str(path), "--run.folder", str(place.folder / "none"))


@pytest.mark.parametrize("target", ["FILE", "/dev/null/x", "FOLDER", "", "s3://b", "a\0", "a" * 300, "x/" * 3000])
@pytest.mark.parametrize("format", ["transformers", "gguf"])
def test_unusable_export_targets_are_refused(run, target, format):
    assert run("export", "--from", "FINAL", "--to", target, "--format", format) == cli.USER_ERROR
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize("source", ["FILE", "FOLDER", "RUNS", "/dev/null", "/dev/zero", "\udcff", "a" * 300, "loop"])
def test_paths_that_hold_no_checkpoint_are_refused(run, place, source):
    Path("loop").symlink_to("loop")
    assert run("export", "--from", source, "--to", "out") == cli.USER_ERROR
    assert run("budget", "--model", source) == cli.USER_ERROR
    for step, key in (("evaluate", "evaluate.checkpoint"), ("train", "train.init_from"), ("deploy", "serve.model_uri")):
        assert run(step, "--config", str(place.file), "--run.name", "new", f"--{key}", source) == cli.USER_ERROR


@pytest.mark.parametrize(
    ("step", "key", "value"),
    [
        ("prepare", "run.folder", "/proc/a/b"),
        ("prepare", "data.sources", "/nowhere/x.txt"),
        ("prepare", "data.sources", "/dev/null"),
        ("prepare", "data.tokenizer", "/nowhere/tokenizer.json"),
        ("prepare", "data.retrieval_tasks", "{needles: 1}"),
        ("prepare", "tracking.uri", "ftp://x"),
        ("train", "run.folder", "/nowhere"),
        ("train", "train.init_from", "FOLDER"),
        ("train", "train.use_gpu", "true"),
        ("train", "tracking.uri", "sqlite:////nowhere/m.db"),
        ("sweep", "sweep.space", "{model.windows: [2, 4]}"),
        ("sweep", "sweep.metric", "validation/recal"),
        ("ablate", "ablate.variants", "{a: {model.windows: 4}}"),
        ("ablate", "ablate.context", "99999"),
        ("compare", "compare.arms", "{a: {windows: 4}}"),
        ("report", "report.ablate", "abc"),
        ("evaluate", "evaluate.checkpoint", "FILE"),
        ("evaluate", "evaluate.checkpoint", "FOLDER"),
        ("promote", "promote.metric", "eval/recal"),
        ("promote", "tracking.experiment", "another"),
        ("deploy", "serve.model_uri", "FOLDER"),
        ("deploy", "serve.models", "{a: /nowhere}"),
        ("deploy", "serve.models", "{a: models:/none/1}"),
        ("deploy", "serve.api_key_file", "/nowhere"),
        ("deploy", "serve.speculative_tokens", "2"),
        ("demo", "demo.baseline", "/nowhere.yaml"),
        ("demo", "demo.baseline", "/dev/null"),
        ("demo", "sweep.metric", "validation/recal"),
        ("demo", "evaluate.tasks", "ruler"),
    ],
)
def test_a_refused_setting_is_named_by_its_key(run, place, step, key, value):
    file = place.folder / "small.yaml"
    serve = {"port": 1, "model_uri": str(place.recipe.final_checkpoint)}
    content = {**place.recipe.to_dict(), "serve": serve, "demo": {"baseline": str(place.file)}}
    content["sweep"] |= {"space": {"model.index_topk": [2, 3]}}
    file.write_text(dump_yaml(content))
    assert run(step, "--config", str(file), f"--{key}", value) == cli.USER_ERROR
    assert key in run.error


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("content", [b"", b"null", b"{}", b"\xff" * 100, b"[" * 100_000])
def test_damaged_checkpoints_give_one_sentence(run, place, name, content, tmp_path):
    damaged = tmp_path / "mine/final"
    shutil.copytree(place.recipe.run_folder, damaged.parent)
    (damaged / name).write_bytes(content)
    run("export", "--from", str(damaged), "--to", "out")
    run("budget", "--model", str(damaged))
    arguments = ("--config", str(place.file), "--run.name", "new")
    for step, key in (("evaluate", "evaluate.checkpoint"), ("train", "train.init_from"), ("deploy", "serve.model_uri")):
        run(step, *arguments, f"--{key}", str(damaged))


@pytest.mark.parametrize("content", [b"", b"null", b"[1]", b"{}", b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("name", ["data/small/manifest.json", "data/small/tokenizer.json", "mine/run.json", "mlflow.db",
                                  "mine/recipe.json"])  # fmt: skip
def test_damaged_run_folders_give_one_sentence(run, place, name, content, tmp_path):
    shutil.copytree(place.recipe.run.folder, tmp_path / "runs")
    (tmp_path / "runs" / name).write_bytes(content)
    for step in ("prepare", "train", "sweep", "ablate", "compare", "report", "evaluate", "promote", "deploy"):
        run(
            step,
            "--config",
            str(place.file),
            "--run.folder",
            str(tmp_path / "runs"),
            "--sweep.space.model.window=[4,8]",
        )


@pytest.mark.parametrize(
    "name", [b"caf\xe9.txt", b"a\nb.txt", b"[v2].txt", b"~.txt", b"a\x1b[31m.txt", b"-.txt", b"x.txt"]
)
@pytest.mark.parametrize("content", [b"text\n" * 5000, b"", b"\0", b"\xff\xfe\0", b"# coding: hex\n"])
def test_source_files_are_read_or_refused_with_one_sentence(run, tmp_path, name, content):
    path = os.path.join(os.fsencode(tmp_path), name)
    with open(path, "wb") as file:
        file.write(content)
    statuses = {
        run("prepare", "--run.folder", str(tmp_path / "runs"), "--data.sources", f"{tmp_path}/*", "--data.name", "a")
    }
    if name != b"caf\xe9.txt":
        statuses.add(
            run(
                "prepare",
                "--run.folder",
                str(tmp_path / "runs"),
                "--data.sources",
                os.fsdecode(path),
                "--data.name",
                "b",
            )
        )
    assert statuses == {0 if content[:4] in (b"text", b"# co") and len(content) > 100 else cli.USER_ERROR}


def test_a_port_in_use_is_named_before_anything_is_written(run, place, tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for step in ("deploy", "demo"):
            assert run(step, "--run.folder", str(tmp_path / "runs"), "--serve.port", port,
                       "--demo.baseline", str(place.file)) == cli.USER_ERROR  # fmt: skip
    assert not (tmp_path / "runs").exists()


def test_output_that_the_terminal_cannot_encode_is_escaped():
    import subprocess

    command = [sys.executable, "-m", "pipelines", "train", "--tracking.experiment", "ü😀", "--print-config"]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "experiment:" in done.stdout
