"""Compiled forms of the scan's kernels: 32,768 tokens at the widths of Mamba-2 with 2.7B parameters."""

from __future__ import annotations

from kernels.ssd_scan.triton import CARRY_TILES, CHUNK_TILES, CHUNKS, GROUP_TILES
from kernels.triton_support.plans import BF16X3, Plan, Work
from kernels.triton_support.tiles import padded_dim

TOKENS, HEADS, HEAD_DIM, STATE_SIZE = 32768, 80, 64, 128
CHUNK, PART = CHUNKS["sm_90"], GROUP_TILES["sm_90"][0].sizes["BLOCK_N"]
"""Tokens per chunk, and channels of the state in a program of ``group_gradients``."""
_F = "*fp32:16"
_SIZES = {
    "S": "i32:16", "H": "i32:16", "share": "i32:16", "P": "i32:16", "N": "i32:16", "x_stride": "i32:16",
    "B_stride": "i32:16", "C_stride": "i32:16",
}  # fmt: skip
_DOCUMENTS = {"positions": "*i64:16"}
_CONSTANTS = {"HAS_POSITIONS": True, "PRECISION": "bf16x3"}
_HEADS = {**_CONSTANTS, "P_PAD": padded_dim(HEAD_DIM)}
_X = 4.0 * TOKENS * HEADS * HEAD_DIM
"""Bytes of x."""
_B = 4.0 * TOKENS * STATE_SIZE
"""Bytes of B, which every head reads through the cache."""
_STATES = 4.0 * TOKENS / CHUNK * HEADS * HEAD_DIM * STATE_SIZE
_PRODUCTS = 2.0 * TOKENS * HEADS
"""FLOPs of a product over all tokens and heads, per multiplication of one token and head."""
_BY_STATE = _PRODUCTS * HEAD_DIM * STATE_SIZE
_TARGET = "speed of flash-linear-attention"


def _pointers(names: str, **more: str) -> dict[str, str]:
    return {**dict.fromkeys(names.split(), _F), **_DOCUMENTS, **more}


def _carry(kind: str, reverse: bool) -> Plan:
    sizes = {name: size for name, size in _SIZES.items() if "stride" not in name}
    return Plan(
        f"ssd_scan.carry ({kind})",
        "carry",
        _pointers("rows columns dt A start states", **sizes, row_stride="i32:16", column_stride="i32:16"),
        {**_CONSTANTS, "REVERSE": reverse},
        CARRY_TILES,
        multiplies=True,
        work=Work(_BY_STATE, _X + _B + _STATES, 2 * _X + HEADS * _B, rate=BF16X3, target=_TARGET),
    )


PLANS = [
    _carry("forward", False),
    _carry("backward", True),
    Plan(
        "ssd_scan.outputs",
        "outputs",
        _pointers("x dt A B C D states y", **_SIZES),
        _HEADS,
        CHUNK_TILES,
        multiplies=True,
        work=Work(
            _BY_STATE + _PRODUCTS * CHUNK * (STATE_SIZE + HEAD_DIM),
            2 * _X + 2 * _B + _STATES,
            _X + 2 * HEADS * _B + _STATES,
            rate=BF16X3,
            target=_TARGET,
        ),
    ),
    Plan(
        "ssd_scan.token_gradients",
        "token_gradients",
        _pointers("x dt A B C D states grad_states y grad_y grad_x grad_dt grad_logs grad_D", **_SIZES),
        _HEADS,
        CHUNK_TILES,
        multiplies=True,
        max_spills={"sm_80": 8},  # with Triton 3.6
        work=Work(
            _BY_STATE + _PRODUCTS * CHUNK * (STATE_SIZE + HEAD_DIM),
            4 * _X + 2 * _B + 2 * _STATES,
            3 * _X + 2 * HEADS * _B + 2 * _STATES,
            rate=BF16X3,
            target=_TARGET,
        ),
    ),
    Plan(
        "ssd_scan.group_gradients",
        "group_gradients",
        _pointers("x dt A B C states grad_states grad_y grad_B grad_C", **_SIZES),
        _CONSTANTS,
        GROUP_TILES,
        multiplies=True,
        max_spills={"sm_80": 32, "gfx942": 64},
        work=Work(
            2 * _BY_STATE + _PRODUCTS * CHUNK * HEAD_DIM * STATE_SIZE / PART,
            2 * _X + 4 * _B + 2 * _STATES,
            (2 * _X + 2 * _STATES) * STATE_SIZE / PART,
            rate=BF16X3,
            target=_TARGET,
        ),
    ),
]
