"""Serve registered models, or checkpoint folders, over HTTP on Ray Serve."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import httpx
import ray
import yaml
from ray import serve as ray_serve
from ray.serve.schema import ApplicationStatus

from model import checkpoint as checkpoints
from model.atomic_files import atomic_file
from model.errors import ConfigError, FiftyfoldError
from model.forward.execution import Execution
from model.tokenizer import load_tokenizer
from pipelines.ray_runtime.serve_applications import (
    check_serve_cluster,
    drain,
    needed_cpus,
    replace_model,
    replacement_state,
    serve_config,
    start_applications,
)
from pipelines.ray_runtime.session import ray_session
from pipelines.recipe.messages import naming
from pipelines.recipe.paths import check_creatable, path_option
from pipelines.recipe.ports import require_free_port
from pipelines.recipe.quoting import first_line
from pipelines.recipe.schema import Recipe, ServeSection
from pipelines.steps import Step
from pipelines.tracking.served_models import DeployedModel, ModelStore, model_sources
from serve.api.authorization import read_key
from serve.api.chat_template import ChatTemplate
from serve.api.config import is_loopback
from serve.engine.speculation import check_speculation

HEALTH_TIMEOUT_SECONDS = 60.0
_POLL_SECONDS = 0.5


@dataclass
class Deployment:
    """Models being served, until :meth:`stop` is called or the context manager exits."""

    url: str
    """Base address without a trailing slash."""
    models: list[DeployedModel]
    """The models, the default one first."""
    weights: str
    """Data type of the matrices, as reported by a replica."""
    _section: ServeSection = field(repr=False)
    _store: ModelStore = field(repr=False)
    _started: ExitStack = field(repr=False)
    _refused: dict[str, str | None] = field(default_factory=dict, repr=False)
    """Damaged versions by model."""
    _problems: dict[str, str] = field(default_factory=dict, repr=False)
    """Last problem that was printed, by model."""

    @property
    def model_name(self) -> str:
        """Name of the default model."""
        return self.models[0].name

    @property
    def checkpoint(self) -> Path:
        """Checkpoint folder of the default model."""
        return self.models[0].checkpoint

    def serve_until_signal(self) -> None:
        """Return after SIGINT or SIGTERM, when all requests have ended. Follow aliases that move meanwhile.

        From the first signal on, new requests are refused, and running ones have ``drain_seconds``. A second signal
        ends the wait.
        """
        stop, stop_now = threading.Event(), threading.Event()

        def on_signal(*_: object) -> None:
            (stop_now if stop.is_set() else stop).set()

        handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while not stop.wait(self._section.alias_poll_seconds):
                self.follow_aliases(stop)
            seconds = self._section.drain_seconds
            print(f"stopping; requests have {seconds:g} seconds to end (Ctrl-C ends them now)", flush=True)
            with _without_warnings():
                drained = drain(seconds, stop_now)
            if not drained:
                print("stopping with unfinished requests", flush=True)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def follow_aliases(self, stop: threading.Event | None = None) -> None:
        """Serve the versions that the aliases name now. Problems are printed once; the old versions then go on.

        Returns when the new replicas have replaced the old ones, or when ``stop`` is set.
        """
        stop = stop or threading.Event()
        for index, model in enumerate(self.models):
            if stop.is_set():
                return
            try:
                new = self._begin_replacement(model)
            except Exception as error:  # keep serving the old version, whatever the error
                self._print_once(model, f"'{model.name}' stays at version {model.version}: {first_line(error)}")
                continue
            self._problems.pop(model.name, None)
            if new is None:
                continue
            self.models[index] = new
            if self._wait_until_replaced(new, stop):
                self._store.discard_others(new)
                print(f"serving version {new.version} of '{new.name}' from {new.checkpoint}", flush=True)

    def _begin_replacement(self, model: DeployedModel) -> DeployedModel | None:
        """Return the version that replaces ``model``, or None if its alias has not moved.

        Raises CheckpointError or ConfigError for a damaged version, which is not tried again.
        """
        if (new := self._store.newer_version(model, self._refused.get(model.name))) is None:
            return None
        try:
            check_model(new, self._section)
            replace_model(self._section, new)
        except FiftyfoldError:
            self._refused[model.name] = new.version
            self._store.discard(new)
            raise
        return new

    def _wait_until_replaced(self, model: DeployedModel, stop: threading.Event) -> bool:
        while not stop.wait(_POLL_SECONDS):
            try:
                status, problem = replacement_state(model)
            except FiftyfoldError as error:  # the application was deleted
                print(f"version {model.version} of '{model.name}' does not start: {error}", flush=True)
                return False
            except Exception as error:  # e.g. Serve's controller is being restarted
                self._print_once(model, f"waiting for version {model.version} of '{model.name}': {first_line(error)}")
                continue
            if status == ApplicationStatus.RUNNING:
                return True
            if problem:
                print(f"version {model.version} of '{model.name}' does not start: {problem}", flush=True)
                return False
        return False

    def _print_once(self, model: DeployedModel, problem: str) -> None:
        if self._problems.get(model.name) != problem:
            print(problem, flush=True)
        self._problems[model.name] = problem

    def stop(self) -> None:
        """Stop serving, and shut the Ray cluster down if it was started here. Later calls do nothing."""
        with redirect_stdout(_WithoutShutdownNotice(sys.stdout)), _without_warnings():
            self._started.close()

    def __enter__(self) -> Deployment:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def run(recipe: Recipe, write_config: Path | None = None) -> None:
    """Serve the models of ``serve`` until SIGINT or SIGTERM, or only write a Serve config file.

    Raises the errors of :func:`start`.
    """
    if write_config is not None:
        write_serve_config(recipe, write_config)
        return
    with start(recipe) as deployment:
        _print_endpoint(deployment, recipe.serve)
        deployment.serve_until_signal()


def start(recipe: Recipe) -> Deployment:
    """Serve the models of ``serve`` on ``serve.host:serve.port`` and return once they are healthy.

    Joins the Ray cluster at RAY_ADDRESS, or starts one that ends with the deployment.

    Raises ConfigError for a model that does not exist, a malformed chat template, a port in use, too small a cluster,
    and an address other than loopback without an API key, and CheckpointError for a damaged checkpoint. On failure,
    nothing is left running.
    """
    section = recipe.serve
    check_key(section, starts_cluster=not (ray.is_initialized() or os.environ.get("RAY_ADDRESS")))
    check_port(section.host, section.port)  # before a model is downloaded
    host = f"[{section.host}]" if ":" in section.host else section.host
    url = f"http://{host}:{section.port}"
    with ExitStack() as undo:
        store = ModelStore(recipe)
        undo.callback(store.close)
        models = store.find()
        for model in models:
            check_model(model, section)
        sources = ", ".join(f"'{name}' from {uri}" for name, uri, _ in model_sources(section))
        print(f"starting Ray Serve at {url} with {sources}", flush=True)
        undo.enter_context(ray_session(num_cpus=max(os.cpu_count() or 1, needed_cpus(section))))
        check_serve_cluster(section)
        undo.callback(ray_serve.shutdown)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        start_applications(section, models)
        weights = _wait_until_healthy(url)["models"][0]["weights"]
        return Deployment(url, models, weights, section, store, undo.pop_all())


def check_model(model: DeployedModel, section: ServeSection) -> None:
    """Load a model's checkpoint. Damage is then reported in one sentence, not by replicas that keep restarting.

    Raises CheckpointError or ConfigError, naming the recipe's key.
    """
    with naming(model.key):
        config = checkpoints.load_config(model.checkpoint)
    if section.speculative_tokens:
        try:
            check_speculation(config, section.speculative_tokens)
        except ConfigError as error:
            raise ConfigError(f"serve.{error}") from None
    with naming(model.key):
        loaded = checkpoints.load(model.checkpoint)
        loaded.execution = Execution(section.execution)
        ChatTemplate(load_tokenizer(model.checkpoint, model_vocab_size=config.vocab_size))


def write_serve_config(recipe: Recipe, path: Path) -> None:
    """Write a config file for ``serve deploy`` with the models of a recipe. Raises the errors of :func:`start`.

    Copies of checkpoints (:class:`pipelines.tracking.served_models.ModelStore`) stay, because the config names them. On
    failure, they are removed.
    """
    section = recipe.serve
    check_key(section)
    check_creatable(path, "--write-config")
    with ExitStack() as undo:
        store = ModelStore(recipe)
        undo.callback(store.close)
        models = store.find()
        for model in models:
            check_model(model, section)
        try:
            with atomic_file(path) as scratch:
                scratch.write_text(yaml.safe_dump(serve_config(section, models), sort_keys=False))
        except OSError as error:
            raise ConfigError(f"--write-config: {path}: {error.strerror}") from error
        undo.pop_all()
    print(f"wrote {path}; deploy it with: serve deploy {shlex.quote(str(path))}")


def check_key(section: ServeSection, starts_cluster: bool = False) -> None:
    """Raise ConfigError for an unreadable key file, and without any key on an address that others can reach.

    A variable is checked if this process starts the cluster, whose processes inherit its environment. On other clusters
    it may be set on the nodes only.
    """
    if not is_loopback(section.host) and not section.needs_key:
        raise ConfigError(
            f"serve.host: {section.host} is not a loopback address; set serve.api_key_file or serve.api_key_variable "
            "so that only clients with the API key are served"
        )
    if section.api_key_file is not None or starts_cluster:
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
    require_free_port("serve.port", host, port)


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
            answer = first_line(error)
        time.sleep(0.1)
    raise FiftyfoldError(f"serve: {url}/healthz was not healthy within {HEALTH_TIMEOUT_SECONDS:g} seconds ({answer})")


def _print_endpoint(deployment: Deployment, section: ServeSection) -> None:
    for model in deployment.models:
        version = "" if model.version is None else f", version {model.version}"
        print(f"serving {model.checkpoint} as '{model.name}'{version} at {deployment.url}/v1 (Ctrl-C stops)")
    print(f"  execution {section.execution}, weights in {deployment.weights}")
    key = ""
    if section.needs_key:
        variable = section.api_key_variable
        source = f"printenv {variable}" if variable else f"cat {shlex.quote(section.api_key_file or '')}"
        key = f' -H "Authorization: Bearer $({source})"'
    body = json.dumps({"model": deployment.model_name, "prompt": "def ", "max_tokens": 32})
    print(
        f"  curl {deployment.url}/v1/completions -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}",
        flush=True,
    )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress Ray Serve's warnings about replicas that end. Errors are still printed."""
    logger = logging.getLogger("ray.serve")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _WithoutShutdownNotice(io.TextIOBase):
    """Forwards output except Ray's errors about calls of Serve's controller that end with it."""

    def __init__(self, out: TextIO):
        self._out = out
        self._dropped = False

    def write(self, text: str) -> int:
        if re.search(r"Task ServeController\.\w+ failed", text):
            self._dropped = True
        elif not (self._dropped and text == "\n"):
            self._dropped = False
            self._out.write(text)
        return len(text)

    def flush(self) -> None:
        self._out.flush()


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--write-config",
        metavar="FILE",
        type=path_option("--write-config"),
        help="write a config file for Ray's `serve deploy` and stop",
    )


STEP = Step(run, _add_options)
