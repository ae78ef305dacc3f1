"""Errors that end a tuner."""

from types import SimpleNamespace

import pytest
import ray

from model.errors import FiftyfoldError
from pipelines.ray_runtime.tuner import fit_tuner


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
