"""Identity and planning of trials."""

import json

import pytest

from model.errors import FiftyfoldError
from pipelines.experiments.arms import Arm
from pipelines.experiments.experiment import Experiment, choose_rate, rate_beyond
from pipelines.experiments.outputs import quick
from pipelines.experiments.trials import RESULT, TRIAL, Trial, plan
from pipelines.recipe.loading import load_recipe, with_overrides
from pipelines.training.curriculum import curriculum, total_steps


def test_equal_trainings_of_different_experiments_share_a_folder(prepared):
    trial = plan(Arm("full", "all", prepared), 1, 2.0)
    assert plan(Arm("hybrid", "own", with_overrides(prepared, {"train.log_every": 7})), 1, 2.0).folder == trial.folder
    others = [
        plan(Arm("full", "all", prepared), 2, 2.0),
        plan(Arm("full", "all", prepared), 1, 1.0),
        plan(Arm("full", "all", with_overrides(prepared, {"model.qat": False})), 1, 2.0),
        plan(Arm("full", "all", prepared, {"qat": False}), 1, 2.0),
        plan(Arm("full", "all", with_overrides(prepared, {"train.grad_clip": 0.5})), 1, 2.0),
    ]
    assert len({trial.folder, *(other.folder for other in others)}) == 1 + len(others)


def test_a_trial_is_finished_once_what_is_asked_for_exists(prepared, tmp_path):
    recipe = with_overrides(prepared, {"run.seed": 77})
    trained, evaluated = (plan(Arm("full", "all", recipe), 77, 1.0, evaluated=asked) for asked in (False, True))
    assert trained.folder == evaluated.folder and not trained.is_finished
    trained.folder.mkdir(parents=True)
    result = {
        "run_id": "a",
        "metrics": {"validation/loss": 1.0},
        "curve": [[8, {"validation/loss": 1.0}]],
        "seconds": 1,  # by an earlier version
    }
    (trained.folder / RESULT).write_text(json.dumps(result))
    assert trained.is_finished and not evaluated.is_finished
    evaluated.evaluation_file.write_text(json.dumps({"eval/recall": 0.5}))
    assert evaluated.is_finished
    assert evaluated.result().metrics == {"validation/loss": 1.0, "eval/recall": 0.5}
    assert evaluated.result().line("validation/loss") == [(8, 1.0)]
    more = with_overrides(recipe, {"evaluate.samples": 3})
    assert not plan(Arm("full", "all", more), 77, 1.0, evaluated=True).is_finished


def test_the_description_of_a_trial_holds_no_password(prepared):
    recipe = with_overrides(prepared, {"run.seed": 78, "tracking.uri": "http://user:secret@tracking"})
    trial = plan(Arm("full", "all", recipe), 78, 1.0)
    trial.write()
    text = (trial.folder / TRIAL).read_text()
    assert "secret" not in text and Trial.from_dict(json.loads(text)).folder == trial.folder


def test_the_lowest_finite_loss_selects_the_rate():
    found = choose_rate({0.5: 2.0, 1.0: 1.5, 2.0: float("nan")}, "none")
    assert found.rate == 1.0 and found.losses == {0.5: 2.0, 1.0: 1.5, 2.0: None}
    with pytest.raises(FiftyfoldError, match="none of them"):
        choose_rate({1.0: float("nan")}, "none of them")


def test_a_best_rate_at_the_edge_of_the_list_leads_to_another_one_beyond_it():
    assert rate_beyond(3.0, [0.3, 1.0, 3.0]) == 9.0
    assert rate_beyond(9.0, [0.3, 1.0, 3.0, 9.0]) == 27.0
    assert rate_beyond(0.3, [1.0, 3.0, 0.3]) == 0.09
    assert rate_beyond(1.0, [0.3, 1.0, 3.0]) is None
    assert rate_beyond(1.0, [1.0]) is None


class CountedExperiment(Experiment):
    """Finishes trials with losses from a function of the rate instead of training."""

    def __init__(self, section, loss):
        self.section, self.loss, self.rates = section, loss, []

    def expect(self, trials):
        pass

    def run(self, trials):
        failures = {}
        for trial in trials:
            self.rates.append(trial.rate)
            if (loss := self.loss(trial.rate)) is None:
                failures[trial.label] = "out of memory"
                continue
            trial.folder.mkdir(parents=True)
            result = {"run_id": "a", "metrics": {"validation/loss": loss}, "curve": []}
            (trial.folder / RESULT).write_text(json.dumps(result))
        return failures


def test_rates_beyond_the_edge_are_tried_until_the_best_is_within_or_the_limit_is_reached(prepared):
    arm = Arm("full", "all", prepared)
    changes = {"seeds": (91,), "rates": (0.5, 1.0, 2.0), "further_rates": 2}
    section = prepared.compare.model_copy(update=changes)
    experiment = CountedExperiment(section, lambda rate: abs(rate - 4.0))
    assert experiment.select_rates([arm])["full"].rate == 4.0
    assert experiment.rates == [0.5, 1.0, 2.0, 4.0, 8.0]
    section = section.model_copy(update={"seeds": (92,)})
    experiment = CountedExperiment(section, lambda rate: None if rate > 2.0 else -rate)
    found = experiment.select_rates([arm])["full"]
    assert found.rate == 2.0 and found.losses == {0.5: -0.5, 1.0: -1.0, 2.0: -2.0, 4.0: None}
    assert experiment.rates == [0.5, 1.0, 2.0, 4.0], "a rate that failed is not tried again"


def test_the_quick_form_keeps_stages_arms_and_seeds():
    recipe = load_recipe(["configs/tiny.yaml"])
    short = quick(recipe)
    assert [s.attention for s in curriculum(short)] == [s.attention for s in curriculum(recipe)]
    assert total_steps(short) < 20 and short.model == recipe.model and short.data == recipe.data
    assert short.ablate.seeds == recipe.ablate.seeds and short.compare.arms == recipe.compare.arms
    assert short.ablate.choices == recipe.ablate.choices and short.evaluate.tasks == recipe.evaluate.tasks
    assert short.evaluate.samples == 2
    assert quick(with_overrides(recipe, {"evaluate.tasks": ["mqar", "residue"]})).evaluate.samples == 32  # one a length
    assert short.ablate.name == "ablation-quick" and len(short.ablate.rates) == 2
