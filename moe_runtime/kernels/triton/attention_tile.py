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
def finite(values, row, known, HALF: tl.constexpr, VALUE_DIM: tl.constexpr):
    """Whether all values of cache rows ``row`` [N] are finite numbers: 1 or 0."""
    low = tl.abs(columns(values, row, known, 0, HALF, VALUE_DIM).to(tl.float32)) < float("inf")
    high = tl.abs(columns(values, row, known, HALF, HALF, VALUE_DIM).to(tl.float32)) < float("inf")
    return tl.min(tl.min(tl.where(low & high, 1, 0), 1))


@triton.jit
def see_tile(
    query_low, query_high, query_rest, keys, values, row, known, visible, scale, best, total, low, high,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Lets the rows see the keys and values of cache rows ``row`` [N]: (best, total, low, high), updated.

    best [M] is the largest score so far, total [M] the sum of exp2(scale * (score - best)), low and high
    [M, V / 2] that of the values' columns. Row m sees position n if visible[m, n].
    """
    # 1. Scores. Latents are keys and values at once.
    half: tl.constexpr = query_low.shape[1]
    key_low = columns(keys, row, known, 0, half, KEY_DIM)
    key_high = columns(keys, row, known, half, half, KEY_DIM)
    score = tl.dot(query_low, tl.trans(key_low), input_precision="ieee")
    score = tl.dot(query_high, tl.trans(key_high), score, input_precision="ieee")
    if query_rest is not None:
        key_rest = columns(keys, row, known, 2 * half, query_rest.shape[1], KEY_DIM)
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
        value_low = columns(values, row, known, 0, low.shape[1], VALUE_DIM)
        value_high = columns(values, row, known, low.shape[1], low.shape[1], VALUE_DIM)
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
