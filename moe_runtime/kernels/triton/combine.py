# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""The outputs of a token's experts added up, slot by slot in their order: the last step of a mixture.

The experts' kernels leave one float32 row per (token, slot) pair, with its routing weight already in it. They
are added in the order of slots by one program per token, not by atomics, so the sum is the same in every
run. What follows a mixture in a model is in the same launch where the caller wants it: the shared expert's
output, the residual stream and the next layer's norm.

T tokens, H hidden, E experts. Slots whose id names no expert add nothing; their rows are never read. Ids from
E on name constant vectors, where there are any: experts that give the same for every input.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.checks import failure
from moe_runtime.kernels.triton.aot_case import AotCase
from moe_runtime.kernels.triton.arguments import check
from moe_runtime.kernels.triton.tiles import COMBINE_COLUMNS, MAX_NORM_DIM, norm_tiles, power_of_two


@triton.jit
def _summed(
    rows, ids, weights, constants, added, token, columns, inside, hidden, num_experts, num_constants,
    TOP_K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """float32 [COLUMNS]: columns of the sum over the slots of ``token`` (int64), plus ``added``."""
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        expert = tl.load(ids + pair)
        is_expert = (expert >= 0) & (expert < num_experts)
        total += tl.load(rows + pair * hidden + columns, mask=inside & is_expert, other=0.0)
        if constants is not None:
            index = expert - num_experts
            if (index >= 0) & (index < num_constants):
                at = constants + index.to(tl.int64) * hidden + columns
                total += tl.load(weights + pair) * tl.load(at, mask=inside, other=0.0)
    if added is not None:
        total += tl.load(added + token * hidden + columns, mask=inside, other=0.0)
    return total


@triton.jit(do_not_specialize=["num_constants"])
def _combine_kernel(
    rows, ids, weights, constants, added, out, hidden, num_experts, num_constants,
    TOP_K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < hidden
    total = _summed(
        rows, ids, weights, constants, added, token, columns, inside, hidden, num_experts, num_constants,
        TOP_K, COLUMNS,
    )  # fmt: skip
    tl.store(out + token * hidden + columns, total, mask=inside)


@triton.jit(do_not_specialize=["num_constants"])
def _combine_add_norm_kernel(
    rows, ids, weights, constants, added, residual, norm_weight, eps, normed, out, hidden, num_experts,
    num_constants, TOP_K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    inside = columns < hidden
    total = _summed(
        rows, ids, weights, constants, added, token, columns, inside, hidden, num_experts, num_constants,
        TOP_K, COLUMNS,
    )  # fmt: skip
    total += tl.load(residual + token * hidden + columns, mask=inside, other=0.0)
    scale = tl.rsqrt(tl.sum(total * total, 0) / hidden + eps)
    weight = tl.load(norm_weight + columns, mask=inside, other=0.0)
    tl.store(out + token * hidden + columns, total, mask=inside)
    tl.store(normed + token * hidden + columns, total * scale * weight, mask=inside)


def combine(
    rows: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    num_experts: int,
    constants: torch.Tensor | None = None,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """rows [T * top_k, H], ids and weights [T, top_k], constants [C, H], added [T, H] -> [T, H].

    ``rows`` carry their weights; constants get theirs here.
    """
    _check("combine", rows, expert_ids, expert_weights, constants, added)
    (tokens, top_k), hidden = expert_ids.shape, rows.shape[1]
    out = torch.empty(tokens, hidden, device=rows.device)
    if out.numel():
        _combine_kernel[(tokens, triton.cdiv(hidden, COMBINE_COLUMNS))](
            rows, expert_ids, expert_weights, constants, added, out, hidden, num_experts, _count(constants),
            TOP_K=top_k, COLUMNS=COMBINE_COLUMNS,
        )  # fmt: skip
    return out


def combine_add_norm(
    rows: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    num_experts: int,
    residual: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    constants: torch.Tensor | None = None,
    added: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (rms_norm(total, norm_weight [H], eps), total), total being ``combine`` + residual [T, H]."""
    op = "combine_add_norm"
    _check(op, rows, expert_ids, expert_weights, constants, added)
    (tokens, top_k), hidden = expert_ids.shape, rows.shape[1]
    check(op, "residual", residual, (tokens, hidden), rows.device)
    check(op, "norm_weight", norm_weight, (hidden,), rows.device)
    if hidden > MAX_NORM_DIM:
        raise failure(op, "residual", f"at most {MAX_NORM_DIM} wide", hidden)
    normed, out = torch.empty_like(residual), torch.empty_like(residual)
    if out.numel():
        padded = power_of_two(hidden)
        _combine_add_norm_kernel[(tokens,)](
            rows, expert_ids, expert_weights, constants, added, residual, norm_weight, eps, normed, out,
            hidden, num_experts, _count(constants), TOP_K=top_k, COLUMNS=padded,
            num_warps=norm_tiles(padded)[1],
        )  # fmt: skip
    return normed, out


def _count(constants: torch.Tensor | None) -> int:
    return 0 if constants is None else constants.shape[0]


def _check(
    op: str,
    rows: torch.Tensor,
    expert_ids: torch.Tensor,
    expert_weights: torch.Tensor,
    constants: torch.Tensor | None,
    added: torch.Tensor | None,
) -> None:
    (tokens, top_k), hidden, device = expert_ids.shape, rows.shape[1], rows.device
    check(op, "rows", rows, (tokens * top_k, hidden), device)
    check(op, "expert_ids", expert_ids, (tokens, top_k), device, (torch.int32,))
    check(op, "expert_weights", expert_weights, (tokens, top_k), device)
    if constants is not None:
        check(op, "constants", constants, (constants.shape[0], hidden), device)
    if added is not None:
        check(op, "added", added, (tokens, hidden), device)


# --- ahead of time ------------------------------------------------------------------------------------------


def _aot_cases() -> Iterator[AotCase]:
    sizes = {"hidden": "i32", "num_experts": "i32", "num_constants": "i32"}
    constants = {"TOP_K": "constexpr", "COLUMNS": "constexpr"}
    for name, hidden, top_k, extras in (
        ("qwen3_moe", 2048, 8, False),
        ("qwen3_moe, constants", 2048, 8, True),
        ("deepseek_v2", 2048, 6, True),
        ("mixtral", 4096, 2, False),
    ):
        absent = {} if extras else {"constants": None, "added": None}
        optional = "*fp32" if extras else "constexpr"
        pointers = {"rows": "*fp32", "ids": "*i32", "weights": "*fp32"}
        pointers |= {"constants": optional, "added": optional}
        values = {"TOP_K": top_k, "COLUMNS": COMBINE_COLUMNS} | absent
        signature = pointers | {"out": "*fp32"} | sizes | constants
        yield AotCase(name, _combine_kernel, signature, values, 4, 3, _aligned(signature))
        pointers |= {"residual": "*fp32", "norm_weight": "*fp32", "eps": "fp32"}
        signature = pointers | {"normed": "*fp32", "out": "*fp32"} | sizes | constants
        values = {"TOP_K": top_k, "COLUMNS": hidden} | absent
        warps = norm_tiles(hidden)[1]
        yield AotCase(name, _combine_add_norm_kernel, signature, values, warps, 3, _aligned(signature))


def _aligned(signature: dict[str, str]) -> tuple[str, ...]:
    return (*(name for name, kind in signature.items() if kind.startswith("*")), "hidden")


AOT_CASES = tuple(_aot_cases())
