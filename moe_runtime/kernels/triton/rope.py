# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Rotary positions in place, and rows of keys and values into the paged cache; both in one launch for keys.

Bound by memory and by launches: a decoding step rotates a few kilobytes. ``rope_write_cache`` gives the cache
what it has just rotated, still in registers, with the bits that ``rope`` and then ``write_cache`` would give.
A program takes one token and some of its heads. Rows of an int8 cache are as in cache_rows.py, bit for bit.

Nothing here can raise for a value. A position without a row in the tables makes the rotated numbers NaN,
which no one can take for an answer. A slot outside the cache is not written: rows that pad a captured batch
use -1.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.cache_rows import SCALE_GROUP, SMALLEST, row_size
from moe_runtime.kernels.checks import check_dims, failure
from moe_runtime.kernels.triton.aot_case import AotCase
from moe_runtime.kernels.triton.arguments import PLAIN_DTYPES, check
from moe_runtime.kernels.triton.tiles import heads_per_program, power_of_two

GROUP, LEAST = tl.constexpr(SCALE_GROUP), tl.constexpr(SMALLEST)


@triton.jit
def _cache_row(slots, token, heads, num_slots, num_heads, block_size):
    """The rows [num_blocks, heads, block_size] of a token's heads, by number; whether they exist."""
    slot = tl.load(slots + token)
    row = ((slot // block_size) * num_heads + heads) * block_size + slot % block_size
    return row, (heads < num_heads) & (slot >= 0) & (slot < num_slots)


@triton.jit
def _store_codes(
    cache, scales, row, exists, values, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    """values float32 [HEADS, DIM_PADDED], zeros beyond DIM -> rows of an int8 cache; ``scales`` is the same
    memory as float32.
    """
    codes_size: tl.constexpr = (DIM + 3) // 4 * 4
    groups: tl.constexpr = (DIM + GROUP - 1) // GROUP
    width: tl.constexpr = min(DIM_PADDED, GROUP)
    count: tl.constexpr = DIM_PADDED // width
    grouped = tl.reshape(values, (HEADS, count, width))
    largest = tl.max(tl.abs(grouped), 2)
    finite = tl.min(tl.where(tl.abs(grouped) < float("inf"), 1, 0), 2) == 1
    counts = finite & (largest >= LEAST)
    inverse = tl.div_rn(tl.full([HEADS, count], 127.0, tl.float32), tl.where(counts, largest, 1.0))
    scale = tl.where(counts, tl.div_rn(largest, tl.full([HEADS, count], 127.0, tl.float32)), 0.0)
    scale = tl.where(finite, scale, float("nan"))
    code = tl.where(counts[:, :, None], grouped * inverse[:, :, None], 0.0)
    # Between 2^23 and 2^24 a float32 has no room for a fraction: the sum is rounded to the nearest even.
    code = (code + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    column, group = tl.arange(0, DIM_PADDED), tl.arange(0, count)
    at = cache + row[:, None] * (codes_size + 4 * groups) + column[None, :]
    code = tl.reshape(code, (HEADS, DIM_PADDED)).to(tl.int8)
    tl.store(at, code, mask=exists[:, None] & (column < codes_size)[None, :])
    at = scales + row[:, None] * (codes_size // 4 + groups) + codes_size // 4 + group[None, :]
    tl.store(at, scale, mask=exists[:, None] & (group < groups)[None, :])


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def _rope_kernel(
    x, cos, sin, positions, cache, scales, slots, num_heads, num_positions, num_slots, block_size,
    DIM: tl.constexpr, HALF: tl.constexpr, OFFSET: tl.constexpr, INTERLEAVED: tl.constexpr,
    DIM_PADDED: tl.constexpr, HALF_PADDED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    rows = x + (token * num_heads + heads[:, None]) * DIM
    pair = tl.arange(0, HALF_PADDED)

    # 1. The angle of this token's position.
    position = tl.load(positions + token).to(tl.int64)
    known = (position >= 0) & (position < num_positions) & (pair < HALF)
    c = tl.load(cos + position * HALF + pair, mask=known, other=float("nan"))[None, :]
    s = tl.load(sin + position * HALF + pair, mask=known, other=float("nan"))[None, :]

    # 2. Every pair by it, in place: both of a pair belong to one thread.
    if INTERLEAVED:
        left, right = OFFSET + 2 * pair, OFFSET + 2 * pair + 1
    else:
        left, right = OFFSET + pair, OFFSET + HALF + pair
    inside = (heads < num_heads)[:, None] & (pair < HALF)[None, :]
    first = tl.load(rows + left[None, :], mask=inside)
    second = tl.load(rows + right[None, :], mask=inside)
    turned_first, turned_second = first * c - second * s, second * c + first * s
    tl.store(rows + left[None, :], turned_first, mask=inside)
    tl.store(rows + right[None, :], turned_second, mask=inside)

    # 3. The whole row into the cache: what was turned, and what was not.
    if scales is not None:
        # A group of 64 that shares a scale was turned by several threads.
        tl.debug_barrier()
        column = tl.arange(0, DIM_PADDED)
        kept = (heads < num_heads)[:, None] & (column < DIM)[None, :]
        row, exists = _cache_row(slots, token, heads, num_slots, num_heads, block_size)
        values = tl.load(rows + column[None, :], mask=kept, other=0.0)
        _store_codes(cache, scales, row, exists, values, DIM, DIM_PADDED, HEADS)
    elif cache is not None:
        row, exists = _cache_row(slots, token, heads, num_slots, num_heads, block_size)
        homes, exists = cache + row[:, None] * DIM, exists[:, None]
        kind = cache.dtype.element_ty
        tl.store(homes + left[None, :], turned_first.to(kind), mask=inside & exists)
        tl.store(homes + right[None, :], turned_second.to(kind), mask=inside & exists)
        if DIM > 2 * HALF:
            column = tl.arange(0, DIM_PADDED)
            kept = (column < OFFSET) | ((column >= OFFSET + 2 * HALF) & (column < DIM))
            plain = tl.load(rows + column[None, :], mask=(heads < num_heads)[:, None] & kept[None, :])
            tl.store(homes + column[None, :], plain.to(kind), mask=exists & kept[None, :])


@triton.jit(do_not_specialize_on_alignment=["slots"])
def _write_cache_kernel(
    cache, scales, values, slots, num_heads, num_slots, block_size,
    DIM: tl.constexpr, DIM_PADDED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, DIM_PADDED)[None, :]
    row, exists = _cache_row(slots, token, heads, num_slots, num_heads, block_size)
    inside = exists[:, None] & (column < DIM)
    rows = tl.load(values + (token * num_heads + heads[:, None]) * DIM + column, mask=inside, other=0.0)
    if scales is not None:
        _store_codes(cache, scales, row, exists, rows, DIM, DIM_PADDED, HEADS)
    else:
        tl.store(cache + row[:, None] * DIM + column, rows.to(cache.dtype.element_ty), mask=inside)


def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
    offset: int = 0,
) -> torch.Tensor:
    """x [T, heads, D], cos and sin [P, R/2], positions int32 [T] -> x, rotated in place."""
    _rotate("rope", x, cos, sin, positions, interleaved, offset, None, None)
    return x


def rope_write_cache(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
    cache: torch.Tensor,
    slots: torch.Tensor,
    offset: int = 0,
) -> torch.Tensor:
    """``rope``, and ``write_cache`` of its result; returns x."""
    _rotate("rope_write_cache", x, cos, sin, positions, interleaved, offset, cache, slots)
    return x


def write_cache(cache: torch.Tensor, values: torch.Tensor, slots: torch.Tensor) -> None:
    """cache [num_blocks, heads, block_size, D] <- values [T, heads, D] at slots int64 [T]. A row of an int8
    cache is ``row_size(D)`` bytes.
    """
    op = "write_cache"
    check_dims(op, "values", values, 3)
    tokens, num_heads, dim = values.shape
    check(op, "values", values, values.shape, values.device)
    num_slots, block_size = _check_cache(op, cache, slots, values)
    padded = _padded(dim, cache.dtype)
    heads = heads_per_program(num_heads, padded)
    if values.numel():
        _write_cache_kernel[(tokens, triton.cdiv(num_heads, heads))](
            cache, _scales(cache), values, slots, num_heads, num_slots, block_size, dim, padded, heads,
            num_warps=4,
        )  # fmt: skip


def _rotate(
    op: str,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    interleaved: bool,
    offset: int,
    cache: torch.Tensor | None,
    slots: torch.Tensor | None,
) -> None:
    check_dims(op, "x", x, 3)
    check_dims(op, "cos", cos, 2)
    tokens, num_heads, dim = x.shape
    num_positions, half = cos.shape
    if not 0 <= offset <= dim - 2 * half:
        raise failure(op, "offset", f"0 to {dim - 2 * half} (dim {dim}, rotated {2 * half})", offset)
    check(op, "x", x, x.shape, x.device)
    check(op, "cos", cos, cos.shape, x.device)
    check(op, "sin", sin, cos.shape, x.device)
    check(op, "positions", positions, (tokens,), x.device, (torch.int32,))
    num_slots, block_size = 0, 1
    if cache is not None and slots is not None:
        num_slots, block_size = _check_cache(op, cache, slots, x)
    padded = _padded(dim, x.dtype if cache is None else cache.dtype)
    heads = heads_per_program(num_heads, padded)
    if x.numel():
        _rope_kernel[(tokens, triton.cdiv(num_heads, heads))](
            x, cos, sin, positions, cache, _scales(cache), slots, num_heads, num_positions, num_slots,
            block_size, dim, half, offset, interleaved, padded, power_of_two(half), heads, num_warps=4,
        )  # fmt: skip


def _check_cache(op: str, cache: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor) -> tuple[int, int]:
    """How many slots the cache has, and how many to a block."""
    check_dims(op, "cache", cache, 4)
    tokens, num_heads, dim = rows.shape
    num_blocks, block_size = cache.shape[0], cache.shape[2]
    shape = (num_blocks, num_heads, block_size, row_size(dim, cache.dtype))
    check(op, "cache", cache, shape, rows.device, (*PLAIN_DTYPES, torch.int8))
    check(op, "slots", slots, (tokens,), rows.device, (torch.int64,))
    return num_blocks * block_size, block_size


def _scales(cache: torch.Tensor | None) -> torch.Tensor | None:
    """The memory of an int8 cache as the float32 that its scales are."""
    return cache.view(torch.float32) if cache is not None and cache.dtype is torch.int8 else None


def _padded(dim: int, dtype: torch.dtype) -> int:
    """int8 rows: room for the bytes that fill a word after the last code."""
    return max(power_of_two(dim), 16) if dtype is torch.int8 else power_of_two(dim)


# --- ahead of time ------------------------------------------------------------------------------------------


def _aot_cases(
    name: str, num_heads: int, dim: int, half: int, offset: int, kinds: tuple[str, ...]
) -> Iterator[AotCase]:
    padded = power_of_two(dim)
    heads = heads_per_program(num_heads, padded)
    constants = {
        "DIM": dim, "HALF": half, "OFFSET": offset, "INTERLEAVED": bool(offset), "DIM_PADDED": padded,
        "HALF_PADDED": power_of_two(half), "HEADS": heads,
    }  # fmt: skip
    sizes = {"num_heads": "i32", "num_positions": "i32", "num_slots": "i32", "block_size": "i32"}
    rotated = {"x": "*fp32", "cos": "*fp32", "sin": "*fp32", "positions": "*i32"}
    for kind in kinds:
        has_cache = kind != "constexpr"
        cache = {"cache": kind, "scales": "*fp32" if kind == "*i8" else "constexpr"}
        slots = {"slots": "*i64" if has_cache else "constexpr"}
        signature = rotated | cache | slots | sizes | dict.fromkeys(constants, "constexpr")
        absent = {key: None for key in ("cache", "scales", "slots") if signature[key] == "constexpr"}
        aligned = tuple(key for key in ("x", "cos", "sin", "cache", "scales") if key not in absent)
        yield AotCase(
            f"rope-{name}-{kind[1:] if has_cache else 'alone'}", _rope_kernel, signature, constants | absent,
            4, 1, aligned,
        )  # fmt: skip
        if has_cache:
            signature = cache | {"values": "*fp32"} | slots | {"num_heads": "i32", "num_slots": "i32"}
            signature |= {"block_size": "i32"}
            tile = {"DIM": dim, "DIM_PADDED": padded, "HEADS": heads}
            yield AotCase(
                f"write_cache-{name}-{kind[1:]}", _write_cache_kernel,
                signature | dict.fromkeys(tile, "constexpr"), tile | absent, 4, 1,
                tuple(key for key in ("cache", "scales", "values") if key not in absent),
            )  # fmt: skip


# Heads of 128 rotated whole; half of them, as in GLM-4; MLA's latent row, whose last 64 are rotated.
AOT_CASES = (
    *_aot_cases("qwen3", 4, 128, 64, 0, ("constexpr", "*fp32", "*bf16", "*fp16", "*i8")),
    *_aot_cases("glm4", 8, 128, 32, 0, ("constexpr", "*bf16")),
    *_aot_cases("mla", 1, 576, 32, 512, ("constexpr", "*bf16", "*i8")),
)
