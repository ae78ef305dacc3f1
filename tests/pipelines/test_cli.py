"""The command line: one sentence and a non-zero status for every user error."""

import os
import re
import subprocess
import sys
import time
from contextlib import suppress

import pytest
from mlflow.exceptions import MlflowException

from model.config import ModelConfig
from model.optim import MuonAdamW
from model.transformer import Transformer
from pipelines import __main__ as cli
from pipelines.recipe.loading import load_recipe, overlay
from pipelines.steps import Step, prepare
from pipelines.steps.train import print_plan
from pipelines.training.curriculum import total_steps

RECIPES = ["configs/tiny.yaml"]


def optimizer_of(recipe):
    model = Transformer.on_meta(recipe.model)
    return MuonAdamW(model.named_parameters(), recipe.train.optimizer, model.split_sizes())


def test_the_shipped_recipes_are_valid_and_alike_where_they_must_be():
    hybrid = load_recipe(RECIPES)
    baseline = overlay(hybrid, "configs/baseline.yaml")
    assert total_steps(baseline) == total_steps(hybrid)
    assert baseline.model.hidden_size == hybrid.model.hidden_size
    assert baseline.model.num_layers == hybrid.model.num_layers
    assert baseline.data == hybrid.data
    assert optimizer_of(hybrid).muon_share() > 0.8
    assert optimizer_of(baseline).muon_share() == 0


def test_the_precision_table_covers_later_stages(capsys):
    stages = "train.stages=[{attention: dense, steps: 2, qat: false}, {steps: 2, qat: true}]"
    recipe = load_recipe(RECIPES, [stages, "model.qat=false"])
    print_plan(recipe, optimizer_of(recipe))
    row = next(line for line in capsys.readouterr().out.splitlines() if "routed expert weights" in line)
    assert "fp4" in row and "yes" in row


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "nowhere.yaml"], "error: --config: nowhere.yaml: No such file or directory"),
        (["--config", "configs"], "error: --config: configs: Is a directory"),
        (["--model.index_top", "3"], "error: model.index_top: unknown key; did you mean 'index_topk'?"),
        (["--train.stepz", "3"], "error: train.stepz: unknown key"),
        (["--train.optimizer.lerning_rate", "3"], "lerning_rate: unknown key; did you mean 'learning_rate'?\n"),
        (["--train.stages", "[{step: 3}]"], "error: train.stages.0.step: unknown key; did you mean 'steps'?"),
        (["--train.stages", "[{steps: 0}]"], "stages.0.steps: must be at least 1, found 0\n"),
        (["--train.stages", "[]"], "error: train.stages: must not be empty"),
        (["--train.sharding", "fsdp"], "sharding: fsdp needs several workers, but workers is 1\n"),
        (["--config", "configs/tiny.yaml", "--train.stages", "{steps: 3}"], "error: train.stages: cannot be set to"),
        (["--train.stages", "[steps: 3"], "error: train.stages: cannot be set to '[steps: 3'"),
        (["--train.batch_rows", "0"], "error: train.batch_rows: must be at least 1, found 0"),
        (
            ["--train.optimizer.momentum", "2"],
            "error: train.optimizer.momentum: must be at least 0 and below 1",
        ),
        (["--train.autocast", "float16"], "autocast: expected 'auto', 'none' or 'bfloat16', found 'float16'\n"),
        (["--train.optimizer.ns_dtype", "half"], "ns_dtype: expected 'auto', 'float32' or 'bfloat16', found"),
        (["--model.preset", "huge"], "error: model.preset: unknown preset 'huge'"),
        (
            ["--model.preset", "small", "--model.depth", "12"],
            "error: model.depth: 12 and preset 'small' are mutually",
        ),
        (["--run.name", "data"], "error: run.name: expected a name that is not reserved in run.folder, found 'data'\n"),
        (["--run.name", "../x"], "error: run.name: expected letters, digits, '_', '.' and '-'"),
        (["--serve.host", "example.com"], "error: serve.host: expected an IP address"),
        (["--train.workers"], "error: command line: --train.workers has no value"),
        (["stray"], "error: command line: 'stray' is neither an option nor --section.key value"),
        (["--run.folder", "/dev/null/x"], "error: /dev/null/x/data/stdlib/manifest.json: Not a directory"),
    ],
)
def test_user_errors_are_one_sentence(arguments, message, capsys):
    assert cli.main(["train", *arguments]) == cli.USER_ERROR
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1


@pytest.mark.parametrize("step", ["ablate", "compare"])
def test_a_folder_that_cannot_be_written_is_named_with_the_step_s_file(step, capsys):
    assert cli.main([step, "--write", "/proc/a/b"]) == cli.USER_ERROR
    assert capsys.readouterr().err.startswith(f"error: --write: /proc/a/b/{step}.json cannot be created")


def test_a_first_report_names_the_steps_to_run(tmp_path, capsys):
    assert cli.main(["report", "--run.folder", str(tmp_path)]) == cli.USER_ERROR
    assert "no such tracking store; run the steps ablate, compare and sweep first" in capsys.readouterr().err


