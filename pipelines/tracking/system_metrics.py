"""Metrics of the machine while a run works, as MLflow's UI shows them under "System metrics"."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

from pipelines.recipe.quoting import first_line
from pipelines.tracking.mlflow_store import TrackedRun


@contextmanager
def system_metrics(tracked: TrackedRun, interval: float | None, prefix: str = "system/") -> Iterator[None]:
    """Log CPU, memory, disk and network use of this machine, and its GPUs, every ``interval`` seconds of the block.

    Steps are seconds since the run began. MLflow's own monitor stops for runs that have ended, such as an evaluated
    one. Does nothing if ``interval`` is None.
    """
    if interval is None:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(target=_log_until, args=(stop, tracked, interval, prefix), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _log_until(stop: threading.Event, tracked: TrackedRun, interval: float, prefix: str) -> None:
    logging.getLogger("mlflow.system_metrics").setLevel(logging.WARNING)  # it announces that there is no GPU
    try:
        monitor = SystemMetricsMonitor(tracked.run_id, tracking_uri=tracked.uri)
        started = tracked.start_time()
        while not stop.wait(interval):
            monitor.collect_metrics()
            values = {f"{prefix}{name}": value for name, value in monitor.aggregate_metrics().items()}
            tracked.log_metrics(values, step=int(time.time() - started))
            for each in monitor.monitors:
                each.clear_metrics()
    except Exception as error:  # an unreachable MLflow must not end the run
        print(f"run {tracked.run_id}: no more system metrics ({first_line(error)})", flush=True)
