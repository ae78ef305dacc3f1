"""Settings of an engine."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from kernels.hardware import multiplies_bf16_fast
from model.forward.execution import Mode


class EngineConfig(BaseModel):
    """Settings of the computation, and limits of the accepted work."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    execution: Mode = "auto"
    """``auto`` uses the fastest operators of the machine. ``batch-invariant`` returns the same bits for a request
    regardless of concurrent requests and of how its prompt is chunked (:class:`model.forward.execution.Execution`)."""
    weights: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of the weight matrices. ``auto`` is bfloat16 if the device multiplies it faster than float32."""
    max_active_requests: Annotated[int, Field(ge=1)] = 64
    """Completions that hold a cache and are decoded together; further ones wait."""
    max_waiting_requests: Annotated[int, Field(ge=0)] = 16_384
    """Completions that may wait, in order of arrival; the server answers 429 to further ones. A waiting completion
    holds its prompt's token IDs and no cache. The default fits 100 clients with batches of 128 prompts."""
    prefill_chunk: Annotated[int, Field(ge=1)] = 512
    """Most prompt tokens read in one step."""
    prefill_share: Annotated[float, Field(gt=0)] = 0.6
    """Time spent on reading prompts per second of decoding, while completions are being decoded. Decoding itself is
    slower beside a long prompt, so the default about doubles the time between tokens."""
    cache_mebibytes: Annotated[int, Field(ge=1)] = 1024
    """Memory of the caches of active completions and kept prefixes. New completions wait while it is full. If a
    running one needs a page and none is free, the newest is preempted and recomputed later."""
    kept_prefixes: Annotated[int, Field(ge=0)] = 256
    """Prefixes of earlier prompts that are kept for prompts with the same beginning; 0 keeps none. Each costs a copy of
    the windows and other fixed state of a sequence (:mod:`serve.engine.prefix_cache`)."""
    speculative_tokens: Annotated[int, Field(ge=0, le=16)] = 0
    """Tokens that the model's multi-token prediction module drafts for every completion and step; 0 drafts none. The
    tokens of a completion do not change (:mod:`serve.engine.speculation`)."""
    cuda_graphs: bool = True
    """On a GPU, replay decoding steps as CUDA graphs (:mod:`model.decode_graphs`), for weights in 16 bits and layers
    with attention over compressed entries or latents. No effect with ``speculative_tokens``. Not yet run on a GPU. On
    a CPU, steps are recorded wherever possible, whatever this is."""
    request_timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Time from submission to the last token, including the time spent waiting; the server answers 504 to later ones.
    A client with less patience disconnects, which removes its completions."""

    def resolve_weights(self, device: torch.device | str) -> EngineConfig:
        """Return a copy in which ``weights`` names the data type to use on ``device``."""
        if self.weights != "auto":
            return self
        return self.model_copy(update={"weights": "bfloat16" if multiplies_bf16_fast(device) else "float32"})
