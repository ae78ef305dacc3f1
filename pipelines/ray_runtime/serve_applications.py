"""The Ray Serve applications of a recipe: a gateway and one application per model."""

from __future__ import annotations

import math
import re
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentBroadcastResponse
from ray.serve.schema import ApplicationStatus

from model.errors import ConfigError, FiftyfoldError
from model.wording import count
from pipelines.ray_runtime.session import PROJECT
from pipelines.recipe.schema import ServeSection
from pipelines.tracking.served_models import DeployedModel
from serve.app import GATEWAY, application_name, build_gateway, build_model
from serve.config import ServerConfig

QUIET = {"log_level": "WARNING", "enable_access_log": False}
"""Serve's logging. Without access log, no request leaves a trace on disk."""
_DRAIN_POLL_SECONDS = 0.2
_ERROR_LINE = re.compile(r"^[\w.]*(?:Error|Exception|Exit|Interrupt)\b.*$", re.MULTILINE)
"""The last line of a traceback."""


def needed_cpus(section: ServeSection) -> int:
    """Return the logical CPUs for all replicas, and for the new ones of a model that is replaced."""
    models = 1 + len(section.models)
    return math.ceil((models * section.most_replicas + section.replicas) * section.cpus_per_replica)


def check_serve_cluster(section: ServeSection) -> None:
    """Raise ConfigError if Ray Serve would wait forever for resources, or replace another application."""
    resources = ray.cluster_resources()
    replicas = section.replicas * (1 + len(section.models))
    for kind, each in (("CPU", section.cpus_per_replica), ("GPU", section.gpus_per_replica)):
        available, needed = resources.get(kind, 0), replicas * each
        if needed > available:
            raise ConfigError(
                f"serve.replicas: {count(replicas, 'replica')} of {each:g} {kind} would use {count(needed, kind)}, "
                f"the Ray cluster has {available:g}"
            )
    if ray_serve.status().proxies:
        raise ConfigError(
            "serve: the Ray cluster already runs Ray Serve; add the applications there with `deploy --write-config` "
            "and `serve deploy`, or stop the running ones with `serve shutdown`"
        )


def start_applications(section: ServeSection, models: Sequence[DeployedModel]) -> None:
    """Start Ray Serve with all applications and wait until they run. Raises FiftyfoldError if they do not."""
    names = [application_name(model.name) for model in models]
    targets = [
        ray_serve.RunTarget(build_model(model_arguments(section, model)), name, route_prefix=None, logging_config=QUIET)
        for name, model in zip(names, models)
    ]
    gateway = build_gateway(gateway_arguments(section, models))
    targets.append(ray_serve.RunTarget(gateway, GATEWAY, route_prefix="/", logging_config=QUIET))
    try:
        ray_serve.start(
            proxy_location="HeadOnly",
            http_options={"host": section.host, "port": section.port},
            logging_config=QUIET,
        )
        ray_serve.run_many(targets)
    except (RuntimeError, TimeoutError, RayError) as error:  # a replica or a proxy failed to start
        raise FiftyfoldError(f"serve: Ray Serve could not start ({failure(error, [*names, GATEWAY])})") from error


def replace_model(section: ServeSection, model: DeployedModel) -> None:
    """Begin to replace the replicas of a model by new ones. :func:`replacement_state` tells how it ends."""
    target = ray_serve.RunTarget(
        build_model(model_arguments(section, model)),
        application_name(model.name),
        route_prefix=None,
        logging_config=QUIET,
    )
    ray_serve.run_many([target], wait_for_applications_running=False)


def replacement_state(model: DeployedModel) -> tuple[ApplicationStatus, str]:
    """Return the status of a model's application and the error of its replicas, if there is one.

    Raises FiftyfoldError if Ray Serve does not know the application.
    """
    name = application_name(model.name)
    application = ray_serve.status().applications.get(name)
    if application is None:
        raise FiftyfoldError(f"Ray Serve has no application '{name}'")
    status = application.status
    failed = status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)
    return status, failure(RuntimeError(f"the application is {status.value}"), [name]) if failed else ""


def drain(seconds: float, stop: threading.Event) -> bool:
    """Let the gateways refuse new requests, and return True when the running ones have ended.

    Returns False after ``seconds``, when ``stop`` is set, and if Ray Serve does not answer.
    """
    deadline = time.monotonic() + seconds
    try:
        drained = ray_serve.get_app_handle(GATEWAY).broadcast("drain")
        while not (done := _all_answer(drained)) and not stop.is_set() and time.monotonic() < deadline:
            pass
    except (RuntimeError, RayError, RayServeException):
        return False
    return done


def _all_answer(response: DeploymentBroadcastResponse) -> bool:
    """Wait briefly. Return whether all replicas have answered; those that have ended count."""
    try:
        answers = response.results(timeout_s=_DRAIN_POLL_SECONDS, return_exceptions=True)
    except TimeoutError:
        return False
    return not any(isinstance(answer, TimeoutError) for answer in answers)


def failure(error: Exception, applications: Sequence[str]) -> str:
    """Return the cause of a failed start: the error of a replica if there is one, else the last line of ``error``."""
    messages: list[str] = []
    if ray.is_initialized():
        with suppress(Exception):  # Serve itself may have failed, and `error` says more about that
            status = ray_serve.status().applications
            found = [status[name] for name in applications if name in status]
            messages = [each.message for application in found for each in application.deployments.values()]
    for message in messages:
        errors = _ERROR_LINE.findall(message)
        if errors:
            return errors[-1].strip()
    text = "\n".join(filter(None, messages)) or str(error)
    return (text.strip() or type(error).__name__).splitlines()[-1].strip()


def model_arguments(section: ServeSection, model: DeployedModel) -> dict[str, Any]:
    """Return the arguments of :func:`serve.app.build_model`."""
    own = {"model_name": model.name, "checkpoint": str(model.checkpoint.absolute()), "version": model.version}
    return {**_settings(section), **own}


def gateway_arguments(section: ServeSection, models: Sequence[DeployedModel]) -> dict[str, Any]:
    """Return the arguments of :func:`serve.app.build_gateway`."""
    return {**_settings(section), "models": [model.name for model in models]}


def _settings(section: ServeSection) -> dict[str, Any]:
    values = section.model_dump(include=set(ServerConfig.model_fields))
    if section.api_key_file is not None:  # replicas run in other folders
        values["api_key_file"] = str(Path(section.api_key_file).absolute())
    return values


def serve_config(section: ServeSection, models: Sequence[DeployedModel]) -> dict[str, Any]:
    """Return the content of a Serve config file, as ``serve deploy`` takes it. Defaults are left out."""
    defaults = ServerConfig().model_dump()

    def changed(arguments: dict[str, Any]) -> dict[str, Any]:
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in arguments.items()
            if key not in defaults or value != defaults[key]
        }

    def application(name: str, prefix: str | None, function: str, arguments: dict[str, Any]) -> dict[str, Any]:
        return {
            "name": name,
            "route_prefix": prefix,
            "import_path": f"serve.app:{function}",
            "runtime_env": {"env_vars": {"PYTHONPATH": str(PROJECT)}},
            "args": changed(arguments),
        }

    applications = [
        application(application_name(model.name), None, "build_model", model_arguments(section, model))
        for model in models
    ]
    gateway = application(GATEWAY, "/", "build_gateway", gateway_arguments(section, models))
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": section.host, "port": section.port},
        "logging_config": QUIET,
        "applications": [gateway, *applications],
    }
