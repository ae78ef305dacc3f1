"""A prepared corpus and a recipe small enough to train in a test."""

from pathlib import Path

import pytest
import tracking_stores

from pipelines.recipe.loading import recipe_from_dict
from pipelines.recipe.schema import Recipe
from pipelines.steps import prepare

tracking_stores.speed_up()

MODEL = {
    "hidden_size": 32,
    "layers": ["sliding", "csa", "hca"],
    "num_heads": 2,
    "head_dim": 16,
    "rope_head_dim": 8,
    "q_lora_rank": 16,
    "o_groups": 1,
    "o_lora_rank": 16,
    "window": 8,
    "hca_ratio": 16,
    "index_heads": 2,
    "index_head_dim": 8,
    "index_topk": 4,
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_size": 16,
    "max_positions": 256,
}
TRAIN = {
    "batch_rows": 8,
    "stages": [
        {"attention": "dense", "steps": 3},
        {"attention": "indexer_warmup", "steps": 1},
        {"attention": "sparse", "steps": 2},
    ],
    "warmup_steps": 2,
    "log_every": 1,
    "validate_every": 3,
    "validation_rows": 16,
    "checkpoint_every": 2,
    # Equal on every processor; test_compute_dtype tests auto.
    "autocast": "none",
    "optimizer": {"ns_dtype": "float32"},
}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Recipe:
    """A recipe with prepared data. Tests that write runs need a run.name of their own."""
    root: Path = tmp_path_factory.mktemp("runs")
    source = root / "in"
    source.mkdir()
    for i in range(60):
        (source / f"{i}.txt").write_text(f"file {i} tells of a river, " * (10 + i % 7))
    recipe = recipe_from_dict(
        {
            "run": {"name": "base", "folder": str(root)},
            "data": {
                "name": "small",
                "sources": [str(source / "*.txt")],
                "sequence_length": 96,
                "pairs": 3,
                "validation_share": 0.2,
                "retrieval_validation_documents": 24,
                "retrieval_share": 0.5,
            },
            "model": MODEL,
            "train": TRAIN,
            "evaluate": {"lengths": [96], "depths": [0.2], "samples": 2},
        }
    )
    prepare.run(recipe)
    return recipe
