"""float8 weights as published: codes and scales into a device home. The loader, so far, widens them."""

from __future__ import annotations

import torch

from moe_runtime.kernels.checks import failure
from moe_runtime.kernels.triton.weight_bits import SCALE_BLOCK, interleave_bytes
from moe_runtime.kernels.triton.weights import DeviceExperts, DeviceMatrix, Fp8Format, padded_k


def fp8_matrix(codes: torch.Tensor, scales: torch.Tensor, *, device: torch.device) -> DeviceMatrix:
    """codes float8_e4m3fn [B, N, K]; scales float32 [B, N / 128, K / 128], rounded up, or [B, N].

    value[n, k] = scale * code. Codes must be finite: NaN would read as 480.
    """
    op = "fp8_matrix"
    if codes.dtype is not torch.float8_e4m3fn or codes.dim() != 3:
        raise failure(op, "codes", "float8_e4m3fn [B, N, K]", f"{codes.dtype} {list(codes.shape)}")
    count, n, k = codes.shape
    blocks = (count, -(-n // SCALE_BLOCK), -(-k // SCALE_BLOCK))
    if scales.dtype is not torch.float32 or tuple(scales.shape) not in (blocks, (count, n)):
        expected = f"float32 {list(blocks)} or {[count, n]}"
        raise failure(op, "scales", expected, f"{scales.dtype} {list(scales.shape)}")
    form = Fp8Format(blocks=scales.dim() == 3)
    padded = padded_k(form.kind, k)
    data = torch.zeros(count, n, padded, dtype=torch.uint8, device=device)
    for index in range(count):  # as bytes: not every operation knows float8
        piece = codes[index].view(torch.uint8).to(device)
        data[index] = interleave_bytes(torch.nn.functional.pad(piece, (0, padded - k)))
    home = scales.to(device, copy=True)
    block_scales, row_scales = (home, None) if form.blocks else (None, home)
    return DeviceMatrix(data.view(torch.float8_e4m3fn), block_scales, row_scales, None, form, n, k, count)


def fp8_experts(gate_up: DeviceMatrix, down: DeviceMatrix) -> DeviceExperts:
    """gate_up: 2 E matrices [I, H], gate and up of each expert by turns; down: E matrices [H, I]."""
    shape = (2 * down.count, down.in_features, down.out_features, down.format)
    if (gate_up.count, gate_up.out_features, gate_up.in_features, gate_up.format) != shape:
        raise failure("fp8_experts", "gate_up", f"{shape}", "another shape or format")
    return DeviceExperts(gate_up, down, down.count, down.out_features, down.in_features, down.format)
