"""The MLflow UI of a runs folder: ``make ui``.

The folder is the value of the environment variable RUNS, which may be any path.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from model.errors import FiftyfoldError
from pipelines.recipe.paths import path_option
from pipelines.recipe.ports import require_free_port
from pipelines.tracking.connection import DATABASE, connect, default_uri
from pipelines.tracking.relocation import ARTIFACTS

ADDRESS = ("127.0.0.1", "5000")


def server_command(runs: Path) -> list[str]:
    """Return the command that serves the UI of a runs folder. Paths stored in a moved folder are updated.

    Raises ConfigError if the folder has no tracking store.
    """
    uri = default_uri(runs)
    connect(uri, create=False)
    artifacts = (runs.absolute() / ARTIFACTS).as_uri()
    host, port = ADDRESS
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", host, "--port", port]
    return [*command, "--backend-store-uri", uri, "--default-artifact-root", artifacts]


def main() -> int:
    """Replace this process with the server; return the exit status of an error."""
    try:
        runs = path_option("RUNS")(os.environ.get("RUNS", "runs"))
        if not (runs / DATABASE).is_file():
            print(f"error: {runs / DATABASE}: no such file; run a step first or pass RUNS=folder", file=sys.stderr)
            return 1
        command = server_command(runs)
        require_free_port("make ui", ADDRESS[0], int(ADDRESS[1]))  # MLflow would end with status 0
    except FiftyfoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    os.execve(command[0], command, os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"})


if __name__ == "__main__":
    sys.exit(main())
