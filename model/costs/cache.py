"""Cache bytes in closed form.

Growing bytes per token are packed entries, scales and padding included, over the tokens they cover. Windows, compressor
states, recurrent states and page rounding are fixed state, which does not grow with the sequence.
:class:`model.cache.Cache` measures the same bytes.
"""

from __future__ import annotations

from model.cache.pages import growing_parts
from model.cache.parts import GrowingPart
from model.config import ModelConfig


def cache_bytes_per_token(config: ModelConfig) -> dict[str, float]:
    """Return growing cache bytes per token by component, such as ``csa`` or ``index``, summed over layers."""
    per_token: dict[str, float] = {}
    for part in growing_parts(config).values():
        per_token[part.component] = per_token.get(part.component, 0.0) + part.layout.nbytes / part.ratio
    return per_token


def fixed_state_bytes(config: ModelConfig, rewind: int = 0, predicts_ahead: bool = False) -> dict[str, int]:
    """Return the bytes per sequence that do not grow, by component: ``window``, ``tail`` (compressors' float32 rows)
    and ``state`` (recurrent). Each keeps ``rewind`` more tokens for :meth:`model.cache.Cache.truncate`.
    ``predicts_ahead`` includes the multi-token prediction module."""
    fixed: dict[str, int] = {}
    for mixer in config.block_mixers if predicts_ahead else config.mixers:
        for part in mixer.cache_parts(config).values():
            if not isinstance(part, GrowingPart):
                fixed[part.component] = fixed.get(part.component, 0) + part.nbytes(rewind)
    return fixed


def cache_bytes(config: ModelConfig, tokens: int) -> float:
    """Return the cache bytes of one sequence of ``tokens`` tokens: fixed state included, page rounding excluded."""
    return sum(cache_bytes_per_token(config).values()) * tokens + sum(fixed_state_bytes(config).values())
