# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Dense layers: x @ weight.T, one matrix for all rows or one per head; and silu(gate) * up.

One kernel for any number of rows M; the loop is in products.py. A small matrix has too few tiles to keep a
GPU's processors busy when it is read for one token, so the sum over K is cut into segments, as many as its
shape (nothing else) asks for. Few rows: each segment is a program of its own and a second kernel adds them
up. Many rows: one program computes its segments one after the other. Both add in the same order, so a row
has the same bits in any company.

M rows, N output features, K input features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.checks import check_dims, failure
from moe_runtime.kernels.packed import WeightFormat
from moe_runtime.kernels.triton.aot_case import AotCase
from moe_runtime.kernels.triton.arguments import check
from moe_runtime.kernels.triton.operands import AOT_FORMATS, aot_case, constants_of, operands_of, sizes_of
from moe_runtime.kernels.triton.products import product
from moe_runtime.kernels.triton.tiles import (
    ELEMENTS_PER_PROGRAM,
    ROWS_TO_CAST,
    launch_options,
    linear_segments,
    linear_tile,
    matrix_tiles,
    segment_tiles,
    tuned_size,
)
from moe_runtime.kernels.triton.weights import DeviceLinear, DeviceMatrix

# --- the product --------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x, data, scales, zeros, row_scales, bias, out, M, N, K, stride, x_stride, out_stride, padded_k,
    KIND: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, SEGMENTS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """SPLIT: segment program_id(1) alone, unscaled, to out [SEGMENTS, M, N]."""
    # 1. Which tile. Tiles of tokens that read the same weights follow each other.
    token_tiles = tl.cdiv(M, TOKENS)
    first_token = tl.program_id(0) % token_tiles * TOKENS
    column = tl.program_id(0) // token_tiles * ROWS
    head = tl.program_id(2).to(tl.int64)
    n = column + tl.arange(0, ROWS)
    known = tl.minimum(n, N - 1)
    token = first_token + tl.arange(0, TOKENS)
    x_rows = tl.minimum(token, M - 1).to(tl.int64) * x_stride + head * K

    # 2. The sum over K, segment by segment.
    length = padded_k // SEGMENTS
    if SPLIT:
        begin = tl.program_id(1) * length
        total = product(
            x, x_rows, K, data, scales, zeros, head, known, N, stride, begin, begin + length,
            KIND, GROUP, EVEN_K, BLOCK_K, ROWS, TOKENS,
        )  # fmt: skip
    elif SEGMENTS == 1:
        total = product(
            x, x_rows, K, data, scales, zeros, head, known, N, stride, 0, padded_k,
            KIND, GROUP, EVEN_K, BLOCK_K, ROWS, TOKENS,
        )  # fmt: skip
    else:
        total = tl.zeros([ROWS, TOKENS], dtype=tl.float32)
        for segment in range(SEGMENTS):
            begin = segment * length
            total += product(
                x, x_rows, K, data, scales, zeros, head, known, N, stride, begin, begin + length,
                KIND, GROUP, EVEN_K, BLOCK_K, ROWS, TOKENS,
            )  # fmt: skip

    # 3. Scales, bias, out.
    mask = (n < N)[:, None] & (token < M)[None, :]
    if SPLIT:
        row = tl.program_id(1).to(tl.int64) * M + token
        tl.store(out + row[None, :] * N + n[:, None], total, mask=mask)
    else:
        total = _finished(total, row_scales, bias, head * N + known, known)
        at = token.to(tl.int64)[None, :] * out_stride + head * N + n[:, None]
        tl.store(out + at, total, mask=mask)


@triton.jit
def _finished(total, row_scales, bias, row, n):
    """total [ROWS, TOKENS] * row_scales + bias; rounded once where there are both, in every kernel."""
    if row_scales is None:
        if bias is not None:
            total += tl.load(bias + n)[:, None]
    elif bias is None:
        total *= tl.load(row_scales + row)[:, None]
    else:
        scale = tl.broadcast_to(tl.load(row_scales + row)[:, None], total.shape)
        total = tl.fma(total, scale, tl.broadcast_to(tl.load(bias + n)[:, None], total.shape))
    return total


