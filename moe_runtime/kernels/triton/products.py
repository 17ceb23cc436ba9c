# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""The inner loop of every matrix product: rows of weights, widened as they are read, times activations.

The weights are the left operand and the activations the right one, transposed. So the large side of a tile is
always along the weights, and Hopper's matrix instruction (64 rows of the left operand) is the same for one
token as for a thousand; integers widened in registers are what it takes as left operand without a detour.
The bits of a result depend on K and the format of the weights, on nothing else: one step of the loop takes
BLOCK_K of K whatever the tile is, and sums that the compiler might contract are written as ``tl.fma``.

Activations are rounded to the weights' type, to bfloat16 for integers and float8; beside float16 weights
those beyond 65504 become infinite. Integers and float8 become bfloat16 exactly, by arithmetic on whole 32-bit
words (order of the elements within them: weight_bits.py). Scales are applied to sums of products, never to
weights, which would round them.
KIND is "plain", "int8", "int4" or "float8"; GROUP how many of K share a scale of ``scales`` (0: none).
"""

from __future__ import annotations

import triton
import triton.language as tl

# --- words -> bfloat16 --------------------------------------------------------------------------------------


@triton.jit
def _halves(pairs, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS / 2] words -> the bfloat16 in their low and high halves, [ROWS, COLUMNS]."""
    both = tl.join(pairs.to(tl.uint16), (pairs >> 16).to(tl.uint16))
    return tl.reshape(both, (ROWS, COLUMNS)).to(tl.bfloat16, bitcast=True)


