"""Continuous decoding of many requests in one process, without HTTP or Ray."""

from serve.engine.config import EngineConfig
from serve.engine.engine import Engine
from serve.engine.errors import (
    EngineError,
    QueueFullError,
    RequestAbortedError,
    RequestError,
    RequestFields,
    RequestTimeoutError,
)
from serve.engine.logprobs import TokenLogprob
from serve.engine.sampling_params import SamplingParams
from serve.engine.sequence import Delta
from serve.engine.stream import Pace, Stream

__all__ = [
    "Delta",
    "Engine",
    "EngineConfig",
    "EngineError",
    "Pace",
    "QueueFullError",
    "RequestAbortedError",
    "RequestError",
    "RequestFields",
    "RequestTimeoutError",
    "SamplingParams",
    "Stream",
    "TokenLogprob",
]
