"""Write one HTML page from MLflow runs: ``python -m pipelines report --config configs/evidence.yaml``.

The page needs the newest finished run of ``ablate``, ``compare`` and ``sweep``, or those named in the recipe. It holds
all figures and refers to no other file. The figures are also written as PNG files.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import mlflow.artifacts
from mlflow.exceptions import MlflowException

from model.atomic_files import write_text
from model.errors import ConfigError
from model.wording import quote
from pipelines.experiments.outputs import RESULTS, command_of
from pipelines.recipe.paths import without_password
from pipelines.recipe.schema import Recipe
from pipelines.reports import ablation, comparison, pareto
from pipelines.reports.ablation import AblationResult
from pipelines.reports.comparison import ComparisonResult
from pipelines.reports.evidence_page import Origin, Section, page
from pipelines.reports.figures import png_bytes, save_figure
from pipelines.reports.pareto import SweepReport
from pipelines.steps import Step
from pipelines.tracking.mlflow_store import Tracking, open_tracking

SOURCES = ("ablate", "compare", "sweep")
"""Steps whose runs the page shows, and fields of the report section."""
PAGE = "report.html"
_Result = TypeVar("_Result")


def run(recipe: Recipe) -> Path:
    """Write the page and its figures to ``experiments/<report.name>``, and log them; return the page's path.

    Raises ConfigError that names the step to run if a run is missing or has no results.
    """
    tracking = open_tracking(recipe, create=False, needed="the steps ablate, compare and sweep")
    named = {step: _named_run(tracking, recipe, step) for step in SOURCES}  # wrong ids come first
    found = {step: run_id or _newest_run(tracking, recipe, step) for step, run_id in named.items()}
    ablated = _results(tracking, "ablate", found["ablate"], AblationResult.from_dict)
    compared = _results(tracking, "compare", found["compare"], ComparisonResult.from_dict)
    swept = _results(tracking, "sweep", found["sweep"], SweepReport.from_dict)
    sections, figures = _sections(found, ablated, compared, swept)
    folder = recipe.experiments_folder / recipe.report.name
    tracked = tracking.start_run(recipe.report.name, kind="report", recipe=recipe)
    with tracked:
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            save_figure(figure, folder / f"{name}.png")
            tracked.log_figure(figure, f"{name}.png")
        write_text(folder / PAGE, page("fiftyfold: evidence", sections))
        tracked.log_artifact(folder / PAGE)
        tracked.set_tags({f"source.{step}": run_id for step, run_id in found.items()})
    print(f"report: {folder / PAGE}")
    print(f"run: {tracked.run_id} ({tracked.url_hint()})", flush=True)
    return folder / PAGE


def _named_run(tracking: Tracking, recipe: Recipe, step: str) -> str | None:
    """Return the id of the run that the recipe names, if it names one. Raises ConfigError unless it is one of the
    step."""
    run_id, key = getattr(recipe.report, step), f"report.{step}"
    if run_id is None:
        return None
    try:
        run = tracking.client.get_run(run_id)
    except MlflowException:
        store = without_password(tracking.uri)
        raise ConfigError(f"{key}: expected the id of an MLflow run in {store}, found {quote(run_id)}") from None
    if run.info.lifecycle_stage != "active":
        raise ConfigError(f"{key}: run {run_id} was deleted")
    kind = run.data.tags.get("kind", "another program")
    if kind != step:
        raise ConfigError(f"{key}: expected a run of {step}, but {run_id} is one of {kind}")
    return run_id


def _newest_run(tracking: Tracking, recipe: Recipe, step: str) -> str:
    """Return the id of the newest finished run with the step's ``name``. Raises ConfigError if there is none."""
    name = getattr(recipe, step).name
    runs = tracking.client.search_runs(
        [tracking.experiment_id],
        f"tags.kind = '{step}' and attributes.status = 'FINISHED' and attributes.run_name = '{name}'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    if not runs:
        raise ConfigError(
            f"report: experiment '{recipe.tracking.experiment}' has no finished run of {step} named "
            f"'{name}' ({step}.name); run `{command_of(step)}` first"
        )
    return runs[0].info.run_id


def _results(tracking: Tracking, step: str, run_id: str, read: Callable[[dict[str, Any]], _Result]) -> _Result:
    """Return the results of a run. Raises ConfigError if it has none, or has those of another version."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            path = mlflow.artifacts.download_artifacts(
                run_id=run_id, artifact_path=RESULTS, dst_path=scratch, tracking_uri=tracking.uri
            )
            found = json.loads(Path(path).read_text())
        return read(found["result"])
    except (MlflowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"report.{step}: run {run_id} has no {RESULTS} that can be read; run `{command_of(step)}` again"
        ) from error


def _sections(
    run_ids: dict[str, str], ablated: AblationResult, compared: ComparisonResult, swept: SweepReport
) -> tuple[list[Section], dict[str, Any]]:
    """Return the sections of the page and its figures by name."""
    nested = {
        "ablate": [run_id for arm in ablated.arms for runs in arm.trainings for run_id in runs.run_ids],
        "compare": [run_id for arm in compared.arms for run_id in arm.runs.run_ids],
        "sweep": [point.run_id for point in swept.points],
    }
    origins = {
        "ablate": Origin(run_ids["ablate"], nested["ablate"], ablated.seeds, ablated.command),
        "compare": Origin(run_ids["compare"], nested["compare"], compared.seeds, compared.command),
        "sweep": Origin(run_ids["sweep"], nested["sweep"], [swept.seed], swept.command),
    }
    figures: dict[str, Any] = {}

    def draw(name: str, drawn: Callable[[], Any]) -> dict[str, bytes]:
        figure = drawn()
        if figure is None:
            return {}
        figures[name] = figure
        return {name: png_bytes(figure)}

    sections = [
        Section(
            "DeepSeek-V3.2 against V4, and this project's networks",
            [],
            [comparison.published_table(compared), comparison.own_table(compared)],
            {},
            origins["compare"],
        ),
        Section(
            "The five choices",
            [],
            ablation.tables(ablated),
            draw("waterfall", lambda: ablation.figure(ablated)),
            origins["ablate"],
        ),
        Section(
            "Pareto front",
            pareto.verdict(swept),
            pareto.tables(swept),
            draw("pareto", lambda: pareto.figure(swept)),
            origins["sweep"],
        ),
        Section(
            "Curves over length",
            [],
            [],
            draw("families-costs", lambda: comparison.costs_figure(compared))
            | draw("families-lengths", lambda: comparison.lengths_figure(compared)),
            origins["compare"],
        ),
        Section(
            "Five networks",
            [],
            comparison.tables(compared)[:-1],
            draw("families-quality", lambda: comparison.quality_figure(compared)),
            origins["compare"],
        ),
    ]
    return sections, figures


STEP = Step(run)
