"""Serve a registered model, or a checkpoint folder, over HTTP on Ray Serve."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import httpx
import ray
from ray import serve as ray_serve
from ray.exceptions import RayError

from model import checkpoint as checkpoints
from model.errors import ConfigError, FiftyfoldError
from model.forward.execution import Execution
from model.tokenizer import load_tokenizer
from pipelines.ray_runtime.session import ray_session
from pipelines.recipe.paths import MODEL_URI
from pipelines.recipe.schema import Recipe, ServeSection
from pipelines.steps import Step
from pipelines.tracking.mlflow_store import open_tracking
from pipelines.tracking.registry import download
from serve.api.authorization import read_key
from serve.api.chat_template import ChatTemplate
from serve.api.config import is_loopback
from serve.app import APPLICATION, build
from serve.config import ServerConfig

HEALTH_TIMEOUT_SECONDS = 60.0
_ERROR_LINE = re.compile(r"^[\w.]*(?:Error|Exception|Exit|Interrupt)\b.*$", re.MULTILINE)
"""The last line of a traceback."""


@dataclass
class Deployment:
    """A model being served, until :meth:`stop` is called or the context manager exits."""

    url: str
    """Base address without a trailing slash."""
    model_name: str
    checkpoint: Path
    weights: str
    """Data type of the matrices, as reported by a replica."""
    _started: ExitStack = field(repr=False)

    def stop(self) -> None:
        """Stop serving, and shut the Ray cluster down if it was started here. Later calls do nothing."""
        with redirect_stdout(_WithoutShutdownNotice(sys.stdout)):
            self._started.close()

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@dataclass(frozen=True)
class DeployResult:
    """A deployment that has been stopped."""

    url: str
    model_name: str
    checkpoint: Path


def run(recipe: Recipe) -> DeployResult:
    """Serve ``serve.model_uri`` until SIGINT or SIGTERM. Raises the errors of :func:`start`."""
    with start(recipe) as deployment:
        _print_endpoint(deployment, recipe.serve)
        wait_for_signal()
        print("stopping", flush=True)
    return DeployResult(deployment.url, deployment.model_name, deployment.checkpoint)


def start(recipe: Recipe) -> Deployment:
    """Serve ``serve.model_uri`` on ``serve.host:serve.port`` and return once it is healthy.

    ``serve.model_uri`` is ``models:/<name>@<alias>``, ``models:/<name>/<version>`` or a checkpoint folder. Joins the
    Ray cluster at RAY_ADDRESS, or starts one that ends with the deployment.

    Raises ConfigError for a model that does not exist, a malformed chat template, a port in use, too small a cluster,
    and an address other than loopback without an API key, and CheckpointError for a damaged checkpoint. Nothing is left
    running then.
    """
    section = recipe.serve
    check_key(section)
    check_port(section.host, section.port)  # before a model is downloaded
    model_name, folder = find_model(recipe)
    # Load once here: damage is then reported in one sentence, not by replicas that keep restarting.
    model = checkpoints.load(folder)
    model.execution = Execution(section.execution)
    ChatTemplate(load_tokenizer(folder, model_vocab_size=model.config.vocab_size))
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
        except (RuntimeError, TimeoutError, RayError) as error:  # a replica or a proxy failed to start
            raise FiftyfoldError(f"serve: Ray Serve could not start ({_failure(error)})") from error
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
    """Return the name that clients use and the checkpoint folder of ``serve.model_uri``."""
    uri = recipe.serve.model_uri
    if not uri.startswith("models:/"):
        folder = Path(uri)
        return "/".join(folder.parts[-2:]).lstrip("/"), folder
    match = MODEL_URI.fullmatch(uri)
    tracking = open_tracking(recipe, write=False)
    destination = None
    if tracking.uri.startswith("http"):
        # Replicas may run on other machines, which can read the runs' folder but not a temporary one here.
        target = recipe.run.folder / "served"
        target.mkdir(parents=True, exist_ok=True)
        destination = Path(tempfile.mkdtemp(dir=target))
    folder = download(tracking, uri, destination)
    return match["name"] if match else APPLICATION, folder


def _arguments(section: ServeSection, folder: Path, model_name: str) -> dict[str, Any]:
    values = section.model_dump(include=set(ServerConfig.model_fields))
    if section.api_key_file is not None:  # replicas run in other folders
        values["api_key_file"] = str(Path(section.api_key_file).absolute())
    return {**values, "checkpoint": str(folder), "model_name": model_name}


def check_key(section: ServeSection) -> None:
    """Raise ConfigError for an unreadable key file, and without any key on an address that others can reach."""
    if not is_loopback(section.host) and not section.needs_key:
        raise ConfigError(
            f"serve.host: {section.host} is not a loopback address; set serve.api_key_file or serve.api_key_variable "
            "so that only clients with the API key are served"
        )
    if section.api_key_file is not None:  # a variable may be set on the cluster's nodes only
        authorization_headers(section)


def authorization_headers(section: ServeSection) -> dict[str, str]:
    """Return the headers of a request to the deployment. Raises ConfigError for a key that cannot be read."""
    try:
        key = read_key(section)
    except ConfigError as error:
        raise ConfigError(f"serve.{error}") from None
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def check_port(host: str, port: int) -> None:
    """Raise ConfigError unless a server can listen on the port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # like servers, ignore connections in TIME_WAIT
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"serve.port: cannot listen on {host}:{port} ({error.strerror})") from error


