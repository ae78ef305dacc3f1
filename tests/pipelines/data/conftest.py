"""A prepared corpus for the tests on token shards."""

import json
import shutil
from pathlib import Path

import pytest
from shard_helpers import LENGTH

from pipelines.recipe.loading import recipe_from_dict
from pipelines.steps import prepare


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A prepared corpus of several train shards. Read only."""
    root = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": f"record {i} holds this sentence. " * (5 + i % 60)}) for i in range(300)]
    (root / "in.jsonl").write_text("\n".join(lines))
    data = {
        "sources": [str(root / "in.jsonl")],
        "sequence_length": LENGTH,
        "pairs": 4,
        "validation_share": 0.2,
        "retrieval_validation_documents": 30,
        "shard_tokens": 100_000,
    }
    return prepare.run(recipe_from_dict({"run": {"folder": str(root)}, "data": data})).folder


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))
