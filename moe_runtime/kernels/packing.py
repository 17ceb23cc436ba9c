"""Weights into panels (csrc/layout.h): allocated once in their final home and written in place."""

from __future__ import annotations

import torch

import moe_runtime._C as _C
from moe_runtime.kernels.checks import check, check_dims, check_layout, failure, weight_tag
from moe_runtime.kernels.packed import PackedExperts, PackedLinear

_HUGE_PAGE = 2 << 20


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


def pack_linear(weight: torch.Tensor) -> PackedLinear:
    check_dims("pack_linear", "weight", weight, 2)
    return pack_linear_heads(weight.unsqueeze(0))


def pack_linear_heads(weight: torch.Tensor) -> PackedLinear:
    check_dims("pack_linear_heads", "weight", weight, 3)
    heads, n, k = weight.shape
    tag = weight_tag("pack_linear_heads", "weight", weight.dtype)
    data = _new_packed(heads, _C.packed_bytes(n, k, tag))
    for head in range(heads):
        source = weight[head].contiguous()
        _C.pack(source.data_ptr(), n, k, tag, 0, data[head].data_ptr())
    return PackedLinear(data, heads, n, k, weight.dtype, "panels")


def new_experts(num_experts: int, hidden: int, intermediate: int, dtype: torch.dtype) -> PackedExperts:
    tag = weight_tag("new_experts", "dtype", dtype)
    gate_up = _new_packed(num_experts, _C.packed_gate_up_bytes(intermediate, hidden, tag))
    down = _new_packed(num_experts, _C.packed_bytes(hidden, intermediate, tag))
    return PackedExperts(gate_up, down, num_experts, hidden, intermediate, dtype, "panels")


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


def pack_expert(experts: PackedExperts, expert_id: int, part: str, weight: torch.Tensor) -> None:
    n, k, target, home = _home(experts, expert_id, part)
    source = weight.contiguous()
    address = check("pack_expert", part, source, (n, k), experts.dtype)
    _C.pack(address, n, k, weight_tag("pack_expert", part, experts.dtype), target, home.data_ptr())


def unpack_linear(packed: PackedLinear) -> torch.Tensor:
    """[N, K], or [heads, N, K] for several heads: the tensor that was packed, bit for bit."""
    n, k, heads = packed.out_features, packed.in_features, packed.heads
    out = torch.empty(heads, n, k, dtype=packed.dtype)
    tag = weight_tag("unpack_linear", "packed", packed.dtype)
    for head in range(heads):
        _C.unpack(packed.data[head].data_ptr(), n, k, tag, 0, out[head].data_ptr())
    return out[0] if heads == 1 else out


def unpack_expert(experts: PackedExperts, expert_id: int, part: str) -> torch.Tensor:
    """gate and up [I, H], down [H, I], bit for bit as they were packed."""
    n, k, target, home = _home(experts, expert_id, part)
    out = torch.empty(n, k, dtype=experts.dtype)
    tag = weight_tag("unpack_expert", "experts", experts.dtype)
    _C.unpack(home.data_ptr(), n, k, tag, target, out.data_ptr())
    return out
