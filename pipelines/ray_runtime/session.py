"""The Ray cluster of a step: the one at RAY_ADDRESS, or a local one that ends with the step."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray.exceptions import RayError

from model.errors import ConfigError, FiftyfoldError
from model.wording import count
from pipelines import RAY_JOB_VARIABLE
from pipelines.ray_runtime.cluster_token import ensure_token
from pipelines.ray_runtime.signals import handle_sigterm
from pipelines.recipe.quoting import first_line
from pipelines.recipe.schema import Recipe

OBJECT_STORE_BYTES = 400 * 2**20
MIN_LOGICAL_CPUS = 6
"""Minimum logical CPUs of a local cluster, whatever the number of cores. Besides its workers a step needs tasks that
read data and processes of Train, Tune or Serve, which mostly wait."""
PROJECT = Path(__file__).resolve().parents[2]
PACKAGES = ("kernels", "model", "evals", "serve", "pipelines")
"""Packages that workers import."""
_MAX_SOCKET_BYTES = 107
"""Maximum length of the path of a Unix socket."""
_CONNECT_SECONDS = 10


@contextmanager
def ray_session(num_cpus: float = 0) -> Iterator[None]:
    """Run the block on a Ray cluster, and shut it down afterwards if it was started here. Nested sessions share one.

    SIGTERM ends the block like Ctrl-C.

    Args:
        num_cpus: Logical CPUs that the step needs of a local cluster; ignored when joining one.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    handler = signal.getsignal(signal.SIGTERM)
    if address:
        _check_address(address)
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env=_packages_of_job(os.environ.get(RAY_JOB_VARIABLE)),
            )
        except (ConnectionError, RuntimeError, ValueError, RayError) as error:
            reason = " ".join(str(error).split())
            raise FiftyfoldError(f"RAY_ADDRESS: cannot join the Ray cluster at {address} ({reason})") from error
    else:
        _check_temporary_folder()
        ensure_token()
        _start_local(math.ceil(max(num_cpus, MIN_LOGICAL_CPUS)))
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:  # Ray has installed a handler that aborts, which would leave MLflow runs marked as running
        signal.signal(signal.SIGTERM, handle_sigterm)
    try:
        yield
    finally:
        ray.shutdown()
        if in_main_thread:
            signal.signal(signal.SIGTERM, handler)


def _check_address(address: str) -> None:
    """Raise FiftyfoldError if nothing listens at an address of the form host:port. Ray would wait for minutes."""
    host, separator, port = address.removeprefix("ray://").rpartition(":")
    if not (separator and port.isdecimal()):
        return  # such as "auto"
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS):
            pass
    except (OSError, OverflowError) as error:
        raise FiftyfoldError(f"RAY_ADDRESS: no Ray cluster answers at {address} ({error})") from error


def _packages_of_job(job: str | None) -> dict[str, Any]:
    """Return a runtime environment that sends this project's packages to the workers of a joined cluster.

    Their machines may have no checkout, and their processes were started in other folders. Empty if a submitted job's
    own environment brings the packages: as ``py_modules``, or in the working directory.

    Args:
        job: The value of :data:`pipelines.RAY_JOB_VARIABLE`.
    """
    environment = (json.loads(job).get("runtime_env") or {}) if job else {}
    if "py_modules" in environment or ("working_dir" in environment and Path.cwd().resolve() == PROJECT):
        return {}
    return {"py_modules": [str(PROJECT / name) for name in PACKAGES], "excludes": ["__pycache__"]}


def _check_temporary_folder() -> None:
    """Raise ConfigError if the folder of temporary files is too long for the sockets of a local cluster."""
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = os.environ.get(name, "/tmp")
    session = f"session_2026-01-01_00-00-00_000000_{os.getpid()}"
    path = os.path.join(folder, "ray", session, "sockets", "plasma_store")
    excess = len(os.fsencode(path)) - _MAX_SOCKET_BYTES
    if excess > 0:
        raise ConfigError(
            f"{name}: {folder} is {count(excess, 'byte')} too long for the sockets of Ray; set RAY_TMPDIR to a folder "
            "with a shorter path, such as /tmp"
        )


def _search_path() -> str:
    """Return a PYTHONPATH for workers of a local cluster, which run in other folders."""
    given = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return os.pathsep.join(dict.fromkeys(os.path.abspath(entry) for entry in (str(PROJECT), os.getcwd(), *given)))


def _start_local(num_cpus: int) -> None:
    """Start a local cluster, in two attempts: a busy machine may miss Ray's fixed startup timeouts.

    Raises FiftyfoldError if both fail.
    """
    options: dict[str, Any] = {
        "address": "local",  # never a stale cluster that some file still names
        "num_cpus": num_cpus,
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": True,  # Train's controller and Serve query its agent
        "dashboard_host": "127.0.0.1",
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": {"PYTHONPATH": _search_path()}},
    }
    for last_attempt in (False, True):
        try:
            return _init_or_clean_up(options)
        except Exception as error:
            reason = first_line(error)
            if last_attempt:
                raise FiftyfoldError(f"Ray: no local cluster started in two attempts ({reason})") from error
            print(f"Ray did not start ({reason}); trying once more")


def _init_or_clean_up(options: dict[str, Any]) -> None:
    """Call ``ray.init``. If it fails, kill the processes it has started, which ``ray.shutdown`` does not know of."""
    before = psutil.Process().children(recursive=True)
    try:
        ray.init(**options)
    except Exception:
        ray.shutdown()
        started = [p for p in psutil.Process().children(recursive=True) if p not in before]
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(started, timeout=10)
        raise


def local_cpus() -> int:
    """Return the number of logical CPUs to give a local cluster on this machine."""
    return max(MIN_LOGICAL_CPUS, os.cpu_count() or 1)


def usable_cpus() -> float:
    """Return the CPUs to fill with trials: those of the cluster at RAY_ADDRESS, or the cores of this machine.

    A local cluster has more logical CPUs than cores.
    """
    return ray.cluster_resources()["CPU"] if os.environ.get("RAY_ADDRESS") else float(os.cpu_count() or 1)


def check_cluster(recipe: Recipe) -> None:
    """Raise ConfigError for a recipe with GPUs if the step would start a cluster on a machine without any.

    Raises FiftyfoldError if nothing listens at RAY_ADDRESS.
    """
    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        _check_address(address)
    elif recipe.train.use_gpu and not torch.cuda.is_available():
        raise ConfigError("train.use_gpu: no CUDA device here; pass --train.use_gpu false to use the CPU")


def require_resources(key: str, cpus: float, gpus: float = 0) -> None:
    """Raise ConfigError naming ``key`` if the cluster has fewer resources; Ray would wait for them forever."""
    available = ray.cluster_resources()
    for kind, needed in (("CPU", cpus), ("GPU", gpus)):
        if needed > available.get(kind, 0):
            raise ConfigError(f"{key}: needs {count(needed, kind)}, the Ray cluster has {available.get(kind, 0):g}")
