"""Counters of an engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EngineStats:
    """Totals since the engine started. The engine's worker thread updates them."""

    decode_steps: int = 0
    decoded_tokens: int = 0
    decode_seconds: float = 0.0
    """Time of decoding steps: forward pass, sampling and detokenization."""
    model_seconds: float = 0.0
    """Time of the forward passes of decoding steps."""
    prefill_tokens: int = 0
    """Prompt tokens read, without those found in kept prefixes."""
    prefill_seconds: float = 0.0
    drafted_tokens: int = 0
    """Tokens drafted by speculative decoding and checked by the network."""
    accepted_tokens: int = 0
    """Drafted tokens that were sampled."""
    preemptions: int = 0
    """Times that a running completion lost its cache because the memory was full."""