def _check_cluster(section: ServeSection) -> None:
    """Raise ConfigError if Ray Serve would wait forever for resources, or replace another application."""
    resources = ray.cluster_resources()
    for kind, each in (("CPU", section.cpus_per_replica), ("GPU", section.gpus_per_replica)):
        available, needed = resources.get(kind, 0), section.replicas * each
        if needed > available:
            raise ConfigError(
                f"serve.replicas: {section.replicas} replicas of {each:g} {kind} need {needed:g} {kind}, "
                f"the Ray cluster has {available:g}"
            )
    if ray_serve.status().proxies:
        raise ConfigError(
            "serve: the Ray cluster already runs Ray Serve; add the application there with `serve deploy` and "
            "import_path serve.app:build, or stop the running application"
        )


def _wait_until_healthy(url: str) -> dict[str, Any]:
    """Return the response of ``/healthz`` once it is healthy."""
    deadline = time.monotonic() + HEALTH_TIMEOUT_SECONDS
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
    raise FiftyfoldError(f"serve: {url}/healthz was not healthy within {HEALTH_TIMEOUT_SECONDS:g} seconds ({answer})")


def _print_endpoint(deployment: Deployment, section: ServeSection) -> None:
    body = json.dumps({"model": deployment.model_name, "prompt": "def ", "max_tokens": 32})
    print(f"serving {deployment.checkpoint} as '{deployment.model_name}' at {deployment.url}/v1 (Ctrl-C stops)")
    print(f"  execution {section.execution}, weights in {deployment.weights}")
    key = ""
    if section.needs_key:
        source = f"cat {section.api_key_file}" if section.api_key_file else f"printenv {section.api_key_variable}"
        key = f' -H "Authorization: Bearer $({source})"'
    print(f"  curl {deployment.url}/v1/completions -H 'Content-Type: application/json'{key} -d '{body}'", flush=True)


class _WithoutShutdownNotice(io.TextIOBase):
    """Forwards output except Ray's error about the shutdown call that Serve's controller does not survive."""

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


def _failure(error: Exception) -> str:
    """Return the cause of a failed start: the error of a replica if there is one, else the last line of ``error``."""
    messages: list[str] = []
    if ray.is_initialized():
        with suppress(Exception):  # Serve itself may have failed, and `error` says more about that
            application = ray_serve.status().applications.get(APPLICATION)
            messages = [each.message for each in application.deployments.values()] if application else []
    for message in messages:
        errors = _ERROR_LINE.findall(message)
        if errors:
            return errors[-1].strip()
    text = "\n".join(filter(None, messages)) or str(error)
    return (text.strip() or type(error).__name__).splitlines()[-1].strip()


STEP = Step(run)
