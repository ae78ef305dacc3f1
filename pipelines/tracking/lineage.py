"""Origin of a run in MLflow's terms: its source, its commit and its data."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
from pathlib import Path

from mlflow.entities import Dataset, DatasetInput, InputTag
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_GIT_COMMIT,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
    MLFLOW_USER,
)

from pipelines import RAY_JOB_VARIABLE
from pipelines.data.manifest import MANIFEST_NAME, Manifest, file_sha256

_STEPS = {"trial": "sweep", "ablate_trial": "ablate", "compare_trial": "compare"}
"""Step that starts runs of a kind, where its name differs."""
_DIGEST_LENGTH = 32
"""Digits of a digest; MLflow accepts 36."""


def git_tags() -> dict[str, str]:
    """Return ``git.commit`` and ``git.dirty`` of this checkout, "unknown" outside of one, e.g. in a submitted job."""
    root = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        # A copy inside another repository must not get that repository's commit.
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root:
            dirty = "true" if git("status", "--porcelain") else "false"
            return {"git.commit": git("rev-parse", "HEAD"), "git.dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        pass
    return {"git.commit": "unknown", "git.dirty": "unknown"}


def source_tags(kind: str, git: dict[str, str]) -> dict[str, str]:
    """Return MLflow's tags for the columns Source, Version and User of a run of ``kind``.

    The type is JOB in a submitted Ray job. The commit of ``git`` (:func:`git_tags`) is left out if it is unknown.
    """
    tags = {
        MLFLOW_SOURCE_NAME: f"python -m pipelines {_STEPS.get(kind, kind)}",
        MLFLOW_SOURCE_TYPE: "JOB" if RAY_JOB_VARIABLE in os.environ else "LOCAL",
    }
    try:
        tags[MLFLOW_USER] = getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        tags[MLFLOW_USER] = str(os.getuid())
    if git["git.commit"] != "unknown":
        tags[MLFLOW_GIT_COMMIT] = git["git.commit"]
    return tags


def dataset_input(folder: Path, manifest: Manifest, context: str) -> DatasetInput:
    """Return a data folder as an MLflow data set.

    Its digest is the SHA-256 of the manifest, which holds those of all shards. Its profile counts documents, rows and
    tokens.

    Args:
        context: Use of the data: ``training`` or ``evaluation``.
    """
    profile: dict[str, int] = {}
    for name in ("documents", "rows", "tokens"):
        counts = {split: sum(getattr(part, name).values()) for split, part in manifest.splits.items()}
        profile[f"num_{name}"] = sum(counts.values())
        profile |= {f"{split}_{name}": count for split, count in counts.items()}
    dataset = Dataset(
        name=folder.name,
        digest=file_sha256(folder / MANIFEST_NAME)[:_DIGEST_LENGTH],
        source_type="local",
        source=json.dumps({"uri": str(folder)}),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag(MLFLOW_DATASET_CONTEXT, context)])
