"""Errors of a training on Ray in one sentence."""

import ray.exceptions
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from model.errors import DataError
from pipelines.ray_runtime.fit import unwrap_ray_error


def test_an_error_of_a_worker_is_found_in_the_chain():
    error = WorkerGroupError("2 workers failed", worker_failures={1: DataError("00000.parquet: damaged")})
    assert str(unwrap_ray_error(error)) == "00000.parquet: damaged"


def test_running_out_of_memory_is_named_with_a_remedy():
    killed = ray.exceptions.OutOfMemoryError("Task was killed.\nRefer to the documentation.")
    for error in (killed, WorkerGroupError("failed", worker_failures={0: killed}), ControllerError(killed)):
        message = str(unwrap_ray_error(error))
        assert "ran out of memory" in message and "train.batch_rows" in message and "\n" not in message


def test_other_errors_are_shown_by_their_last_line():
    assert str(unwrap_ray_error(RuntimeError("a\nb"))) == "training failed: b"


def test_a_failed_allocation_in_a_worker_is_one_plain_sentence():
    text = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"
    for failure in (RuntimeError(text), MemoryError()):
        message = str(unwrap_ray_error(WorkerGroupError("failed", worker_failures={0: failure})))
        assert message.startswith("training failed: not enough memory") and "enforce" not in message
