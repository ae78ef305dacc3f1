"""Triton kernels that pack, unpack and round cache entries, with the bits of :mod:`kernels.cache_io.reference`.

All conversions between formats are integer operations on the bits of float32, because neither Triton's interpreter nor
all GPUs convert FP8 and BF16 with round-to-nearest-even. Formats have the codes of ``EntryLayout.spec``.
"""

import triton
import triton.language as tl

FP32: tl.constexpr = tl.constexpr(0)
BF16: tl.constexpr = tl.constexpr(1)
FP8: tl.constexpr = tl.constexpr(2)
FP4: tl.constexpr = tl.constexpr(3)
FP8_WIDE: tl.constexpr = tl.constexpr(4)


# --- bits of single values


@triton.jit
def bf16_bits(x):
    """Return the bits of float32 x rounded to BF16, in the low half of int32. NaN becomes 0x7FC0."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded & 0xFFFF)


@triton.jit
def round_to_bf16(x):
    """Return float32 x rounded to the nearest BF16 value."""
    return (bf16_bits(x) << 16).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_code(x):
    """Return the E4M3 code of float32 x: int32 from 0 to 255. Saturates at 448; NaN becomes 0x7F with its sign."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    capped = tl.minimum(magnitude, 0x43E00000)  # 448
    # Three bits of the mantissa remain; the exponent's bias falls from 127 to 7.
    normal = ((capped + 0x7FFFF + ((capped >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2 ** -6 steps are 2 ** -9, the last bit of a float32 just above 2 ** 14.
    tiny = (capped.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(capped < 0x3C800000, tiny, normal)
    return tl.where(magnitude > 0x7F800000, 0x7F, code) | ((bits >> 24) & 0x80)


@triton.jit
def e4m3_value(code):
    """Return the float32 value of an E4M3 code in int32, for codes without NaN."""
    return (((code & 0x7F) << 20) | ((code & 0x80) << 24)).to(
        tl.float32, bitcast=True
    ) * 1.329227995784916e36  # 2 ** 120


@triton.jit
def e2m1_code(x):
    """Return the E2M1 code of float32 x: int32 from 0 to 15. Ties go to the even code; saturates at 6."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(bits & 0x7FFFFFFF, 0x40C00000)  # 6
    # One bit of the mantissa remains; the exponent's bias falls from 127 to 1.
    normal = ((magnitude + 0x1FFFFF + ((magnitude >> 22) & 1)) >> 22) - (126 << 1)
    # Below 1 steps are 0.5, the last bit of a float32 just above 2 ** 22.
    tiny = (magnitude.to(tl.float32, bitcast=True) + 4194304.0).to(tl.int32, bitcast=True) - 0x4A800000
    return tl.where(magnitude < 0x3F800000, tiny, normal) | ((bits >> 28) & 8)


@triton.jit
def e2m1_value(code):
    """Return the float32 value of an E2M1 code in int32."""
    return (((code & 7) << 22) | ((code & 8) << 28)).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2 ** 126


@triton.jit
def e8m0_code(amax_bits, FORMAT: tl.constexpr):
    """Return the biased exponent of the scale of a block from the bits of its largest magnitude.

    The smallest power of two s with ``amax / s <= grid_max``, without a division: 448 is 1.75 * 2 ** 8, 6 is
    1.5 * 2 ** 2, so that a mantissa up to that of ``grid_max`` fits the exponent's difference.
    """
    if FORMAT == FP4:
        bits = tl.maximum(amax_bits, 0x01C00000)  # 6 * 2 ** -126
        code = (bits >> 23) - 2 + ((bits & 0x7FFFFF) > 0x400000).to(tl.int32)
    else:
        tl.static_assert((FORMAT == FP8) | (FORMAT == FP8_WIDE))
        bits = tl.maximum(amax_bits, 0x38D1B717)  # 1e-4
        code = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    return tl.where(bits >= 0x7F800000, 254, code)


@triton.jit
def e8m0_value(code):
    """Return ``2 ** (code - 127)`` in float32."""
    return tl.maximum(code << 23, 1 << 22).to(tl.float32, bitcast=True)


@triton.jit
def to_grid(x, exponent):
    """Return x divided by the scale with this biased exponent. A power of two divides exactly."""
    # The reciprocal of 2 ** 127 is subnormal: e8m0_value has it for a code of 0.
    return x * e8m0_value(254 - exponent)


# --- rows


@triton.jit
def unpack_body(
    base, there, START: tl.constexpr, WIDTH: tl.constexpr, BODY: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK: tl.constexpr, SCALES: tl.constexpr, SCALE_OFFSET: tl.constexpr,
):  # fmt: skip
    """Unpack dims ``START`` to ``START + WIDTH`` of the body of rows at pointers ``base`` [N]: float32 [N, WIDTH], with
    zeros after ``BODY`` dims. ``START`` is a multiple of ``WIDTH``, a power of two."""
    N: tl.constexpr = base.shape[0]
    d = START + tl.arange(0, WIDTH)
    half = START // 2 + tl.arange(0, WIDTH // 2)
    inside = there[:, None]
    half_inside = there[:, None]
    if START + WIDTH > BODY:
        inside = there[:, None] & (d < BODY)[None, :]
        half_inside = there[:, None] & (half < BODY // 2)[None, :]
    if FORMAT == FP4:
        bytes4 = tl.load(base[:, None] + half[None, :], mask=half_inside, other=0)
        codes = bytes4.to(tl.int32)
        values = tl.reshape(tl.join(e2m1_value(codes & 15), e2m1_value(codes >> 4)), [N, WIDTH])
    elif FORMAT == FP32:
        words = tl.load(base.to(tl.pointer_type(tl.int32))[:, None] + d[None, :], mask=inside, other=0)
        values = words.to(tl.float32, bitcast=True)
    elif FORMAT == BF16:
        words = tl.load(base.to(tl.pointer_type(tl.uint16))[:, None] + d[None, :], mask=inside, other=0)
        values = (words.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        tl.static_assert((FORMAT == FP8) | (FORMAT == FP8_WIDE))
        values = e4m3_value(tl.load(base[:, None] + d[None, :], mask=inside, other=0).to(tl.int32))
    if SCALES == 1:
        values = values * _scale(base + SCALE_OFFSET, there, FORMAT)[:, None]
    elif SCALES > 1:
        # Several scales imply the format's own block size, a power of two.
        width: tl.constexpr = 4 if FORMAT == FP8_WIDE else 1
        first: tl.constexpr = START // BLOCK
        if WIDTH <= BLOCK:
            values = values * _scale(base + SCALE_OFFSET + width * first, there, FORMAT)[:, None]
        else:
            block = first + tl.arange(0, WIDTH // BLOCK)
            known = there[:, None] & (block < SCALES)[None, :]
            scales = _scale((base + SCALE_OFFSET)[:, None] + width * block[None, :], known, FORMAT)
            grouped = tl.reshape(values, [N, WIDTH // BLOCK, BLOCK]) * scales[:, :, None]
            values = tl.reshape(grouped, [N, WIDTH])
    return values


@triton.jit
def _scale(at, there, FORMAT: tl.constexpr):
    if FORMAT == FP8_WIDE:
        return tl.load(at.to(tl.pointer_type(tl.int32)), mask=there, other=0).to(tl.float32, bitcast=True)
    return e8m0_value(tl.load(at, mask=there, other=0).to(tl.int32))


@triton.jit
def unpack_rope(base, there, ROPE: tl.constexpr, ROPE_PAD: tl.constexpr, FORMAT: tl.constexpr, OFFSET: tl.constexpr):
    """Unpack the rope dims of rows at pointers ``base`` [N]: float32 [N, ROPE_PAD]."""
    d = tl.arange(0, ROPE_PAD)
    inside = there[:, None] & (d < ROPE)[None, :]
    if FORMAT == FP32:
        words = tl.load((base + OFFSET).to(tl.pointer_type(tl.int32))[:, None] + d[None, :], mask=inside, other=0)
        return words.to(tl.float32, bitcast=True)
    words = tl.load((base + OFFSET).to(tl.pointer_type(tl.uint16))[:, None] + d[None, :], mask=inside, other=0)
    return (words.to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _scaled(blocks, FORMAT: tl.constexpr):
    """Return blocks of values [N, BLOCK] divided by their scales, and the scales' biased exponents [N]."""
    exponent = e8m0_code(tl.max(blocks.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1), FORMAT)
    return to_grid(blocks, exponent[:, None]), exponent


@triton.jit
def _rounded(blocks, FORMAT: tl.constexpr):
    """Return blocks of values [N, BLOCK] rounded to a format with block scales. NaN stays."""
    grid, exponent = _scaled(blocks, FORMAT)
    if FORMAT == FP4:
        rounded = e2m1_value(e2m1_code(grid))
    else:
        rounded = e4m3_value(e4m3_code(grid))
    return tl.where(grid == grid, rounded * e8m0_value(exponent)[:, None], grid)


@triton.jit
def _store_scales(base, group, exponent, there, FORMAT: tl.constexpr):
    """Store the scales of groups of dims. ``base`` points to a row's first scale."""
    if FORMAT == FP8_WIDE:
        at = base.to(tl.pointer_type(tl.int32)) + group
        tl.store(at, e8m0_value(exponent).to(tl.int32, bitcast=True), mask=there)
    else:
        tl.store(base + group, exponent.to(tl.uint8), mask=there)


@triton.jit
def _store_padding(
    base, there, FORMAT: tl.constexpr, BODY_BYTES: tl.constexpr, ROPE: tl.constexpr, ROPE_FORMAT: tl.constexpr,
    SCALES: tl.constexpr, SCALE_OFFSET: tl.constexpr, NBYTES: tl.constexpr,
):  # fmt: skip
    """Store zeros before and after the scales of rows at pointers ``base``."""
    rope_bytes: tl.constexpr = ROPE * (4 if ROPE_FORMAT == FP32 else 2)
    scale_bytes: tl.constexpr = SCALES * (4 if FORMAT == FP8_WIDE else 1)
    for i in tl.static_range(BODY_BYTES + rope_bytes, SCALE_OFFSET):
        tl.store(base + i, 0, mask=there)
    for i in tl.static_range(SCALE_OFFSET + scale_bytes, NBYTES):
        tl.store(base + i, 0, mask=there)


@triton.jit
def _store_floats(x, at, inside, FORMAT: tl.constexpr):
    if FORMAT == FP32:
        tl.store(at.to(tl.pointer_type(tl.int32)), x.to(tl.int32, bitcast=True), mask=inside)
    else:
        tl.store(at.to(tl.pointer_type(tl.int16)), bf16_bits(x).to(tl.int16), mask=inside)


# --- one row in registers


@triton.jit
def both(block, scalar):
    """Return the mask ``block & scalar``.

    The comparison with zero is needed because Triton's interpreter returns integers for scalar comparisons.
    """
    return (block & scalar) != 0


@triton.jit
def _body_blocks(x, d, BODY: tl.constexpr, BLOCK: tl.constexpr):
    """Return the body of a row x [N], zeros after it, in blocks: [N / BLOCK, BLOCK]."""
    N: tl.constexpr = x.shape[0]
    return tl.reshape(tl.where(d < BODY, x, 0.0), [N // BLOCK, BLOCK])


@triton.jit
def round_row(x, d, BODY: tl.constexpr, FORMAT: tl.constexpr, ROPE_FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    """Round a row x, float32 [N], to its storage formats. d is ``arange(0, N)``; dims from ``BODY`` on are rope dims.

    ``BLOCK`` is the number of dims per scale, rounded up to a power of two.
    """
    N: tl.constexpr = x.shape[0]
    body = x
    if FORMAT == BF16:
        body = round_to_bf16(x)
    elif FORMAT != FP32:
        body = tl.reshape(_rounded(_body_blocks(x, d, BODY, BLOCK), FORMAT), [N])
    rope = x
    if ROPE_FORMAT == BF16:
        rope = round_to_bf16(x)
    return tl.where(d < BODY, body, rope)


@triton.jit
def pack_row(
    x, d, base, there,
    BODY: tl.constexpr, FORMAT: tl.constexpr, BODY_BYTES: tl.constexpr, ROPE: tl.constexpr,
    ROPE_FORMAT: tl.constexpr, BLOCK: tl.constexpr, SCALES: tl.constexpr, SCALE_OFFSET: tl.constexpr,
    NBYTES: tl.constexpr,
):  # fmt: skip
    """Pack a row x, float32 [N], at pointer ``base``. Writes nothing unless ``there``. See :func:`round_row` for d and
    ``BLOCK``."""
    N: tl.constexpr = x.shape[0]
    body = both(d < BODY, there)
    if FORMAT == FP32 or FORMAT == BF16:  # noqa: SIM109 (kernels have no membership tests)
        width: tl.constexpr = 4 if FORMAT == FP32 else 2
        _store_floats(x, base + width * d, body, FORMAT)
    else:
        grid, exponent = _scaled(_body_blocks(x, d, BODY, BLOCK), FORMAT)
        if FORMAT == FP4:
            low, high = tl.split(tl.reshape(e2m1_code(grid), [N // 2, 2]))
            half = tl.arange(0, N // 2)
            tl.store(base + half, (low | (high << 4)).to(tl.uint8), mask=both(half < BODY // 2, there))
        else:
            tl.store(base + d, tl.reshape(e4m3_code(grid), [N]).to(tl.uint8), mask=body)
        group = tl.arange(0, N // BLOCK)
        _store_scales(base + SCALE_OFFSET, group, exponent, both(group < SCALES, there), FORMAT)
    if ROPE > 0:
        rope_width: tl.constexpr = 4 if ROPE_FORMAT == FP32 else 2
        at_rope = base + BODY_BYTES + rope_width * (d - BODY)
        _store_floats(x, at_rope, both((d >= BODY) & (d < BODY + ROPE), there), ROPE_FORMAT)
    _store_padding(base, there, FORMAT, BODY_BYTES, ROPE, ROPE_FORMAT, SCALES, SCALE_OFFSET, NBYTES)


# --- kernels


@triton.jit
def pack(
    x, packed, R, GROUPS,
    SIZE: tl.constexpr, NBYTES: tl.constexpr, BODY: tl.constexpr, FORMAT: tl.constexpr, BODY_BYTES: tl.constexpr,
    ROPE: tl.constexpr, ROPE_FORMAT: tl.constexpr, ROPE_PAD: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr,
    SCALES: tl.constexpr, SCALE_OFFSET: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Pack rows. Program ids: rows, then group of dims: one of the body's ``GROUPS``, or after them the rest of a row.

    A group is a block that shares a scale, or without scales ``PAD`` dims.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    there = row < R
    group = tl.program_id(1)
    out = packed + row * NBYTES
    if group < GROUPS:
        d = tl.arange(0, PAD)
        if FORMAT == FP32 or FORMAT == BF16:  # noqa: SIM109 (kernels have no membership tests)
            at = group * PAD + d
            inside = there[:, None] & (at < BODY)[None, :]
            values = tl.load(x + row[:, None] * SIZE + at[None, :], mask=inside, other=0.0).to(tl.float32)
            width: tl.constexpr = 4 if FORMAT == FP32 else 2
            _store_floats(values, out[:, None] + width * at[None, :], inside, FORMAT)
        else:
            at = group * BLOCK + d
            inside = there[:, None] & ((d < BLOCK) & (at < BODY))[None, :]
            values = tl.load(x + row[:, None] * SIZE + at[None, :], mask=inside, other=0.0).to(tl.float32)
            grid, exponent = _scaled(values, FORMAT)
            if FORMAT == FP4:
                low, high = tl.split(tl.reshape(e2m1_code(grid), [ROWS, PAD // 2, 2]))
                half = tl.arange(0, PAD // 2)
                place = group * (BLOCK // 2) + half
                kept = there[:, None] & ((half < BLOCK // 2) & (place < BODY // 2))[None, :]
                tl.store(out[:, None] + place[None, :], (low | (high << 4)).to(tl.uint8), mask=kept)
            else:
                tl.store(out[:, None] + at[None, :], e4m3_code(grid).to(tl.uint8), mask=inside)
            _store_scales(out + SCALE_OFFSET, group, exponent, there, FORMAT)
    else:
        if ROPE > 0:
            rope_width: tl.constexpr = 4 if ROPE_FORMAT == FP32 else 2
            d = tl.arange(0, ROPE_PAD)
            inside = there[:, None] & (d < ROPE)[None, :]
            values = tl.load(x + row[:, None] * SIZE + BODY + d[None, :], mask=inside, other=0.0).to(tl.float32)
            _store_floats(values, (out + BODY_BYTES)[:, None] + rope_width * d[None, :], inside, ROPE_FORMAT)
        _store_padding(out, there, FORMAT, BODY_BYTES, ROPE, ROPE_FORMAT, SCALES, SCALE_OFFSET, NBYTES)


@triton.jit
def unpack(
    packed, out, R,
    SIZE: tl.constexpr, NBYTES: tl.constexpr, BODY: tl.constexpr, FORMAT: tl.constexpr, BODY_BYTES: tl.constexpr,
    BODY_PAD: tl.constexpr, ROPE: tl.constexpr, ROPE_FORMAT: tl.constexpr, ROPE_PAD: tl.constexpr,
    BLOCK: tl.constexpr, SCALES: tl.constexpr, SCALE_OFFSET: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Unpack rows to float32."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    there = row < R
    base = packed + row * NBYTES
    d = tl.arange(0, BODY_PAD)
    values = unpack_body(base, there, 0, BODY_PAD, BODY, FORMAT, BLOCK, SCALES, SCALE_OFFSET)
    tl.store(out + row[:, None] * SIZE + d[None, :], values, mask=there[:, None] & (d < BODY)[None, :])
    if ROPE > 0:
        r = tl.arange(0, ROPE_PAD)
        values = unpack_rope(base, there, ROPE, ROPE_PAD, ROPE_FORMAT, BODY_BYTES)
        tl.store(out + row[:, None] * SIZE + BODY + r[None, :], values, mask=there[:, None] & (r < ROPE)[None, :])


@triton.jit
def round_values(
    x, out, R,
    SIZE: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Round rows [R, SIZE] to a format with block scales. Program ids: rows, block."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    d = tl.arange(0, PAD)
    at = tl.program_id(1) * BLOCK + d
    inside = (row < R)[:, None] & ((d < BLOCK) & (at < SIZE))[None, :]
    values = tl.load(x + row[:, None] * SIZE + at[None, :], mask=inside, other=0.0).to(tl.float32)
    rounded = _rounded(values, FORMAT)
    if out.dtype.element_ty == tl.bfloat16:
        # Exact: BF16 holds all values of formats with scales.
        bits = (rounded.to(tl.int32, bitcast=True) >> 16).to(tl.int16)
        tl.store(out.to(tl.pointer_type(tl.int16)) + row[:, None] * SIZE + at[None, :], bits, mask=inside)
    else:
        tl.store(out + row[:, None] * SIZE + at[None, :], rounded.to(out.dtype.element_ty), mask=inside)
