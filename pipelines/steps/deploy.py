"""The deploy step: a registered model, or a checkpoint folder, answering HTTP requests under Ray Serve."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from pipelines.ray_runtime.session import ray_session  # isort: skip  (sets what Ray reads when it is imported)

import httpx
import ray
from ray import serve as ray_serve
from ray.exceptions import RayError

from model import checkpoint as checkpoints
from model.errors import ConfigError, FiftyfoldError
from model.execution import Execution
from model.tokenizer import load_tokenizer
from pipelines.recipe.schema import Recipe, ServeSection
from pipelines.steps.promote import MODEL_URI, resolve
from pipelines.tracking.mlflow_store import open_tracking
from serve.app import APPLICATION, build

HEALTHY_WITHIN_SECONDS = 60.0


@dataclass
class Deployment:
    """A model that is being served. ``stop`` it, or use it as a context manager."""

    url: str
    """Base address, without a slash at the end."""
    model_name: str
    checkpoint: Path
    weights: str
    """Data type of the matrices, as a replica reports it."""
    _started: ExitStack = field(repr=False)

    def stop(self) -> None:
        """Stop serving, and the Ray cluster where it was started for this. A second call does nothing."""
        with redirect_stdout(_WithoutShutdownNotice(sys.stdout)):
            self._started.close()

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@dataclass(frozen=True)
class DeployResult:
    """What was served, after it has been stopped."""

    url: str
    model_name: str
    checkpoint: Path


def run(recipe: Recipe) -> DeployResult:
    """Serve ``serve.model_uri`` until SIGINT or SIGTERM. Raises what :func:`start` raises."""
    with start(recipe) as deployment:
        _print_endpoint(deployment, recipe.serve)
        wait_for_signal()
        print("stopping", flush=True)
    return DeployResult(deployment.url, deployment.model_name, deployment.checkpoint)


def start(recipe: Recipe) -> Deployment:
    """Serve ``serve.model_uri`` on ``serve.host:serve.port`` and return once it answers.

    ``serve.model_uri`` is ``models:/<name>@<alias>``, ``models:/<name>/<version>`` or a checkpoint folder. Joins the
    Ray cluster that RAY_ADDRESS names, else starts one that ends with the deployment. Raises, with nothing left
    running, ConfigError for a model that does not exist, a port in use or too small a cluster, and CheckpointError
    for a damaged checkpoint.
    """
    section = recipe.serve
    model_name, folder = find_model(recipe)
    # Read once here, so that damage is told in one sentence instead of by replicas that keep restarting.
    checkpoints.load(folder).execution = Execution(section.execution)
    load_tokenizer(folder)
    check_port(section.host, section.port)
    needed = section.replicas * section.cpus_per_replica
    with ExitStack() as undo:
        undo.enter_context(ray_session(num_cpus=max(os.cpu_count() or 1, math.ceil(needed))))
        _check_cluster(section)
        undo.callback(ray_serve.shutdown)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        try:
            ray_serve.start(
                proxy_location="HeadOnly",
                http_options={"host": section.host, "port": section.port},
                logging_config=quiet,
            )
            application = build(_arguments(section, folder, model_name))
            ray_serve.run(application, name=APPLICATION, route_prefix="/", logging_config=quiet)
        except (RuntimeError, TimeoutError, RayError) as error:  # a replica or a proxy that does not come up
            raise FiftyfoldError(f"serve: Ray Serve could not start ({_last_line(error)})") from error
        host = f"[{section.host}]" if ":" in section.host else section.host
        url = f"http://{host}:{section.port}"
        weights = _wait_until_healthy(url)["weights"]
        return Deployment(url, model_name, folder, weights, undo.pop_all())


def wait_for_signal() -> None:
    """Return on SIGINT or SIGTERM."""
    stop = threading.Event()
    handlers = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        stop.wait()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def find_model(recipe: Recipe) -> tuple[str, Path]:
    """(the name clients use, the checkpoint folder) of ``serve.model_uri``."""
    uri = recipe.serve.model_uri
    if not uri.startswith("models:/"):
        folder = Path(uri).absolute()
        return "/".join(folder.parts[-2:]).lstrip("/"), folder
    match = MODEL_URI.fullmatch(uri)
    tracking = open_tracking(recipe)
    destination = None
    if tracking.uri.startswith("http"):
        # The replicas may run on other machines: where the runs are, they can read; a temporary folder they cannot.
        served = recipe.run.folder / "served"
        served.mkdir(parents=True, exist_ok=True)
        destination = Path(tempfile.mkdtemp(dir=served))
    folder = resolve(tracking, uri, destination)
    return match["name"] if match else APPLICATION, folder


def _arguments(section: ServeSection, folder: Path, model_name: str) -> dict[str, Any]:
    values = section.model_dump(exclude={"model_uri", "host", "port"})
    return {**values, "checkpoint": str(folder), "model_name": model_name}


def check_port(host: str, port: int) -> None:
    """Raise ConfigError unless a server could listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: a port just left is free
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"serve.port: cannot listen on {host}:{port} ({error.strerror})") from error


def _check_cluster(section: ServeSection) -> None:
    """Raise ConfigError where Ray Serve would wait for ever, or serve in place of somebody else's application."""
    resources = ray.cluster_resources()
    for kind, each in (("CPU", section.cpus_per_replica), ("GPU", section.gpus_per_replica)):
        there, needed = resources.get(kind, 0), section.replicas * each
        if needed > there:
            raise ConfigError(
                f"serve.replicas: {section.replicas} replicas of {each:g} {kind} need {needed:g} {kind}, "
                f"the Ray cluster has {there:g}"
            )
    if ray_serve.status().proxies:
        raise ConfigError(
            "serve: the Ray cluster already runs Ray Serve; add the application there with `serve deploy` and "
            "import_path serve.app:build, or stop what is served"
        )


def _wait_until_healthy(url: str) -> dict[str, Any]:
    """Return what ``/healthz`` answers once it is healthy."""
    deadline = time.monotonic() + HEALTHY_WITHIN_SECONDS
    answer = "no answer"
    while time.monotonic() < deadline:
        try:
            response = httpx.get(f"{url}/healthz", timeout=5, trust_env=False)
            if response.is_success:
                return response.json()
            answer = f"status {response.status_code}"
        except httpx.HTTPError as error:
            answer = str(error)
        time.sleep(0.1)
    raise FiftyfoldError(f"serve: {url}/healthz was not healthy within {HEALTHY_WITHIN_SECONDS:g} seconds ({answer})")


def _print_endpoint(deployment: Deployment, section: ServeSection) -> None:
    body = json.dumps({"model": deployment.model_name, "prompt": "def ", "max_tokens": 32})
    print(f"serving {deployment.checkpoint} as '{deployment.model_name}' at {deployment.url}/v1 (Ctrl-C stops)")
    print(f"  computed {section.execution}, weights in {deployment.weights}")
    print(f"  curl {deployment.url}/v1/completions -H 'Content-Type: application/json' -d '{body}'", flush=True)


class _WithoutShutdownNotice(io.TextIOBase):
    """Passes everything on but Ray's report that Serve's controller, told to end, ended while being told."""

    def __init__(self, out: TextIO):
        self._out = out
        self._dropped = False

    def write(self, text: str) -> int:
        if "Task ServeController.graceful_shutdown failed" in text:
            self._dropped = True
        elif not (self._dropped and text == "\n"):
            self._dropped = False
            self._out.write(text)
        return len(text)

    def flush(self) -> None:
        self._out.flush()


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
