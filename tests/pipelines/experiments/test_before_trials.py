"""Settings that ablate and compare fix, and checks that they make, before any training."""

from types import SimpleNamespace

import pytest

from model.cache.random_fill import SPARE_BYTES
from model.errors import CacheError
from pipelines.experiments import ablation, comparison
from pipelines.recipe.loading import with_overrides
from pipelines.reports import cache_measurement


class OpenedError(Exception):
    """Ends a step where it would start Ray."""


@pytest.fixture
def opened(monkeypatch):
    """Return the arms with which an experiment is opened, by step."""
    found = {}

    def open_experiment(step, recipe, arms, manifest):
        found[step] = arms
        raise OpenedError

    for module in (ablation, comparison):
        monkeypatch.setattr(module, "open_experiment", open_experiment)
    return found


@pytest.fixture
def recipe(prepared):
    recipe = with_overrides(
        prepared,
        {
            "ablate": {"choices": ["hyper_connections"], "variants": {"narrow": {"model.window": 4}}, "context": 128},
            "compare": {"arms": {"twin": prepared.model.to_dict()}, "timed_lengths": [64]},
        },
    )
    return recipe.model_copy(update={"model": recipe.model.replace(vocab_size=300)})  # as a preset's


@pytest.mark.parametrize(("step", "run"), [("ablate", ablation.run_ablation), ("compare", comparison.run_comparison)])
def test_all_arms_have_the_vocabulary_of_the_data(recipe, opened, step, run):
    with pytest.raises(OpenedError):
        run(recipe, None)
    assert {arm.recipe.model.vocab_size for arm in opened[step]} == {258}
    assert len(opened[step]) > 1


def memory_of(monkeypatch, available):
    monkeypatch.setattr(cache_measurement.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))


def test_timed_lengths_may_exceed_the_lengths_of_the_costs(recipe, opened, monkeypatch):
    memory_of(monkeypatch, 1 << 50)
    with pytest.raises(OpenedError):
        comparison.run_comparison(with_overrides(recipe, {"compare.timed_lengths": [64, 1 << 24]}), None)


def test_timed_lengths_beyond_the_memory_are_refused_before_any_training(recipe, opened, monkeypatch):
    memory_of(monkeypatch, SPARE_BYTES + (1 << 22))
    with pytest.raises(CacheError, match=r"^compare\.timed_lengths: 2 caches of 1,048,582 tokens take [0-9,]+ bytes"):
        comparison.run_comparison(with_overrides(recipe, {"compare.timed_lengths": [64, 1 << 20]}), None)
    assert not opened
