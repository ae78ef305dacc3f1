"""lm-eval's command line with the model ``fiftyfold``: ``python -m evals run --model fiftyfold ...``."""

from __future__ import annotations

import os
import sys

from lm_eval.__main__ import cli_evaluate

import evals.tasks  # noqa: F401 (registers the model)
from evals.documents import TASKS
from model.errors import FiftyfoldError


def main() -> int:
    """Run the command line in ``sys.argv``; return the exit status."""
    # lm-eval bootstraps in forked processes, which can hang beside torch's threads.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        cli_evaluate()
    except FiftyfoldError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        if not str(error).startswith("Tasks not found"):
            raise
        print(f"error: {error}; evals/tasks has {', '.join(TASKS)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
