"""Continuous decoding of many requests in one process. Neither HTTP nor Ray here."""

from serve.engine.engine import Engine, Stream
from serve.engine.errors import (
    EngineError,
    QueueFullError,
    RequestAbortedError,
    RequestError,
    RequestTimeoutError,
)
from serve.engine.sampler import TokenLogprob
from serve.engine.scheduler import Limits
from serve.engine.sequence import Delta, SamplingParams

__all__ = [
    "Delta",
    "Engine",
    "EngineError",
    "Limits",
    "QueueFullError",
    "RequestAbortedError",
    "RequestError",
    "RequestTimeoutError",
    "SamplingParams",
    "Stream",
    "TokenLogprob",
]
