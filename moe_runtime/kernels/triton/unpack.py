"""Weights out of their homes on a device, bit for bit as they were packed: for tests, and for who audits."""

from __future__ import annotations

import torch

from moe_runtime.errors import KernelError
from moe_runtime.kernels.packed import QuantizedWeight, Weight
from moe_runtime.kernels.triton.weight_bits import interleave_bytes, unpack_nibbles
from moe_runtime.kernels.triton.weights import DeviceExperts, DeviceLinear, DeviceMatrix, expert_home


def unpack_linear(packed: DeviceLinear, head: int = 0) -> Weight:
    return unpack_matrix(packed.matrix, head)


def unpack_expert(experts: DeviceExperts, expert_id: int, part: str) -> Weight:
    """gate and up [I, H], down [H, I]."""
    home, index = expert_home("unpack_expert", experts, expert_id, part)
    return unpack_matrix(home, index)


def unpack_matrix(home: DeviceMatrix, index: int) -> Weight:
    """[N, K] on the CPU."""
    data, form = home.data[index].cpu(), home.format
    if form.is_plain:
        return data[:, : home.in_features].contiguous()
    if form.kind in ("int8", "float8"):
        codes = interleave_bytes(data.view(torch.uint8))[:, : home.in_features].contiguous()
        codes = codes ^ 128 if form.kind == "int8" else codes.view(torch.float8_e4m3fn)
        scales = _part_of(home.row_scales, index).unsqueeze(1) if home.scales is None else home.scales[index]
        return QuantizedWeight(codes, scales.cpu(), None, form)
    row_scales = _part_of(home.row_scales, index).cpu()[:, None]
    groups = form.num_groups(home.in_features)
    scales = _part_of(home.scales, index)[:groups].cpu().T.float() * row_scales
    zeros = None if home.zeros is None else home.zeros[index, :groups].cpu().T.contiguous()
    codes = unpack_nibbles(data)[:, : home.in_features].contiguous()
    return QuantizedWeight(codes, scales.contiguous(), zeros, form)


def _part_of(scales: torch.Tensor | None, index: int) -> torch.Tensor:
    """A matrix's part of what its format always has."""
    if scales is None:
        raise KernelError("weights in integers or float8 without their scales")
    return scales[index]


def dequantize(home: DeviceMatrix) -> torch.Tensor:
    """float64 [B, N, K] on the CPU: what the kernels multiply by, rounded to float32."""
    weights = [unpack_matrix(home, index) for index in range(home.count)]
    return torch.stack([w.dequantize() if isinstance(w, QuantizedWeight) else w for w in weights]).double()
