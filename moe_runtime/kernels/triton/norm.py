# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""RMS norm, alone and fused with the addition to the residual stream.

Bound by memory: each number is read once, stays in a register while its row is summed, and is written once.
A program holds whole rows, one of a hidden state or several short ones of single heads; how a row is summed
follows from its length alone. float32 throughout. NaN and infinity stay in their row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.checks import failure
from moe_runtime.kernels.triton.aot_case import AotCase
from moe_runtime.kernels.triton.arguments import check
from moe_runtime.kernels.triton.tiles import MAX_NORM_DIM, norm_tiles, power_of_two


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    total,
    num_rows,
    eps,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, PADDED)
    at = rows[:, None] * DIM + columns[None, :]
    inside = (rows < num_rows)[:, None] & (columns < DIM)[None, :]

    # 1. The rows, and their sum with the residual stream, which goes on as it is.
    values = tl.load(x + at, mask=inside, other=0.0)
    if residual is not None:
        values += tl.load(residual + at, mask=inside, other=0.0)
        tl.store(total + at, values, mask=inside)

    # 2. Each row by its own root mean square.
    mean = tl.sum(values * values, 1) / DIM
    scaled = values * tl.rsqrt(mean + eps)[:, None]
    scaled *= tl.load(weight + columns, mask=columns < DIM, other=0.0)[None, :]
    tl.store(out + at, scaled, mask=inside)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., D], weight [D] -> [..., D]."""
    out = torch.empty_like(x)
    _launch("rms_norm", x, None, weight, eps, out, None)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (rms_norm(x + residual), x + residual), the first with the bits that rms_norm of the second has."""
    out, total = torch.empty_like(x), torch.empty_like(x)
    _launch("add_rms_norm", x, residual, weight, eps, out, total)
    return out, total


def _launch(
    op: str,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    total: torch.Tensor | None,
) -> None:
    dim = x.shape[-1]
    if not 1 <= dim <= MAX_NORM_DIM:
        raise failure(op, "x", f"rows of 1 to {MAX_NORM_DIM}", list(x.shape))
    check(op, "x", x, x.shape, x.device)
    check(op, "weight", weight, (dim,), x.device)
    if residual is not None:
        check(op, "residual", residual, x.shape, x.device)
    num_rows, padded = x.numel() // dim, power_of_two(dim)
    rows, warps = norm_tiles(padded)
    if num_rows:
        _rms_norm_kernel[(triton.cdiv(num_rows, rows),)](
            x, residual, weight, out, total, num_rows, eps, dim, padded, rows, num_warps=warps
        )


def _aot_cases(dim: int) -> Iterator[AotCase]:
    padded = power_of_two(dim)
    rows, warps = norm_tiles(padded)
    constants = {"DIM": dim, "PADDED": padded, "ROWS": rows}
    for name, added in (("rms_norm", False), ("add_rms_norm", True)):
        pointer = "*fp32" if added else "constexpr"
        signature = {"x": "*fp32", "residual": pointer, "weight": "*fp32", "out": "*fp32", "total": pointer}
        signature |= {"num_rows": "i32", "eps": "fp32"} | dict.fromkeys(constants, "constexpr")
        absent = {} if added else {"residual": None, "total": None}
        yield AotCase(
            f"{name}-{dim}", _rms_norm_kernel, signature, constants | absent, warps, 1,
            ("x", "weight", "out", "residual", "total") if added else ("x", "weight", "out"),
        )  # fmt: skip


# Heads of 128, MLA's latent vectors, the hidden states of Qwen3, Mixtral and DeepSeek-V3.
AOT_CASES = tuple(case for dim in (128, 512, 2048, 4096, 7168) for case in _aot_cases(dim))
