"""Random weights of every format in their device homes, what they are in float64, and bounds on the errors.

A dot product of length K in float32 errs by about sqrt(K) * 2^-24 * sum |w||x|; SAFETY covers the tail and
how matrix units truncate. Activations are rounded to what the weights are multiplied in; the truth starts
from the rounded ones, so that only the hidden rows between two products need a bound for that.
"""

from typing import Any

import pytest
import torch

from moe_runtime.kernels import QuantizedWeight, Weight, WeightFormat
from moe_runtime.kernels.triton.unpack import dequantize
from moe_runtime.kernels.triton.weights import (
    DeviceExperts,
    DeviceMatrix,
    new_matrix,
    write_matrix,
)

PLAIN = tuple(WeightFormat(kind) for kind in ("float32", "bfloat16", "float16"))
INTEGERS = (
    WeightFormat("int8"),
    *(WeightFormat("int4", group, zeros) for group in (32, 64, 128) for zeros in (False, True)),
)
FLOAT8 = (WeightFormat("float8", 128), WeightFormat("float8"))
FORMATS: tuple[WeightFormat, ...] = (*PLAIN, *INTEGERS, *FLOAT8)
BF16 = PLAIN[1]
EPS = 2.0**-24
SAFETY = 8.0
SUBNORMAL = 2.0**-126
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def random_weight(n: int, k: int, form: WeightFormat, seed: int = 0) -> Weight:
    generator = torch.Generator().manual_seed(seed * 7919 + n * k)
    if form.is_plain:
        return (torch.randn(n, k, generator=generator) / k**0.5).to(form.dtype)
    if form.kind == "float8":
        codes = torch.randn(n, k, generator=generator).mul_(40).to(torch.float8_e4m3fn)
        shape = (-(-n // form.rows_per_scale), form.num_groups(k))
        scales = (torch.rand(shape, generator=generator) + 0.1) / (40 * k**0.5)
        return QuantizedWeight(codes, scales, None, form)
    top = 16 if form.kind == "int4" else 256
    codes = torch.randint(int(form.kind == "int8"), top, (n, k), generator=generator, dtype=torch.uint8)
    scales = torch.rand(n, form.num_groups(k), generator=generator) + 0.1
    rows = torch.randint(-3, 3, (n, 1), generator=generator).float().exp2() / 64
    sign = 1 - 2 * torch.randint(0, 2, scales.shape, generator=generator)
    scales = scales.half().float() * rows * (sign if form.kind == "int4" else 1)
    zeros = torch.randint(0, 16, scales.shape, generator=generator, dtype=torch.uint8)
    return QuantizedWeight(codes, scales, zeros if form.zeros else None, form)


def random_matrix(
    count: int, n: int, k: int, form: WeightFormat, device: torch.device, seed: int = 0
) -> DeviceMatrix:
    home = new_matrix(count, n, k, form, device)
    for index in range(count):
        write_matrix("test", "weight", home, index, random_weight(n, k, form, seed + index))
    return home


def random_experts(
    num_experts: int, hidden: int, intermediate: int, form: WeightFormat, device: torch.device, seed: int = 0
) -> DeviceExperts:
    gate_up = random_matrix(2 * num_experts, intermediate, hidden, form, device, seed)
    down = random_matrix(num_experts, hidden, intermediate, form, device, seed + 1000)
    return DeviceExperts(gate_up, down, num_experts, hidden, intermediate, form)


# --- truth and bounds ---------------------------------------------------------------------------------------


def seen(x: torch.Tensor, matrix: DeviceMatrix) -> torch.Tensor:
    """Activations as they are multiplied, float64 on the CPU."""
    return x.cpu().to(matrix.dot_dtype).double()


def dot_bound(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Of x @ weight.T in float32; both float64."""
    k = x.shape[-1]
    flushed = SUBNORMAL * (x.abs().sum(-1, keepdim=True) + weight.abs().sum(-1) + k)
    return SAFETY * (max(k, 1) ** 0.5 + 2) * EPS * (x.abs() @ weight.abs().T) + flushed


def moe_truth_and_bound(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: DeviceExperts
) -> tuple[torch.Tensor, torch.Tensor]:
    """Float64 output without ids that name no expert, and its bound, carried through SiLU (slope <= 1.1)."""
    gate_up, down = dequantize(experts.gate_up), dequantize(experts.down)
    rows, ids, weights = seen(x, experts.gate_up), ids.cpu(), weights.cpu().double()
    truth, bound = torch.zeros(rows.shape).double(), torch.zeros(rows.shape).double()
    for expert in range(experts.num_experts):
        tokens, slots = torch.nonzero(ids == expert, as_tuple=True)
        chosen, gate_weight, up_weight = rows[tokens], gate_up[2 * expert], gate_up[2 * expert + 1]
        gate, up = chosen @ gate_weight.T, chosen @ up_weight.T
        gate_error, up_error = 1.1 * dot_bound(chosen, gate_weight), dot_bound(chosen, up_weight)
        activated = torch.nn.functional.silu(gate)
        h = activated * up
        rounding = 32 * EPS + ROUNDING[experts.gate_up.dot_dtype]
        h_error = gate_error * (up.abs() + up_error) + activated.abs() * up_error + rounding * h.abs()
        error = h_error @ down[expert].abs().T + dot_bound(h.abs() + h_error, down[expert])
        scale, out = weights[tokens, slots].unsqueeze(1), h @ down[expert].T
        truth.index_add_(0, tokens, scale * out)
        bound.index_add_(
            0, tokens, scale.abs() * (error + 32 * EPS * out.abs()) + ids.shape[1] * EPS * out.abs()
        )
    return truth, bound + SUBNORMAL


def random_routing(
    tokens: int, num_experts: int, top_k: int, device: torch.device, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, num_experts, generator=generator)
    weights, ids = scores.topk(top_k, dim=1)
    return ids.int().to(device), weights.contiguous().to(device)


def assert_within(got: torch.Tensor, truth: torch.Tensor, bound: torch.Tensor) -> None:
    assert got.shape == truth.shape and got.dtype is torch.float32
    excess = (got.cpu().double() - truth).abs() - bound
    assert not torch.any(excess > 0) and not torch.any(excess.isnan()), f"off by {excess.max()}"


# --- bits ---------------------------------------------------------------------------------------------------


def exact_values(*shape: int, seed: int = 0) -> torch.Tensor:
    """float32 multiples of 1/16 of at most 4: float64 adds their products with bfloat16 without rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-64, 65, shape, generator=generator).float() / 16


def use_exact_dot(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """In the interpreter ``tl.dot`` adds in an order that numpy chooses by the shape of the tile, which a
    GPU's matrix units do not. Here each step of the loop is rounded once, whatever the tile.
    """
    if device.type != "cpu":
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain = InterpreterBuilder.create_dot

    def dot(self: Any, a: Any, b: Any, start: Any, *options: Any) -> Any:
        zero = TensorHandle(np.zeros_like(start.data, dtype=np.float64), tl.float64)
        step = plain(self, a, b, zero, *options).data.astype(np.float32)
        return TensorHandle(step + start.data, tl.float32)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
