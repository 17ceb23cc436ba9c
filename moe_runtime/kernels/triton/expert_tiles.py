# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""One tile of an expert's gated MLP, for both ways of fused_moe.py to find its tokens.

Gate and up are one product: by turns eight rows of gate and the same eight of up, which is how the matrix
instruction gives rows i and i + 8 of its result to one thread, so that silu(gate) * up needs no neighbour.
E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_runtime.kernels.triton.linear import silu
from moe_runtime.kernels.triton.products import product, scaled


@triton.jit
def gate_up_tile(
    x, tokens, places, count, expert, column, data, scales, zeros, row_scales, h, hidden, intermediate,
    stride, padded_k,
    KIND: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """h [places, column + ROWS / 2] = silu(gate) * up of x [tokens], for the first ``count`` of TOKENS."""
    # 1. Both products.
    row = tl.arange(0, ROWS)
    n = tl.minimum(column + row // 16 * 8 + row % 8, intermediate - 1)
    matrix = expert.to(tl.int64) * 2 + row // 8 % 2
    total = product(
        x, tokens.to(tl.int64) * hidden, hidden, data, scales, zeros, matrix, n, intermediate, stride, 0,
        padded_k, KIND, GROUP, EVEN_K, BLOCK_K, ROWS, TOKENS,
    )  # fmt: skip
    total = scaled(total, row_scales, matrix, n, intermediate)

    # 2. The activation, rounded to what the next product takes.
    by_turns = tl.permute(tl.reshape(total, (ROWS // 16, 2, 8, TOKENS)), (0, 2, 3, 1))
    gate, up = tl.split(by_turns)
    value = tl.reshape(silu(gate) * up, (ROWS // 2, TOKENS)).to(h.dtype.element_ty)
    columns = column + tl.arange(0, ROWS // 2)
    mask = (columns < intermediate)[:, None] & (tl.arange(0, TOKENS) < count)[None, :]
    tl.store(h + places.to(tl.int64)[None, :] * intermediate + columns[:, None], value, mask=mask)


@triton.jit
def down_tile(
    h, places, pairs, count, expert, column, data, scales, zeros, row_scales, weights, out, hidden,
    intermediate, stride, padded_k,
    KIND: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """out [pairs, column + ROWS] = weight of the pair * down of h [places]."""
    columns = column + tl.arange(0, ROWS)
    n = tl.minimum(columns, hidden - 1)
    matrix = expert.to(tl.int64)
    total = product(
        h, places.to(tl.int64) * intermediate, intermediate, data, scales, zeros, matrix, n, hidden, stride,
        0, padded_k, KIND, GROUP, EVEN_K, BLOCK_K, ROWS, TOKENS,
    )  # fmt: skip
    total = scaled(total, row_scales, matrix, n, hidden) * tl.load(weights + pairs)[None, :]
    mask = (columns < hidden)[:, None] & (tl.arange(0, TOKENS) < count)[None, :]
    tl.store(out + pairs.to(tl.int64)[None, :] * hidden + columns[:, None], total, mask=mask)


# --- which tokens -------------------------------------------------------------------------------------------


@triton.jit
def same_expert(ids, pair, expert, num_pairs, PAIRS: tl.constexpr, TOKENS: tl.constexpr):
    """The pairs of ``expert`` from ``pair`` on, at most TOKENS of them; their number; and how many came
    before ``pair``. Only pairs 0, TOKENS, 2 TOKENS ... of an expert have work to do.
    """
    every = tl.arange(0, PAIRS)
    known = tl.load(ids + every, mask=every < num_pairs, other=-1)
    same = ((known == expert) & (every < num_pairs)).to(tl.int32)
    before = tl.sum(tl.where(every < pair, same, 0), 0)
    rank = tl.cumsum(same, 0) - 1 - before
    place = tl.arange(0, TOKENS)
    found = (rank[None, :] == place[:, None]) & (same[None, :] == 1)
    pairs = tl.sum(tl.where(found, every[None, :], 0), 1)
    return pairs, tl.minimum(tl.sum(same, 0) - before, TOKENS), before


@triton.jit
def tile_and_column(work, num_tiles, columns, GROUP_TILES: tl.constexpr):
    """The work-th (tile of tokens, column of tiles): GROUP_TILES tiles of tokens take turns at a column, so
    that a column of weights is read from memory once for all of them.
    """
    size = GROUP_TILES * columns
    first = work // size * GROUP_TILES
    height = tl.minimum(num_tiles - first, GROUP_TILES)
    return first + work % size % height, work % size // height