@triton.jit(do_not_specialize=["M"])
def _add_segments_kernel(
    partials, row_scales, bias, out, M, N, SEGMENTS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """partials [SEGMENTS, M, N] -> out [M, N]."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    known = tl.minimum(n, N - 1)
    total = tl.zeros([COLUMNS, 1], dtype=tl.float32)
    for segment in range(SEGMENTS):
        total += tl.load(partials + (segment * M + row) * N + known)[:, None]
    total = _finished(total, row_scales, bias, known, known)
    tl.store(out + row * N + n[:, None], total, mask=(n < N)[:, None])


def linear(x: torch.Tensor, packed: DeviceLinear, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K] -> x @ weight.T + bias, [M, N]."""
    op = "linear"
    check_dims(op, "x", x, 2)
    _check_weights(op, packed)
    matrix, device = packed.matrix, packed.data.device
    if matrix.count != 1:
        raise failure(op, "packed", "one head", f"{matrix.count} heads")
    n, rows = matrix.out_features, x.shape[0]
    check(op, "x", x, (rows, matrix.in_features), device)
    if bias is not None:
        check(op, "bias", bias, (n,), device)
    return _multiply(x, matrix, bias, torch.empty(rows, n, device=device))


def linear_heads(x: torch.Tensor, packed: DeviceLinear) -> torch.Tensor:
    """x [T, heads, K] -> [T, heads, N], each head through its own weight."""
    op = "linear_heads"
    check_dims(op, "x", x, 3)
    _check_weights(op, packed)
    matrix, device = packed.matrix, packed.data.device
    check(op, "x", x, (x.shape[0], matrix.count, matrix.in_features), device)
    out = torch.empty(x.shape[0], matrix.count, matrix.out_features, device=device)
    return _multiply(x, matrix, None, out)


def _check_weights(op: str, packed: DeviceLinear) -> None:
    if packed.layout != "device":
        raise failure(op, "packed", "packed for a device", f"packed as {packed.layout!r}")


def _multiply(
    x: torch.Tensor, matrix: DeviceMatrix, bias: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """x [M, B, K] or [M, K] -> out [M, B, N] or [M, N]."""
    rows, heads, n, k = x.shape[0], matrix.count, matrix.out_features, matrix.in_features
    if not out.numel():
        return out
    kind = matrix.format.kind
    stride, padded_k = sizes_of(matrix)
    segments = linear_segments(n, padded_k, kind) if heads == 1 else 1
    tile, split = matrix.tuned.get(tuned_size(rows)) or linear_tile(kind, rows, n, segments)
    split = split and segments > 1
    programs = -(-n // tile.rows) * -(-rows // tile.tokens)
    if rows > ROWS_TO_CAST:
        x = x.to(matrix.dot_dtype)
    target = torch.empty(segments, rows, n, device=out.device) if split else out
    _linear_kernel[(programs, segments if split else 1, heads)](
        x, *operands_of(matrix), bias, target, rows, n, k, stride, heads * k, heads * n, padded_k,
        **constants_of(matrix, tile), SEGMENTS=segments, SPLIT=split, **launch_options(tile),
    )  # fmt: skip
    if split:
        grid = (rows, triton.cdiv(n, ELEMENTS_PER_PROGRAM))
        _add_segments_kernel[grid](
            target, matrix.row_scales, bias, out, rows, n, SEGMENTS=segments, COLUMNS=ELEMENTS_PER_PROGRAM
        )
    return out


# --- silu(gate) * up ----------------------------------------------------------------------------------------


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _silu_mul_kernel(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = silu(tl.load(gate + at, mask=inside, other=0.0)) * tl.load(up + at, mask=inside, other=0.0)
    tl.store(out + at, value, mask=inside)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, elementwise."""
    check("silu_mul", "gate", gate, gate.shape, gate.device)
    check("silu_mul", "up", up, gate.shape, gate.device)
    out = torch.empty_like(gate)
    if count := gate.numel():
        grid = (triton.cdiv(count, ELEMENTS_PER_PROGRAM),)
        _silu_mul_kernel[grid](gate, up, out, count, BLOCK=ELEMENTS_PER_PROGRAM)
    return out


# --- ahead of time ------------------------------------------------------------------------------------------


def _linear_cases(form: WeightFormat) -> Iterator[AotCase]:
    """Every tile; K in one sum (a large matrix, heads), and in 4 segments (N = 2048, K = 4096)."""
    for tile, one_of_many in zip(matrix_tiles(form.kind), segment_tiles(form.kind), strict=True):
        few = tile.tokens <= ROWS_TO_CAST
        name = f"{tile.rows}x{tile.tokens}"
        yield aot_case(name, _linear_kernel, form, tile, not few, SEGMENTS=1, SPLIT=False)
        name = f"{one_of_many.rows}x{tile.tokens} in 4 {'programs' if few else 'segments'}"
        yield aot_case(name, _linear_kernel, form, one_of_many, not few, SEGMENTS=4, SPLIT=few)


def _other_cases() -> Iterator[AotCase]:
    for name, absent in (("plain", {"row_scales": None, "bias": None}), ("scales and bias", {})):
        signature = {"partials": "*fp32", "row_scales": "*fp32", "bias": "*fp32", "out": "*fp32"}
        signature |= dict.fromkeys(absent, "constexpr") | {"M": "i32", "N": "i32"}
        values = {"SEGMENTS": 4, "COLUMNS": ELEMENTS_PER_PROGRAM} | absent
        signature |= dict.fromkeys(values, "constexpr")
        pointers = tuple(argument for argument, kind in signature.items() if kind == "*fp32")
        yield AotCase(name, _add_segments_kernel, signature, values, 4, 3, (*pointers, "N"))
    pointers = ("gate", "up", "out")
    signature = dict.fromkeys(pointers, "*fp32") | {"count": "i32", "BLOCK": "constexpr"}
    values = {"BLOCK": ELEMENTS_PER_PROGRAM}
    yield AotCase("silu_mul", _silu_mul_kernel, signature, values, 4, 3, (*pointers, "count"))


AOT_CASES = (*(case for form in AOT_FORMATS for case in _linear_cases(form)), *_other_cases())
