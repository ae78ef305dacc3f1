"""The Ray cluster a step runs on: the one that RAY_ADDRESS names, else one of its own that ends with it."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading

# Before ray is imported anywhere: no usage reports, and no token file in the user's home for a private cluster.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if "RAY_ADDRESS" not in os.environ:
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
# A worker's report waits until Train's controller has looked; every 2 s by default, which is longer than small steps.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
# Serve kills an HTTP proxy that takes longer to start, 5 s by default: on a busy machine importing it takes longer.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's own panels; the sweep prints its trials itself

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil
import ray

from model.errors import ConfigError, FiftyfoldError
from pipelines.ray_runtime.signals import on_sigterm

OBJECT_STORE_BYTES = 400 * 2**20
MIN_LOGICAL_CPUS = 6
"""Logical CPUs of a local cluster, however few cores there are: beside its workers a step reads data and runs Train's,
Tune's or Serve's own processes, which mostly wait."""


@contextmanager
def ray_session(num_cpus: float = 0) -> Iterator[None]:
    """Run the block on a Ray cluster; shuts down only what it started. Nested use shares the outer session.

    ``num_cpus`` is what the step needs of a local cluster, in logical CPUs; it is ignored when joining one. SIGTERM
    ends the block as Ctrl-C does.
    """
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    handler = signal.getsignal(signal.SIGTERM)
    # Workers import the rooms from the checkout; a joined cluster gets them from the job's working directory.
    if address:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise FiftyfoldError(f"RAY_ADDRESS: cannot join the Ray cluster at {address} ({error})") from error
    else:
        _start_local(math.ceil(max(num_cpus, MIN_LOGICAL_CPUS)))
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread:  # Ray's own handler, set by now, aborts: runs would be left as running
        signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        ray.shutdown()
        if in_main_thread:
            signal.signal(signal.SIGTERM, handler)


def _start_local(num_cpus: int) -> None:
    """Start a local cluster, at the second attempt if need be: a busy machine may miss Ray's fixed start-up timeouts.

    Raises FiftyfoldError if neither attempt succeeds.
    """
    options: dict[str, Any] = {
        "address": "local",  # never a stale cluster that some file still names
        "num_cpus": num_cpus,
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": True,  # Train's controller and Serve ask its agent for state
        "dashboard_host": "127.0.0.1",
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": {"PYTHONPATH": os.pathsep.join((os.getcwd(), os.environ.get("PYTHONPATH", "")))}},
    }
    for last_attempt in (False, True):
        try:
            return _init_or_clean_up(options)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            if last_attempt:
                raise FiftyfoldError(f"Ray: no local cluster started in two attempts ({reason})") from error
            print(f"Ray did not start ({reason}); trying once more")


def _init_or_clean_up(options: dict[str, Any]) -> None:
    """``ray.init``; where it fails, kill the processes it has started, of which ``ray.shutdown`` does not know."""
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
    """Logical CPUs that this machine is good for."""
    return max(MIN_LOGICAL_CPUS, os.cpu_count() or 1)


def need(key: str, cpus: float, gpus: float = 0) -> None:
    """Raise ConfigError naming ``key`` unless the cluster has that much; Ray would wait for it without end."""
    there = ray.cluster_resources()
    for kind, needed in (("CPU", cpus), ("GPU", gpus)):
        if needed > there.get(kind, 0):
            raise ConfigError(f"{key}: needs {needed:g} {kind}, the Ray cluster has {there.get(kind, 0):g}")