def test_a_later_sweep_space_replaces_an_earlier_one():
    given = ["sweep.space={model.csa_ratio: [2, 4]}"], ["sweep.space.model.csa_ratio=[2, 4]"]
    assert [load_recipe(RECIPES, key).sweep.space for key in given] == [{"model.csa_ratio": [2, 4]}] * 2
    both = load_recipe(RECIPES, ["sweep.space.model.csa_ratio=[2, 4]", "sweep.space.model.qat=[true]"])
    assert both.sweep.space == {"model.csa_ratio": [2, 4], "model.qat": [True]}
    assert load_recipe(RECIPES, ["sweep.trials=1"]).sweep.space == load_recipe(RECIPES).sweep.space


def test_a_file_that_does_not_fit_is_named(tmp_path, capsys):
    (tmp_path / "odd.yaml").write_text("train: {stages: {steps: 2}}\n")
    assert cli.main(["train", *("--config", RECIPES[0]), "--config", str(tmp_path / "odd.yaml")]) == cli.USER_ERROR
    assert "odd.yaml: does not fit the files before it" in capsys.readouterr().err


def test_an_mlflow_error_is_one_sentence(monkeypatch, capsys):
    def run(recipe):
        raise MlflowException("the server\nis gone")

    monkeypatch.setattr(prepare, "STEP", Step(run))
    assert cli.main(["prepare"]) == cli.USER_ERROR
    assert capsys.readouterr().err == "error: MLflow: the server is gone\n"


def test_sigterm_ends_a_step_as_ctrl_c_does_from_its_start(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    os.mkfifo(recipe)  # opening it for reading blocks
    step = subprocess.Popen(
        [sys.executable, "-m", "pipelines", "train", "--config", str(recipe)], stderr=subprocess.PIPE, text=True
    )
    while True:  # pytest's own time limit ends a step that never opens the recipe
        try:
            held = os.open(recipe, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:  # no reader yet
            time.sleep(0.02)
        else:
            break
    for _ in range(10):
        step.terminate()
        # A signal between Python's check for signals and the blocking read() is handled only after the next one.
        with suppress(subprocess.TimeoutExpired):
            step.wait(timeout=20)
            break
    assert (step.wait(timeout=1), step.stderr.read()) == (
        cli.INTERRUPTED,
        "interrupted; run the same command again to continue\n",
    )
    os.close(held)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_a_failed_allocation_is_one_sentence(monkeypatch, capsys, error):
    def run(recipe):
        raise error

    monkeypatch.setattr(prepare, "STEP", Step(run))
    assert cli.main(["prepare"]) == cli.USER_ERROR
    assert capsys.readouterr().err == "error: prepare: not enough memory for these settings\n"


@pytest.mark.parametrize("content", ["a: [1", "- 1\n- 2\n", "model: 3\n"])
def test_malformed_yaml_is_named(content, tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    assert cli.main(["train", "--config", str(path)]) == cli.USER_ERROR
    err = capsys.readouterr().err.strip()
    assert len(err.splitlines()) == 1 and ("bad.yaml" in err or "model: expected a mapping" in err)


def test_a_later_preset_or_depth_replaces_an_earlier_one():
    by_depth = load_recipe(RECIPES, ["model.depth=6", "model.window=8"])
    assert by_depth.model == ModelConfig.from_depth(6, window=8)
    assert load_recipe(RECIPES, ["model.preset=small"]).model == ModelConfig.from_preset("small")


def test_a_job_must_not_write_into_its_temporary_folder(monkeypatch, capsys):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert cli.main(["train", "--config", *RECIPES]) == cli.USER_ERROR
    assert "pass --run.folder with an absolute path" in capsys.readouterr().err


def test_print_config_is_a_recipe(capsys, tmp_path):
    assert cli.main(["train", "--config", *RECIPES, "--model.window", "8", "--print-config"]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_recipe([tmp_path / "printed.yaml"]) == load_recipe(RECIPES, ["model.window=8"])


def test_print_config_hides_the_password_of_the_tracking_store(capsys):
    uri = "postgresql://me:hunter22@127.0.0.1/runs?sslpassword=hunter33&api_key=hunter44&client_secret=hunter55"
    assert cli.main(["train", "--config", *RECIPES, "--tracking.uri", uri, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "postgresql://127.0.0.1/runs?" in printed and "hunter" not in printed


def test_a_python_without_the_packages_is_named():
    command = [sys.executable, "-S", "-m", "pipelines", "deploy"]  # -S: without site-packages
    step = subprocess.run(command, capture_output=True, text=True)
    assert step.returncode == cli.USER_ERROR and not step.stdout
    advice = "run `make .venv` and `source .venv/bin/activate`"
    assert re.fullmatch(rf"error: {re.escape(sys.executable)} has no package '\w+'; {advice}\n", step.stderr)
