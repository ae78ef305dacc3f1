"""Compiled forms of the rule's kernels: 32,768 tokens at the widths of Kimi Linear with 48B parameters."""

from __future__ import annotations

from kernels.gated_delta_rule.triton import (
    CARRY_TILES,
    CHUNK,
    PRODUCT_TILES,
    TOKEN_TILES,
    merge_levels,
)
from kernels.triton_support.plans import BF16X3, Plan, Work
from kernels.triton_support.tiles import padded_dim

TOKENS, HEADS, DIMS = 32768, 32, 128
"""Keys and values have the same size."""
_F = "*fp32:16"
_SIZES = {"S": "i32:16", "H": "i32:16", "K": "i32:16", "V": "i32:16"}
_LEVELS = merge_levels(CHUNK)
_CONSTANTS = {"HAS_POSITIONS": True, "PRECISION": "bf16x3", "L": CHUNK}
_MERGES = {**_CONSTANTS, "LEVELS": _LEVELS}
_WHOLE_KEYS = {**_CONSTANTS, "K_PAD": padded_dim(DIMS)}
_ROWS = 4.0 * TOKENS * HEADS * DIMS
"""Bytes of q, k, v, g, or the outputs."""
_SQUARES = 4.0 * TOKENS * HEADS * CHUNK
"""Bytes of the chunks' products."""
_STATES = 4.0 * TOKENS / CHUNK * HEADS * DIMS * DIMS
_PARTS = DIMS / 64
"""Programs that share the keys of a head."""
_BY_KEY = 2.0 * TOKENS * HEADS * CHUNK * DIMS
"""FLOPs of a product of a chunk's tokens with each other over the dims of a head."""
_BY_STATE = 2.0 * TOKENS * HEADS * DIMS * DIMS
_TARGET = "speed of flash-linear-attention"


def _arguments(names: str, strided: str, sizes: str = "SHKV") -> dict[str, str]:
    return {
        **dict.fromkeys((*strided, *names.split()), _F),
        "positions": "*i64:16",
        **{name: _SIZES[name] for name in sizes},
        **{f"{name}_stride": "i32:16" for name in strided},
    }


def _carry(kind: str, keep: bool, max_spills: dict[str, int]) -> Plan:
    products, nbytes = 2 * _BY_STATE + _BY_KEY, 4 * _ROWS + _SQUARES
    return Plan(
        f"gated_delta_rule.carry ({kind})",
        "carry",
        _arguments("beta start inverse weights out last states changes", "qkvg"),
        {**_WHOLE_KEYS, "KEEP": keep},
        CARRY_TILES,
        multiplies=True,
        max_spills=max_spills,
        work=Work(
            products if keep else products + _BY_STATE + _BY_KEY,
            nbytes + (_STATES if keep else _ROWS + _SQUARES),
            (_PARTS * (3 - keep) + 1) * _ROWS + _PARTS * (2 - keep) * _SQUARES,
            rate=BF16X3,
            target=_TARGET,
        ),
    )


PLANS = [
    Plan(
        "gated_delta_rule.products",
        "products",
        _arguments("beta inverse weights", "qkg", "SHK"),
        _MERGES,
        PRODUCT_TILES,
        multiplies=True,
        work=Work(
            _LEVELS * (2 * _BY_KEY + 2 * _BY_KEY * CHUNK / DIMS),
            3 * _ROWS + 2 * _SQUARES,
            rate=BF16X3,
            target=_TARGET,
        ),
    ),
    _carry("forward", False, {"sm_80": 544, "sm_90": 192, "sm_100": 128, "gfx942": 208}),
    _carry("states", True, {"sm_80": 64, "sm_90": 112, "sm_100": 32, "gfx942": 144}),
    Plan(
        "gated_delta_rule.carry_gradients",
        "carry_gradients",
        _arguments("beta grad_last inverse weights grad_out grad_states grad_errors", "qkg"),
        _WHOLE_KEYS,
        CARRY_TILES,
        multiplies=True,
        max_spills={"sm_80": 112, "sm_90": 144, "sm_100": 48, "gfx942": 384},
        work=Work(
            3 * _BY_STATE + 2 * _BY_KEY,
            5 * _ROWS + 2 * _SQUARES + _STATES,
            (_PARTS * 3 + 1) * _ROWS + 2 * _PARTS * _SQUARES,
            rate=BF16X3,
            target=_TARGET,
        ),
    ),
    Plan(
        "gated_delta_rule.token_gradients",
        "token_gradients",
        _arguments(
            "beta states changes grad_states grad_errors grad_out grad_q grad_k grad_v grad_g grad_beta", "qkvg"
        ),
        _MERGES,
        TOKEN_TILES,
        multiplies=True,
        max_spills={"sm_80": 432, "sm_90": 368, "sm_100": 432},
        work=Work(
            3 * _BY_STATE + 2 * _BY_KEY + _LEVELS * 4 * _BY_KEY,
            11 * _ROWS + 2 * _STATES,
            rate=BF16X3,
            target=_TARGET,
        ),
    ),
]
