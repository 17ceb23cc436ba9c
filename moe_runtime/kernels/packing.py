"""Weights into panels (csrc/layout.h): allocated once in their final home and written in place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import moe_runtime._C as _C
from moe_runtime.kernels.checks import check, check_codes, check_dims, check_layout, failure
from moe_runtime.kernels.packed import PackedExperts, PackedLinear, QuantizedWeight, Weight, WeightFormat

_HUGE_PAGE = 2 << 20


def _format(weight: Weight) -> WeightFormat:
    return weight.format if isinstance(weight, QuantizedWeight) else WeightFormat.of(weight.dtype)


def _new_packed(count: int, num_bytes: int) -> torch.Tensor:
    """uint8 [count, num_bytes] at a cache line, and on huge pages where the kernel grants them.

    A page table walk per 4 KB would cost a streaming kernel a tenth of its bandwidth.
    """
    total = count * num_bytes
    alignment = _HUGE_PAGE if total >= 2 * _HUGE_PAGE else 64
    room = torch.empty(total + alignment, dtype=torch.uint8)
    start = -room.data_ptr() % alignment
    _C.advise_huge_pages(room.data_ptr() + start, total)
    return room[start : start + total].view(count, num_bytes)


def _pack(op: str, weight: Weight, n: int, k: int, target: int, home: torch.Tensor) -> None:
    """One matrix [N, K] into its place; its format has been checked."""
    tag, address = _format(weight).tag, home.data_ptr()
    if isinstance(weight, QuantizedWeight):
        codes, scales, zeros = check_codes(op, "weight", weight, (n, k))
        _C.pack_integer(codes, scales, zeros, n, k, tag, target, address)
    else:
        source = weight.contiguous()
        _C.pack(check(op, "weight", source, (n, k), weight.dtype), n, k, tag, target, address)


def pack_linear(weight: Weight) -> PackedLinear:
    if len(weight.shape) != 2:
        raise failure("pack_linear", "weight", "a matrix", list(weight.shape))
    return pack_linear_heads([weight])


def pack_linear_heads(weights: torch.Tensor | Sequence[Weight]) -> PackedLinear:
    op = "pack_linear_heads"
    if isinstance(weights, torch.Tensor):
        check_dims(op, "weights", weights, 3)
    (n, k), weight_format = weights[0].shape, _format(weights[0])
    if not n or not k:
        raise failure(op, "weights[0]", "a matrix with rows and columns", [n, k])
    data = _new_packed(len(weights), _C.packed_bytes(n, k, weight_format.tag))
    for head, weight in enumerate(weights):
        if _format(weight) != weight_format:
            raise failure(op, f"weights[{head}]", str(weight_format), _format(weight))
        _pack(op, weight, n, k, 0, data[head])
    return PackedLinear(data, len(weights), n, k, weight_format, "panels")


def new_experts(
    num_experts: int, hidden: int, intermediate: int, weight_format: torch.dtype | WeightFormat
) -> PackedExperts:
    weight_format = WeightFormat.of(weight_format)
    gate_up = _new_packed(num_experts, _C.packed_gate_up_bytes(intermediate, hidden, weight_format.tag))
    down = _new_packed(num_experts, _C.packed_bytes(hidden, intermediate, weight_format.tag))
    return PackedExperts(gate_up, down, num_experts, hidden, intermediate, weight_format, "panels")


def _home(experts: PackedExperts, expert_id: int, part: str) -> tuple[int, int, int, torch.Tensor]:
    """N, K, csrc's PackTarget and the bytes of one matrix of one expert."""
    op = "pack_expert"
    check_layout(op, experts.layout)
    if not 0 <= expert_id < experts.num_experts:
        raise failure(op, "expert_id", f"0 <= id < {experts.num_experts}", expert_id)
    if part == "down":
        return experts.hidden, experts.intermediate, 0, experts.down[expert_id]
    if part not in ("gate", "up"):
        raise failure(op, "part", "'gate', 'up' or 'down'", repr(part))
    target = 2 if part == "up" else 1
    return experts.intermediate, experts.hidden, target, experts.gate_up[expert_id]


def pack_expert(experts: PackedExperts, expert_id: int, part: str, weight: Weight) -> None:
    n, k, target, home = _home(experts, expert_id, part)
    if weight.shape != (n, k) or _format(weight) != experts.format:
        got = f"{_format(weight)} {list(weight.shape)}"
        raise failure("pack_expert", part, f"{experts.format} {[n, k]}", got)
    _pack("pack_expert", weight, n, k, target, home)


def _unpack(n: int, k: int, weight_format: WeightFormat, target: int, home: torch.Tensor) -> Weight:
    if not weight_format.is_integer:
        out = torch.empty(n, k, dtype=weight_format.dtype)
        _C.unpack(home.data_ptr(), n, k, weight_format.tag, target, out.data_ptr())
        return out
    codes, scales = torch.empty(n, k, dtype=torch.uint8), torch.empty(n, weight_format.num_groups(k))
    zeros = torch.empty(scales.shape, dtype=torch.uint8) if weight_format.zeros else None
    zeros_at = 0 if zeros is None else zeros.data_ptr()
    _C.unpack_integer(
        home.data_ptr(), n, k, weight_format.tag, target, codes.data_ptr(), scales.data_ptr(), zeros_at
    )
    return QuantizedWeight(codes, scales, zeros, weight_format)


def unpack_linear(packed: PackedLinear, head: int = 0) -> Weight:
    """[N, K]: the matrix that was packed, bit for bit."""
    return _unpack(packed.out_features, packed.in_features, packed.format, 0, packed.data[head])


def unpack_expert(experts: PackedExperts, expert_id: int, part: str) -> Weight:
    """gate and up [I, H], down [H, I], bit for bit as they were packed."""
    n, k, target, home = _home(experts, expert_id, part)
    return _unpack(n, k, experts.format, target, home)
