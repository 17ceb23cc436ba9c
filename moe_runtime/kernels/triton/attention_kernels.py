# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""The kernels of paged attention; attention.py says why they are two, and which runs when.

A program takes BLOCK_M rows: the query heads of one key head, of one token (decode) or of TOKENS neighbours
in the batch. Neighbours may belong to different sequences: the program goes through the sequences it finds
among its rows, or shares them with others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_runtime.kernels.triton.attention_tile import cache_rows, columns, finite, merge, merge_sums, see_tile

# --- one program's rows -------------------------------------------------------------------------------------


@triton.jit
def _rows(
    positions, sequence_rows, tile, head_tile, num_tokens, num_sequences, capacity,
    GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, TOKENS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Per row: token, head within the group, sequence, how many positions it sees (0: none), whether real."""
    row = tl.arange(0, BLOCK_M)
    token = tile * TOKENS + row // GROUP_PADDED
    head = head_tile * GROUP_PADDED + row % GROUP_PADDED
    real = (row // GROUP_PADDED < TOKENS) & (token < num_tokens) & (head < GROUP)
    sequence = tl.load(sequence_rows + token, mask=real, other=-1)
    length = tl.minimum(tl.load(positions + token, mask=real, other=-1) + 1, capacity)
    length = tl.where((sequence >= 0) & (sequence < num_sequences), length, 0)
    return token, head, sequence, tl.maximum(length, 0), real


@triton.jit
def _clear_rows(out, at, rows, VALUE_DIM: tl.constexpr, HALF: tl.constexpr):
    column = tl.arange(0, 2 * HALF)
    zeros = tl.zeros([at.shape[0], 2 * HALF], tl.float32)
    kept = rows[:, None] & (column < VALUE_DIM)[None, :]
    tl.store(out + at[:, None] * VALUE_DIM + column[None, :], zeros, mask=kept)


@triton.jit
def _passes(
    values, scales, table, start, end, kv_head, num_blocks, KV_HEADS: tl.constexpr, VALUE_DIM: tl.constexpr,
    HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """In how many passes to take a sequence's tokens: all in one, unless a value that only some of them see
    is no finite number. 0 * NaN is NaN: a weight of 0 would not keep it from the others.
    """
    all_finite = tl.full([], 1, tl.int32)
    if TOKENS > 1:
        for first in range(start, end, BLOCK_N):
            position = first + tl.arange(0, BLOCK_N)
            row, known = cache_rows(table, position, end, kv_head, num_blocks, KV_HEADS, BLOCK_SIZE)
            all_finite = tl.minimum(all_finite, finite(values, scales, row, known, HALF, VALUE_DIM))
    return tl.where(all_finite == 1, 1, TOKENS)


@triton.jit
def _split(
    query_low, query_high, query_rest, keys, key_scales, values, value_scales, table, begin, end, length,
    kv_head, num_blocks, scale, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Positions begin..end - 1 from a fresh state; row m sees those below length[m]."""
    best = tl.full([query_low.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([query_low.shape[0]], tl.float32)
    low = tl.zeros([query_low.shape[0], HALF], tl.float32)
    high = tl.zeros([query_low.shape[0], HALF], tl.float32)
    for start in range(begin, end, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        row, known = cache_rows(table, position, end, kv_head, num_blocks, KV_HEADS, BLOCK_SIZE)
        best, total, low, high = see_tile(
            query_low, query_high, query_rest, keys, key_scales, values, value_scales, row, known,
            position[None, :] < length[:, None], scale, best, total, low, high, KEY_DIM, VALUE_DIM,
        )  # fmt: skip
    return best, total, low, high


@triton.jit
def _add_run(out, place, kept, first, ends, next_sums, old, new, total):
    """One half of the columns: a split's sums into the sums so far, which lie in the output."""
    sums = tl.load(out + place, mask=kept & (first == 0), other=0.0)
    sums = merge_sums(sums, next_sums, old, new)
    sums = tl.where(ends[:, None], sums / total[:, None], sums)
    tl.store(out + place, sums, mask=kept)


@triton.jit
def _attend(
    query_low, query_high, query_rest, keys, key_scales, values, value_scales, table, lengths, before, at,
    out, split_best, split_total, split_sums, scale, num_tokens, num_blocks, kv_head, share, shares,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_ROW: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """One sequence's splits: each left for the merging kernel (SHARED), or merged as they come."""
    column = tl.arange(0, HALF)
    in_low, in_high = (column < VALUE_DIM)[None, :], (HALF + column < VALUE_DIM)[None, :]
    place = at[:, None] * VALUE_DIM + column[None, :]
    longest = tl.max(lengths)
    best = tl.full([lengths.shape[0]], float("-inf"), tl.float32)
    total = tl.zeros([lengths.shape[0]], tl.float32)
    for split in range(share if SHARED else 0, tl.cdiv(longest, SPLIT), shares if SHARED else 1):
        begin = split * SPLIT
        next_best, next_total, low, high = _split(
            query_low, query_high, query_rest, keys, key_scales, values, value_scales, table, begin,
            tl.minimum(begin + SPLIT, longest), lengths, kv_head, num_blocks, scale, KV_HEADS, KEY_DIM,
            VALUE_ROW, HALF, BLOCK_SIZE, BLOCK_N,
        )  # fmt: skip
        seen = lengths > begin
        kept = seen[:, None]
        if SHARED:
            run = tl.cast(split, tl.int64) * num_tokens * HEADS + before
            tl.store(split_best + run + at, next_best, mask=seen)
            tl.store(split_total + run + at, next_total, mask=seen)
            tl.store(split_sums + run * VALUE_DIM + place, low, mask=kept & in_low)
            tl.store(split_sums + run * VALUE_DIM + place + HALF, high, mask=kept & in_high)
        else:
            # The sums so far lie in the output, where other threads of this program may have put them.
            best, total, old, new = merge(best, total, next_best, next_total, scale)
            ends = lengths <= begin + SPLIT
            tl.debug_barrier()
            _add_run(out, place, kept & in_low, split == 0, ends, low, old, new, total)
            _add_run(out, place + HALF, kept & in_high, split == 0, ends, high, old, new, total)


@triton.jit
def attention_kernel(
    q, keys, key_scales, values, value_scales, positions, sequence_rows, block_tables, out, split_best,
    split_total, split_sums, scale, num_tokens, num_sequences, max_blocks, num_blocks,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, KEY_HALF: tl.constexpr,
    KEY_REST: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_ROW: tl.constexpr, HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, GROUP_PADDED: tl.constexpr, TOKENS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Programs: tiles of tokens, key heads, shares of the splits (SHARED) or of the sequences in the tile."""
    # 1. The rows, latest tokens first, as they have most to see, and their queries.
    group: tl.constexpr = HEADS // KV_HEADS
    tile, share, shares = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    kv_head = tl.program_id(1) % KV_HEADS
    token, head, sequence, length, real = _rows(
        positions, sequence_rows, tile, tl.program_id(1) // KV_HEADS, num_tokens, num_sequences,
        max_blocks * BLOCK_SIZE, group, GROUP_PADDED, TOKENS, BLOCK_M,
    )  # fmt: skip
    # Rows of q and out, counted from the tile's first: the offsets of a whole tile fit 32 bits.
    before = tile.to(tl.int64) * TOKENS * HEADS
    at = (token - tile * TOKENS) * HEADS + kv_head * group + head
    q += before * KEY_DIM
    out += before * VALUE_DIM
    kind = keys.dtype.element_ty if key_scales is None else tl.bfloat16
    query_low = columns(q, at, real, 0, KEY_HALF, KEY_DIM).to(kind)
    query_high = columns(q, at, real, KEY_HALF, KEY_HALF, KEY_DIM).to(kind)
    query_rest = None
    if KEY_REST > 0:
        query_rest = columns(q, at, real, 2 * KEY_HALF, KEY_REST, KEY_DIM).to(kind)
    if share == 0:
        _clear_rows(out, at, real & (length == 0), VALUE_DIM, HALF)

    # 2. Sequence by sequence.
    first = tl.min(tl.where(length > 0, sequence, num_sequences))
    last = tl.max(tl.where(length > 0, sequence, -1))
    for this in range(first + (0 if SHARED else share), last + 1, 1 if SHARED else shares):
        table = block_tables + tl.cast(this, tl.int64) * max_blocks
        lengths = tl.where(sequence == this, length, 0)
        longest = tl.max(lengths)
        common = tl.min(tl.where(lengths > 0, lengths, longest))
        passes = _passes(
            keys if values is None else values, key_scales if values is None else value_scales, table, common,
            longest, kv_head, num_blocks, KV_HEADS, VALUE_ROW, HALF, BLOCK_SIZE, BLOCK_N, TOKENS,
        )  # fmt: skip
        for number in range(passes):
            taken = (passes == 1) | (token - tile * TOKENS == number)
            _attend(
                query_low, query_high, query_rest, keys, key_scales, values, value_scales, table,
                tl.where(taken, lengths, 0), before, at, out, split_best, split_total, split_sums, scale,
                num_tokens, num_blocks, kv_head, share, shares,
                HEADS, KV_HEADS, KEY_DIM, VALUE_DIM, VALUE_ROW, HALF, BLOCK_SIZE, BLOCK_N, SPLIT, SHARED,
            )  # fmt: skip


@triton.jit
def merge_kernel(
    positions, sequence_rows, out, split_best, split_total, split_sums, scale, num_tokens, num_sequences,
    max_blocks, HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_HEADS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One program per token and BLOCK_HEADS heads: its splits in their order, as step 3b above."""
    token = tl.program_id(0)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    column = tl.arange(0, VALUE_PADDED)
    sequence = tl.load(sequence_rows + token)
    length = tl.minimum(tl.load(positions + token) + 1, max_blocks * BLOCK_SIZE)
    length = tl.where((sequence >= 0) & (sequence < num_sequences), length, 0)
    at = token.to(tl.int64) * HEADS + head
    kept = (head < HEADS)[:, None] & (column < VALUE_DIM)[None, :]
    best = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    sums = tl.zeros([BLOCK_HEADS, VALUE_PADDED], tl.float32)
    for split in range(tl.cdiv(length, SPLIT)):
        run = tl.cast(split, tl.int64) * num_tokens * HEADS + at
        next_best = tl.load(split_best + run, mask=head < HEADS, other=0.0)
        next_total = tl.load(split_total + run, mask=head < HEADS, other=1.0)
        next_sums = tl.load(split_sums + run[:, None] * VALUE_DIM + column[None, :], mask=kept, other=0.0)
        best, total, old, new = merge(best, total, next_best, next_total, scale)
        sums = merge_sums(sums, next_sums, old, new)
    sums = tl.where(length > 0, sums / total[:, None], 0.0)
    tl.store(out + at[:, None] * VALUE_DIM + column[None, :], sums, mask=kept)