@triton.jit
def _widen_int4(words, zeros, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """0x4300 | code is the bfloat16 128 + code; zeros [ROWS] the same of the zero points."""
    first = (words & 0x000F000F) | 0x43004300
    second = ((words >> 4) & 0x000F000F) | 0x43004300
    third = ((words >> 8) & 0x000F000F) | 0x43004300
    fourth = ((words >> 12) & 0x000F000F) | 0x43004300
    pairs = tl.join(tl.join(first, third), tl.join(second, fourth))
    return _halves(tl.reshape(pairs, (ROWS, COLUMNS // 2)), ROWS, COLUMNS) - zeros


@triton.jit
def _widen_int8(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A bfloat16 has room for 7 bits: 128 + the low ones, minus 128, or 256 where the sign bit is set."""
    pairs = tl.reshape(tl.join(words, words >> 8), (ROWS, COLUMNS // 2))
    low = _halves((pairs & 0x007F007F) | 0x43004300, ROWS, COLUMNS)
    return low - _halves((pairs & 0x00800080) | 0x43004300, ROWS, COLUMNS)


@triton.jit
def _widen_float8(words, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sign, exponent and fraction at their places in a bfloat16, whose exponents are 120 larger."""
    even = ((words & 0x00800080) << 8) | ((words & 0x007F007F) << 4)
    odd = (words & -0x7FFF8000) | ((words >> 4) & 0x07F007F0)
    pairs = tl.reshape(tl.join(even, odd), (ROWS, COLUMNS // 2))
    power = tl.full([1, 1], 0x7B80, tl.uint16).to(tl.bfloat16, bitcast=True)  # 2 ** 120
    return _halves(pairs, ROWS, COLUMNS) * power


# --- the loop -----------------------------------------------------------------------------------------------


@triton.jit
def _load_x(x, x_rows, k, columns, in_features, EVEN_K: tl.constexpr):
    """[columns, tokens]: the transposed tile."""
    at = x + x_rows[None, :] + (k + columns)[:, None]
    if EVEN_K:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(k + columns < in_features)[:, None], other=0.0)
    return tile


@triton.jit
def _plain_product(
    x, x_rows, in_features, weights, begin, end,
    EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_K)
    total = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    for k in range(begin, end, BLOCK_K):
        tile = tl.load(weights[:, None] + (k + columns)[None, :])
        inputs = _load_x(x, x_rows, k, columns, in_features, EVEN_K).to(tile.dtype)
        total = tl.dot(tile, inputs, total, input_precision="ieee")
    return total


@triton.jit
def _byte_product(
    x, x_rows, in_features, weights, scales, begin, end,
    KIND: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """int8, float8; ``scales`` are pointers to each row's, one per BLOCK_K, or None."""
    columns, words = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_K // 4)
    total = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    for k in range(begin, end, BLOCK_K):
        packed = tl.load(weights[:, None] + (k // 4 + words)[None, :])
        inputs = _load_x(x, x_rows, k, columns, in_features, EVEN_K).to(tl.bfloat16)
        if KIND == "int8":
            tile = _widen_int8(packed, ROWS, BLOCK_K)
        else:
            tile = _widen_float8(packed, ROWS, BLOCK_K)
        if scales is None:
            total = tl.dot(tile, inputs, total)
        else:
            scale = tl.load(scales + k // BLOCK_K)
            part = tl.dot(tile, inputs)
            total = tl.fma(part, tl.broadcast_to(scale[:, None], [ROWS, TOKENS]), total)
    return total


@triton.jit
def _int4_product(
    x, x_rows, in_features, weights, scales, zeros, stride, begin, end,
    GROUP: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    """``scales`` and ``zeros`` are pointers to each row's first; the next group's is ``stride`` further."""
    columns, words = tl.arange(0, GROUP), tl.arange(0, GROUP // 8)
    total = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
    for step in range(begin, end, BLOCK_K):
        for group in tl.static_range(BLOCK_K // GROUP):
            k = step + group * GROUP
            packed = tl.load(weights[:, None] + (k // 8 + words)[None, :])
            # Beside zero points they come last: on sm_80 registers are short while weights are widened.
            if zeros is None:
                inputs = _load_x(x, x_rows, k, columns, in_features, EVEN_K).to(tl.bfloat16)
            scale = tl.load(scales + k // GROUP * stride)
            if zeros is None:
                zero = tl.full([ROWS, 1], 0x4308, tl.uint16)
            else:
                zero = (tl.load(zeros + k // GROUP * stride).to(tl.uint16) | 0x4300)[:, None]
            tile = _widen_int4(packed, zero.to(tl.bfloat16, bitcast=True), ROWS, GROUP)
            if zeros is not None:
                inputs = _load_x(x, x_rows, k, columns, in_features, EVEN_K).to(tl.bfloat16)
            part = tl.dot(tile, inputs)
            wide = tl.broadcast_to(scale.to(tl.float32)[:, None], [ROWS, TOKENS])
            total = tl.fma(part, wide, total)
    return total


@triton.jit
def product(
    x, x_rows, in_features, data, scales, zeros, matrix, n, out_features, stride, begin, end,
    KIND: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, TOKENS]: rows ``n`` of weights (int32 [ROWS], below ``out_features``) of matrix
    ``matrix`` (int64, one or [ROWS]) times the activations at x + x_rows (int64 [TOKENS]), over ``begin`` to
    ``end`` of K, multiples of BLOCK_K. Row scales are left to ``scaled``.

    ``stride``: of a row of ``data``, in its elements or words. EVEN_K: K is a multiple of BLOCK_K.
    """
    weights = data + (matrix * out_features + n) * stride
    # One way out: the compiler would look at what stands behind a return.
    if KIND == "plain":
        total = _plain_product(
            x, x_rows, in_features, weights, begin, end, EVEN_K, BLOCK_K, ROWS, TOKENS
        )  # fmt: skip
    elif KIND == "int4":
        first = matrix * (stride * 8 // GROUP) * out_features + n
        total = _int4_product(
            x, x_rows, in_features, weights, scales + first, None if zeros is None else zeros + first,
            out_features, begin, end, GROUP, EVEN_K, BLOCK_K, ROWS, TOKENS,
        )  # fmt: skip
    elif GROUP == 0:
        total = _byte_product(
            x, x_rows, in_features, weights, None, begin, end, KIND, EVEN_K, BLOCK_K, ROWS, TOKENS
        )  # fmt: skip
    else:
        tl.static_assert(GROUP == BLOCK_K)
        block_row = matrix * tl.cdiv(out_features, GROUP) + n // GROUP
        total = _byte_product(
            x, x_rows, in_features, weights, scales + block_row * (stride * 4 // GROUP), begin, end,
            KIND, EVEN_K, BLOCK_K, ROWS, TOKENS,
        )  # fmt: skip
    return total


@triton.jit
def scaled(total, row_scales, matrix, n, out_features):
    """A product times the scales of its rows, if there are any."""
    if row_scales is not None:
        total = total * tl.load(row_scales + matrix * out_features + n)[:, None]
    return total
