"""Weights out of their homes on a device, bit for bit as they were packed: for tests, and for who audits."""

from __future__ import annotations

import torch

from moe_runtime.errors import KernelError
from moe_runtime.kernels.packed import QuantizedWeight, Weight
from moe_runtime.kernels.triton.weight_bits import interleave_bytes, unpack_nibbles
from moe_runtime.kernels.triton.weights import (
    DeviceExperts,
    DeviceLinear,
    DeviceMatrix,
    Fp8Format,
    expert_home,
    is_plain,
)


def unpack_linear(packed: DeviceLinear, head: int = 0) -> Weight:
    return unpack_matrix(packed.matrix, head)


def unpack_expert(experts: DeviceExperts, expert_id: int, part: str) -> Weight:
    """gate and up [I, H], down [H, I]."""
    home, index = expert_home("unpack_expert", experts, expert_id, part)
    return unpack_matrix(home, index)


def unpack_matrix(home: DeviceMatrix, index: int) -> Weight:
    """[N, K] on the CPU. KernelError for float8, whose scales no Weight holds: see ``dequantize``."""
    data, form = home.data[index].cpu(), home.format
    if is_plain(form):
        return data[:, : home.in_features].contiguous()
    if isinstance(form, Fp8Format):
        raise KernelError(f"unpack: {form} has no form as one weight")
    assert home.row_scales is not None, "every home of integers has them"
    row_scales = home.row_scales[index].cpu()[:, None]
    if home.scales is None:
        codes = (interleave_bytes(data).view(torch.uint8) ^ 128)[:, : home.in_features].contiguous()
        return QuantizedWeight(codes, row_scales, None, form)
    groups = form.num_groups(home.in_features)
    scales = home.scales[index, :groups].cpu().T.float() * row_scales
    zeros = None if home.zeros is None else home.zeros[index, :groups].cpu().T.contiguous()
    codes = unpack_nibbles(data)[:, : home.in_features].contiguous()
    return QuantizedWeight(codes, scales.contiguous(), zeros, form)


def dequantize(home: DeviceMatrix) -> torch.Tensor:
    """float64 [B, N, K] on the CPU: what the kernels multiply by, exactly."""
    if not isinstance(home.format, Fp8Format):
        weights = [unpack_matrix(home, index) for index in range(home.count)]
        wide = [w.dequantize() if isinstance(w, QuantizedWeight) else w for w in weights]
        return torch.stack(wide).double()
    count, n, k = home.count, home.out_features, home.in_features
    codes = interleave_bytes(home.data.cpu().flatten(0, 1)).view(count, n, -1)[..., :k].double()
    if home.scales is None:
        assert home.row_scales is not None, "float8 has one or the other"
        return codes * home.row_scales.cpu().double()[..., None]
    block = home.format.group
    scales = home.scales.cpu().double().repeat_interleave(block, 1)[:, :n].repeat_interleave(block, 2)
    return codes * scales[..., :k]
