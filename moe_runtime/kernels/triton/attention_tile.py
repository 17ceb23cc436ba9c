# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""What attention computes over one tile of positions, and how two runs of positions are merged.

Everything that decides a bit of the result is in this file, and both kernels call it: the order of sums,
which products are fused with which sums (written as tl.fma, so that no compiler chooses), and the units of
the running maximum (scores before the scale, so that no rounding of theirs depends on a mask).

Rows are BLOCK_M queries that share one key head; positions are those of one sequence, in its blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_runtime.kernels.cache_rows import SCALE_GROUP

GROUP = tl.constexpr(SCALE_GROUP)


@triton.jit
def cache_rows(table, position, end, kv_head, num_blocks, KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Numbers of the cache rows that hold ``position`` [N], int64, and which of them there are.

    Positions from ``end`` on are not read, nor are blocks that the cache does not have: they count as zeros.
    """
    block = tl.load(table + position // BLOCK_SIZE, mask=position < end, other=-1)
    known = (block >= 0) & (block < num_blocks)
    return (block.to(tl.int64) * KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE, known


@triton.jit
def columns(base, row, known, FIRST: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr):
    """[N, PADDED]: columns FIRST.. of rows of DIM numbers, zeros where there are none."""
    column = FIRST + tl.arange(0, PADDED)
    at = base + row[:, None] * DIM + column[None, :]
    if FIRST + PADDED > DIM:
        return tl.load(at, mask=known[:, None] & (column < DIM)[None, :], other=0.0)
    return tl.load(at, mask=known[:, None], other=0.0)


@triton.jit
def cached(
    cache, scales, row, known, FIRST: tl.constexpr, PADDED: tl.constexpr, DIM: tl.constexpr
):  # fmt: skip
    """As ``columns``, of cache rows. Those of an int8 cache (cache_rows.py; ``scales`` is the same memory as
    float32) are scaled in float32 and rounded once to bfloat16, in which queries are, too.
    """
    if scales is None:
        values = columns(cache, row, known, FIRST, PADDED, DIM)
    else:
        codes_size: tl.constexpr = (DIM + 3) // 4 * 4
        groups: tl.constexpr = (DIM + GROUP - 1) // GROUP
        row_size: tl.constexpr = codes_size + 4 * groups
        column = FIRST + tl.arange(0, PADDED)
        inside = known[:, None] & (column < DIM)[None, :]
        codes = tl.load(cache + row[:, None] * row_size + column[None, :], mask=inside, other=0)
        first = scales + row * (row_size // 4) + codes_size // 4 + FIRST // GROUP
        if PADDED <= GROUP:  # FIRST is a multiple of PADDED
            scale = tl.load(first, mask=known, other=0.0)
            wide = codes.to(tl.float32) * scale[:, None]
        else:
            shape: tl.constexpr = (row.shape[0], PADDED // GROUP, GROUP)
            group = tl.arange(0, PADDED // GROUP)
            inside = known[:, None] & (group < groups - FIRST // GROUP)[None, :]
            scale = tl.load(first[:, None] + group[None, :], mask=inside, other=0.0)
            grouped = tl.reshape(codes.to(tl.float32), shape) * scale[:, :, None]
            wide = tl.reshape(grouped, (row.shape[0], PADDED))
        values = wide.to(tl.bfloat16)
    return values


@triton.jit
def finite(values, scales, row, known, HALF: tl.constexpr, VALUE_DIM: tl.constexpr):
    """Whether all values of cache rows ``row`` [N] are finite numbers: 1 or 0."""
    low = tl.abs(cached(values, scales, row, known, 0, HALF, VALUE_DIM).to(tl.float32)) < float("inf")
    high = tl.abs(cached(values, scales, row, known, HALF, HALF, VALUE_DIM).to(tl.float32)) < float("inf")
    return tl.min(tl.min(tl.where(low & high, 1, 0), 1))


@triton.jit
def see_tile(
    query_low, query_high, query_rest, keys, key_scales, values, value_scales, row, known, visible, scale,
    best, total, low, high, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Lets the rows see the keys and values of cache rows ``row`` [N]: (best, total, low, high), updated.

    best [M] is the largest score so far, total [M] the sum of exp2(scale * (score - best)), low and high
    [M, V / 2] that of the values' columns. Row m sees position n if visible[m, n].
    """
    # 1. Scores. Latents are keys and values at once.
    half: tl.constexpr = query_low.shape[1]
    key_low = cached(keys, key_scales, row, known, 0, half, KEY_DIM)
    key_high = cached(keys, key_scales, row, known, half, half, KEY_DIM)
    score = tl.dot(query_low, tl.trans(key_low), input_precision="ieee")
    score = tl.dot(query_high, tl.trans(key_high), score, input_precision="ieee")
    if query_rest is not None:
        key_rest = cached(keys, key_scales, row, known, 2 * half, query_rest.shape[1], KEY_DIM)
        score = tl.dot(query_rest, tl.trans(key_rest), score, input_precision="ieee")
    score = tl.where(visible, score, float("-inf"))

    # 2. Softmax weights relative to the best so far.
    top = tl.maximum(best, tl.max(score, 1))
    weight = tl.exp2(tl.fma(score, scale, (-(top * scale))[:, None]))
    shrink = tl.exp2((best - top) * scale)
    total = tl.fma(total, shrink, tl.sum(weight, 1))

    # 3. Values.
    if values is None:
        value_low, value_high = key_low, key_high
    else:
        value_low = cached(values, value_scales, row, known, 0, low.shape[1], VALUE_DIM)
        value_high = cached(values, value_scales, row, known, low.shape[1], low.shape[1], VALUE_DIM)
    weight = weight.to(value_low.dtype)
    low = tl.dot(weight, value_low, low * shrink[:, None], input_precision="ieee")
    high = tl.dot(weight, value_high, high * shrink[:, None], input_precision="ieee")
    return top, total, low, high


@triton.jit
def merge(best, total, next_best, next_total, scale):
    """Two runs of positions as one: (best, total, old, new), the last two being the factors of the runs'
    sums. The empty run is (-inf, 0).
    """
    top = tl.maximum(best, next_best)
    old, new = tl.exp2((best - top) * scale), tl.exp2((next_best - top) * scale)
    return top, tl.fma(total, old, next_total * new), old, new


@triton.jit
def merge_sums(sums, next_sums, old, new):
    return tl.fma(sums, old[:, None], next_sums * new[:, None])
