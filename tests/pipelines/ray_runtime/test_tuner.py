"""Errors that end a tuner, the number of its trials at a time, and their progress."""

import os
from types import SimpleNamespace

import pytest
import ray

from model.errors import FiftyfoldError
from pipelines.ray_runtime.tuner import TrialProgress, fit_tuner, trials_at_once


def tuner_that_raises(error, cause=None):
    def fit():
        raise error from cause

    return SimpleNamespace(fit=fit)


def test_a_trial_that_ray_ended_for_lack_of_memory_is_one_sentence():
    killed = ray.exceptions.OutOfMemoryError("1 worker was killed.\nTop 10 memory users:\nRefer to the documentation.")
    # As raised by Tune: it takes an error of the actor for a bug of its own.
    for error, cause in ((RuntimeError(f"Caught unexpected exception: {killed}"), killed), (killed, None)):
        with pytest.raises(FiftyfoldError, match=r"^training failed: the node ran out of memory.* run the step again"):
            fit_tuner(tuner_that_raises(error, cause), 2)


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="a bug"):
        fit_tuner(tuner_that_raises(RuntimeError("a bug")), 2)


@pytest.fixture
def cluster(monkeypatch):
    """A cluster of 6 logical CPUs on a machine with 2 cores."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 6.0})
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_trials_fill_the_cores_of_this_machine_unless_their_number_is_given(cluster):
    assert [trials_at_once(each, None) for each in (0.5, 1.0, 2.0, 3.0)] == [4, 2, 1, 1]
    assert [trials_at_once(1.0, given) for given in (1, 4, 100)] == [1, 4, 6], "at most those that the cluster fits"


@pytest.mark.parametrize(("address", "trials"), [("", 2), ("10.0.0.1:6379", 6)])
def test_trials_fill_a_joined_cluster(cluster, monkeypatch, address, trials):
    monkeypatch.setenv("RAY_ADDRESS", address)  # without a value, Ray starts a local cluster
    assert trials_at_once(1.0, None) == trials


def test_progress_counts_reused_trials(capsys):
    progress = TrialProgress("sweep", lambda trial: f"trial {trial} ended")
    progress.total += 5
    progress.skip(3)
    progress.on_trial_complete(1, [], "x")
    progress.on_trial_complete(2, [], "y")
    assert capsys.readouterr().out.splitlines() == [
        "sweep: 3 finished trials are reused",
        "sweep: trial 4/5: trial x ended, under a minute left",
        "sweep: trial 5/5: trial y ended, under a minute left",
    ]
