"""Compiled forms of the kernels of hyper-connections: 16,384 tokens of DeepSeek-V4-Flash."""

from __future__ import annotations

from kernels.hyper_connections.triton import (
    EXPAND_TILES,
    MIX_TILES,
    PROJECT_TILES,
    STREAMS_TILES,
    TOKEN_TILES,
    padded_logits,
)
from kernels.triton_support.plans import TF32X3, Plan, Work
from kernels.triton_support.tiles import Tiles

TOKENS, STREAMS, WIDTH = 16384, 4, 4096
_LOGITS = 2 * STREAMS + STREAMS * STREAMS
_ROW = 4.0 * TOKENS * WIDTH
"""Bytes of one float32 stream."""
_F = "*fp32:16"


def _projection(tiles: Tiles) -> float:
    """Return the bytes of the projection that the programs of the default setting read through the cache: all of it
    for every block of tokens."""
    return 4.0 * TOKENS / tiles["sm_90"][0].sizes["BLOCK_T"] * _LOGITS * STREAMS * WIDTH


_TARGET = "75% of bandwidth"


def _pointers(names: str, **more: str) -> dict[str, str]:
    return {**dict.fromkeys(names.split(), _F), **more}


_SIZES = {"T": "i32:16", "D": "i32:16"}
_WIDTHS = {"M": _LOGITS, "N": STREAMS}

PLANS = [
    Plan(
        "hyper_connections.project",
        "project",
        _pointers("streams fn raw inverse_rms", T="i32:16", K="i32:16", norm_eps="fp32"),
        {"M": _LOGITS, "M_PAD": padded_logits(STREAMS), "PRECISION": "tf32x3"},
        PROJECT_TILES,
        multiplies=True,
        max_spills={"sm_100": 8},
        work=Work(
            2.0 * TOKENS * STREAMS * WIDTH * padded_logits(STREAMS),
            STREAMS * _ROW,
            cache_bytes=STREAMS * _ROW + _projection(PROJECT_TILES),
            rate=TF32X3,
            target=_TARGET,
        ),
    ),
    Plan(
        "hyper_connections.mix",
        "mix",
        _pointers(
            "streams raw scale base norm_weight x post comb",
            **_SIZES, eps="fp32", norm_eps="fp32", iterations="i32",
        ),
        {**_WIDTHS, "BLOCK_D": WIDTH},
        MIX_TILES,
        work=Work(0.0, (STREAMS + 1) * _ROW, target=_TARGET),
    ),
    Plan(
        "hyper_connections.expand",
        "expand",
        _pointers("streams comb post out", output="*bf16:16", **_SIZES),
        {"N": STREAMS},
        EXPAND_TILES,
        work=Work(0.0, (2 * STREAMS + 0.5) * _ROW, target=_TARGET),
    ),
    Plan(
        "hyper_connections.expand_backward",
        "expand_backward",
        _pointers(
            "grad streams comb post grad_streams grad_comb grad_post grad_output", output="*bf16:16", D="i32:16"
        ),
        {"N": STREAMS},
        TOKEN_TILES,
        work=Work(0.0, (3 * STREAMS + 1.5) * _ROW, target=_TARGET),
    ),
    Plan(
        "hyper_connections.mix_backward",
        "mix_backward",
        _pointers(
            "streams raw scale base norm_weight grad_x grad_post grad_comb divisors grad_logits norm_factors",
            D="i32:16", eps="fp32", norm_eps="fp32", iterations="i32",
        ),
        _WIDTHS,
        TOKEN_TILES,
        work=Work(0.0, (STREAMS + 1) * _ROW, target=_TARGET),
    ),
    Plan(
        "hyper_connections.streams_backward",
        "streams_backward",
        _pointers(
            "later grad_x grad_products through_norm norm_factors raw scale base norm_weight fn streams grad_streams "
            "grad_weight_parts",
            **_SIZES, eps="fp32",
        ),
        {**_WIDTHS, "M_PAD": padded_logits(STREAMS), "HAS_LATER": True, "PRECISION": "tf32x3"},
        STREAMS_TILES,
        multiplies=True,
        # One row per program is the gradient of the norm's weight. The streams are read twice.
        work=Work(
            0.0,
            (3 * STREAMS + 1 + 1 / STREAMS_TILES["sm_90"][0].sizes["BLOCK_T"]) * _ROW,
            cache_bytes=(3 * STREAMS + 1) * _ROW + _projection(STREAMS_TILES),
            target=_TARGET,
        ),
    ),
]  # fmt: skip
