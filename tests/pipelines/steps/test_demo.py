"""The figures of the demo's table, and its questions."""

import math
from types import SimpleNamespace

import httpx
import pytest

from model.errors import ConfigError, FiftyfoldError
from pipelines.recipe.loading import load_recipe, recipe_from_dict
from pipelines.steps import demo
from pipelines.steps.demo import recall_tokens
from pipelines.tracking.mlflow_store import open_tracking


@pytest.mark.parametrize(
    ("recalls", "tokens"),
    [
        ({10: 0.5, 20: 0.8, 25: 1.0}, 10 * 4 * 64 + 10 * 2 * 64 + 2.5 * 2 * 64),
        ({10: 0.95, 20: 0.5}, 10 * 4 * 64),
        ({10: 0.5, 20: 0.89}, math.inf),
        ({}, math.inf),
    ],
)
def test_the_tokens_to_recall_are_interpolated_between_validations(tmp_path, recalls, tokens):
    stages = [{"steps": 10, "batch_rows": 4}, {"steps": 15, "batch_rows": 2}]
    recipe = recipe_from_dict(
        {"run": {"folder": str(tmp_path)}, "data": {"sequence_length": 64}, "train": {"stages": stages}}
    )
    with open_tracking(recipe).start_run("a", kind="train", recipe=recipe) as run:
        for step, recall in recalls.items():
            run.log_metrics({"validation/recall": recall}, step)
    assert recall_tokens(recipe, run.run_id) == pytest.approx(tokens)


@pytest.mark.parametrize(("text", "reason"), [("timed out", "timed out"), ("", "ReadTimeout")])
def test_a_question_without_an_answer_ends_the_demo_with_one_sentence(monkeypatch, text, reason):
    def post(*_, **__):
        raise httpx.ReadTimeout(text)

    monkeypatch.setattr(demo, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(demo, "retrieval_questions", lambda **_: {"test": [{"context": "a", "answer": "b"}]})
    monkeypatch.setattr(demo.httpx, "post", post)
    deployment = SimpleNamespace(url="http://t", checkpoint="c", model_name="m")
    with pytest.raises(FiftyfoldError, match=f"^http://t: {reason}$"):
        demo._ask(recipe_from_dict({}), deployment)


def test_a_tracking_store_that_cannot_be_opened_ends_the_demo_before_its_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "ray_session", lambda **_: pytest.fail("Ray was started"))
    (tmp_path / "file").touch()
    settings = [f"run.folder={tmp_path / 'runs'}", f"tracking.uri=sqlite:///{tmp_path}/file/a.db"]
    recipe = load_recipe(["configs/tiny.yaml"], settings)
    with pytest.raises(ConfigError, match=r"^tracking\.uri: "):
        demo.run(recipe)
    assert not (tmp_path / "runs").exists()
