"""Commands that repeat a step, or run another one with the same settings."""

import shlex

import pytest

from pipelines import __main__ as cli
from pipelines.experiments.outputs import command_line, command_of
from pipelines.recipe.loading import load_recipe

MAIN = cli.__file__
SETTINGS = ["--config", "configs/tiny.yaml", "--run.folder", "my runs", "--serve.port=81", "--run.name", "demo"]


@pytest.fixture
def arguments(monkeypatch):
    return lambda *given: monkeypatch.setattr("sys.argv", list(given))


@pytest.mark.parametrize("place", [0, 2, 4, 5, 7])
def test_another_step_has_the_same_recipe_files_and_settings(arguments, place):
    arguments(MAIN, *SETTINGS[:place], "demo", *SETTINGS[place:])
    python, option, package, *given = shlex.split(command_of("deploy"))
    assert (python, option, package) == ("python", "-m", "pipelines")
    assert given == [*SETTINGS[:place], "deploy", *SETTINGS[place:]]
    invocation = cli.parse(given)
    recipe = load_recipe(invocation.files, invocation.overrides)
    assert invocation.step == "deploy"
    assert (recipe.run.folder.name, recipe.run.name, recipe.serve.port) == ("my runs", "demo", 81)


def test_commands_are_quoted_for_the_shell(arguments):
    arguments(MAIN, "demo", "--run.folder", "it's $HOME")
    assert command_line("demo") == "python -m pipelines demo --run.folder 'it'\"'\"'s $HOME'"


@pytest.mark.parametrize("given", [["--tracking.uri", "URI"], ["--tracking.uri=URI"]])
def test_commands_hold_no_password(arguments, given):
    arguments(
        MAIN, "sweep", *(text.replace("URI", "http://user:secret@tracking") for text in given), "--run.name", "a@b"
    )
    shown = [text.replace("URI", "http://tracking") for text in given]
    assert shlex.split(command_line("sweep"))[3:] == ["sweep", *shown, "--run.name", "a@b"]
    assert "secret" not in command_of("deploy")


def test_a_step_that_another_program_runs_has_its_name_only(arguments):
    arguments("/usr/bin/pytest", "-q")
    assert (command_line("sweep"), command_of("deploy")) == ("python -m pipelines sweep", "python -m pipelines deploy")
