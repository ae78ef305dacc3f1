"""Pipeline steps on Ray and MLflow, run as ``python -m pipelines <step>``.

Ray and MLflow read the variables set below when they are imported, so this module sets them before any other imports
either.
"""

import os

RAY_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the driver of a submitted job; its value is JSON and holds the job's runtime environment."""

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
if not os.environ.get("RAY_ADDRESS"):
    # A local cluster listens on loopback: this makes Ray give its node the address 127.0.0.1, as on Windows and macOS.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
# ray.train.report blocks until the controller polls. Its default interval of 2 s is longer than a small step.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
# Serve kills an HTTP proxy that is not ready in 5 s by default; importing it on a busy machine takes longer.
os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")
# Serve's processes call each other over gRPC, which costs less per message than calls of Ray actors. By default a
# message, which holds a whole request body, may have 4 MiB only.
os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")
os.environ.setdefault("RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH", str(2**31 - 1))
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # disable Tune's own panels: the sweep step prints its trials

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")  # two bars for every small local copy
# By default MLflow retries an unreachable server seven times and waits two minutes for each answer.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
