"""The runs that the report step is given."""

import pytest

from model.errors import ConfigError
from pipelines.recipe.loading import recipe_from_dict, with_overrides
from pipelines.steps import report
from pipelines.tracking.mlflow_store import open_tracking


@pytest.mark.parametrize("step", report.SOURCES)
def test_a_run_that_is_none_of_the_step_is_named_before_others_are_looked_for(tmp_path, step):
    recipe = recipe_from_dict({"run": {"folder": str(tmp_path)}})
    tracking = open_tracking(recipe)
    with tracking.start_run("other", kind="train", recipe=recipe) as run:
        pass

    def refusal(run_id):
        with pytest.raises(ConfigError) as caught:
            report.run(with_overrides(recipe, {f"report.{step}": run_id}))
        return str(caught.value)

    assert refusal("abc") == f"report.{step}: expected the id of an MLflow run in {tracking.uri}, found 'abc'"
    assert refusal(run.run_id) == f"report.{step}: expected a run of {step}, but {run.run_id} is one of train"
    tracking.client.delete_run(run.run_id)
    assert refusal(run.run_id) == f"report.{step}: run {run.run_id} was deleted"
    with pytest.raises(ConfigError, match=r"has no finished run of ablate named 'ablation'"):
        report.run(recipe)


def test_the_command_of_a_missing_run_keeps_the_recipe(tmp_path, monkeypatch):
    arguments = ["report", "--config", "a.yaml", "--run.folder", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["/x/pipelines/__main__.py", *arguments])
    recipe = recipe_from_dict({"run": {"folder": str(tmp_path)}})
    open_tracking(recipe)
    with pytest.raises(ConfigError, match=f"run `python -m pipelines ablate --config a.yaml --run.folder {tmp_path}`"):
        report.run(recipe)
