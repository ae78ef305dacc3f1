"""The command behind ``make ui``."""

from __future__ import annotations

import os
import socket

import pytest

from pipelines.recipe.loading import recipe_from_dict
from pipelines.recipe.paths import sqlite_path
from pipelines.tracking import ui
from pipelines.tracking.mlflow_store import open_tracking


@pytest.fixture
def executed(monkeypatch) -> list:
    commands: list = []
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setattr(ui, "ADDRESS", ("127.0.0.1", str(free.getsockname()[1])))
    monkeypatch.setattr(os, "execve", lambda _, command, environment: commands.append(command))
    return commands


@pytest.mark.parametrize("name", ["runs", "moved [v2] %41#x", "a?b"])
def test_the_server_opens_the_store_of_the_folder(tmp_path, monkeypatch, executed, name):
    folder = tmp_path / name
    open_tracking(recipe_from_dict({"run": {"folder": str(folder)}}))
    monkeypatch.setenv("RUNS", str(folder))
    ui.main()
    (command,) = executed
    assert sqlite_path(command[command.index("--backend-store-uri") + 1]) == folder / "mlflow.db"
    assert command[command.index("--default-artifact-root") + 1] == (folder / "mlartifacts").as_uri()
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("runs", "message"),
    [("nowhere", "mlflow.db: no such file; run a step first"), ("s3://b", "RUNS: only local paths")],
)
def test_a_folder_without_a_store_is_refused(tmp_path, monkeypatch, capsys, executed, runs, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RUNS", runs)
    assert ui.main() == 1
    assert message in capsys.readouterr().err
    assert executed == [] and list(tmp_path.iterdir()) == []


def test_a_port_in_use_is_named(tmp_path, monkeypatch, capsys, executed):
    open_tracking(recipe_from_dict({"run": {"folder": str(tmp_path)}}))
    monkeypatch.setenv("RUNS", str(tmp_path))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setattr(ui, "ADDRESS", ("127.0.0.1", str(port)))
        assert ui.main() == 1
    assert f"error: make ui: cannot listen on 127.0.0.1:{port} (Address already in use)" in capsys.readouterr().err
    assert executed == []
