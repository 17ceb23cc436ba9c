"""Random weights of any format, made on the device, and the numbers they stand for.

Their bits are drawn where they lie: packing a real checkpoint's matrices one by one would take minutes here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_runtime.kernels.packed import WeightFormat
from moe_runtime.kernels.triton.unpack import dequantize
from moe_runtime.kernels.triton.weights import DeviceExperts, DeviceLinear, DeviceMatrix, new_matrix

FORMATS = {
    "bf16": WeightFormat("bfloat16"),
    "int4": WeightFormat("int4", 128),
    "fp8": WeightFormat("float8", 128),
}
Experts = DeviceExperts


def random_matrix(count: int, n: int, k: int, name: str, device: torch.device) -> DeviceMatrix:
    """``count`` matrices [N, K] whose products with ordinary rows are ordinary numbers."""
    home = new_matrix(count, n, k, FORMATS[name], device)
    if name == "bf16":
        home.data.normal_(std=k**-0.5)
        return home
    assert home.scales is not None, "both formats of codes have them"
    if name == "fp8":
        for matrix in home.data:
            matrix.copy_(torch.randn(n, matrix.shape[1], device=device).to(torch.float8_e4m3fn))
        scales = torch.rand_like(home.scales).add_(0.5).half().float()
        home.scales.copy_(torch.ldexp(scales, _exponent(k, device)))
        return home
    assert home.row_scales is not None, "int4 has them"
    home.data.random_(0, 256)
    home.scales.uniform_(0.1, 0.3)
    home.row_scales.copy_(torch.ldexp(torch.ones_like(home.row_scales), _exponent(k, device)))
    return home


def _exponent(k: int, device: torch.device) -> torch.Tensor:
    """About 1 / sqrt(K), as a power of two, so that scales have few bits and their products are exact."""
    return torch.tensor(-(k.bit_length() // 2), device=device)


def random_experts(
    num_experts: int, hidden: int, intermediate: int, name: str, device: torch.device
) -> DeviceExperts:
    gate_up = random_matrix(2 * num_experts, intermediate, hidden, name, device)
    down = random_matrix(num_experts, hidden, intermediate, name, device)
    return DeviceExperts(gate_up, down, num_experts, hidden, intermediate, FORMATS[name])


def random_linear(n: int, k: int, name: str, device: torch.device) -> DeviceLinear:
    return DeviceLinear(random_matrix(1, n, k, name, device))


def copy_of(experts: DeviceExperts) -> DeviceExperts:
    """The same numbers at other addresses."""
    return replace(experts, gate_up=_cloned(experts.gate_up), down=_cloned(experts.down))


def _cloned(matrix: DeviceMatrix) -> DeviceMatrix:
    def clone(part: torch.Tensor | None) -> torch.Tensor | None:
        return None if part is None else part.clone()

    return replace(
        matrix,
        data=matrix.data.clone(),
        scales=clone(matrix.scales),
        row_scales=clone(matrix.row_scales),
        zeros=clone(matrix.zeros),
    )


def numbers(matrix: DeviceMatrix, index: int) -> torch.Tensor:
    """What one matrix stands for, float32 [N, K] on its device."""

    def one(part: torch.Tensor | None) -> torch.Tensor | None:
        return None if part is None else part[index : index + 1]

    single = replace(
        matrix,
        data=matrix.data[index : index + 1],
        scales=one(matrix.scales),
        row_scales=one(matrix.row_scales),
        zeros=one(matrix.zeros),
        count=1,
    )
    return dequantize(single)[0].float().to(matrix.data.device)


class ReferenceRows:
    """Experts as kernels/reference.py reads them, each widened when it is first asked for."""

    def __init__(self, experts: DeviceExperts) -> None:
        self.num_experts, self.hidden, self.intermediate = (
            experts.num_experts,
            experts.hidden,
            experts.intermediate,
        )
        self.gate_up = _Widened(experts.gate_up, 2)
        self.down = _Widened(experts.down, 1)


class _Widened:
    def __init__(self, matrix: DeviceMatrix, per_expert: int) -> None:
        self._matrix, self._per_expert = matrix, per_expert
        self._kept: dict[int, torch.Tensor] = {}

    def __getitem__(self, expert: int) -> torch.Tensor:
        if expert not in self._kept:
            first = expert * self._per_expert
            parts = [numbers(self._matrix, first + place) for place in range(self._per_expert)]
            self._kept[expert] = torch.stack(parts) if self._per_expert > 1 else parts[0]
        return self._kept[expert]


def reference_rows(experts: DeviceExperts) -> Any:
    return ReferenceRows(experts)
