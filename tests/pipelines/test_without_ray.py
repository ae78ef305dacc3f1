"""The training loop runs without Ray and MLflow, as on a GPU machine with little more than torch."""

import json
import subprocess
import sys
from pathlib import Path

from model import checkpoint

ALONE = """
import json, sys
from pathlib import Path
for name in ("ray", "mlflow", "lm_eval", "transformers", "matplotlib", "psutil", "rich", "httpx"):
    sys.modules[name] = None  # makes the import fail
from pipelines.recipe.loading import recipe_from_dict
from pipelines.training.build import build_trainer
from pipelines.training.build import folder_batches

class Terminal:
    def log(self, step, metrics):
        print(step, metrics["train/loss"])
    def log_event(self, step, message):
        print(message)
    def report(self, step, metrics, write):
        if step == 6:
            write(Path(sys.argv[2]))

recipe = recipe_from_dict(json.loads(sys.argv[1]))
build_trainer(recipe, folder_batches(recipe), Terminal()).run()
"""


def test_the_plain_trainer_needs_neither_ray_nor_mlflow(prepared, tmp_path):
    ended = subprocess.run(
        [sys.executable, "-c", ALONE, json.dumps(prepared.to_dict()), str(tmp_path)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert [int(line.split()[0]) for line in ended.stdout.splitlines()] == [1, 2, 3, 4, 5, 6]
    assert checkpoint.load(tmp_path).config.index_topk == prepared.model.index_topk
