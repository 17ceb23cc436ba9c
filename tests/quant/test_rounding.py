"""Rounding to int8 and int4: nearest codes, good scales, and exactly what the kernels can hold."""

import math

import pytest
import torch

from moe_runtime.kernels import QuantizedWeight, WeightFormat
from moe_runtime.kernels.packing import pack_linear, unpack_linear
from moe_runtime.quant.rounding import quantize, round_scales

FORMATS = [
    WeightFormat("int8"),
    *(WeightFormat("int4", group, zeros) for group in (32, 64, 128) for zeros in (False, True)),
]
SHAPES = [(1, 1), (3, 31), (5, 32), (16, 129), (33, 200), (64, 256)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(weight: torch.Tensor, quantized: QuantizedWeight) -> float:
    difference = quantized.dequantize().double() - weight.double()
    return float(difference.norm() / weight.double().norm())


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_code_is_the_nearest_and_packs_unchanged(
    weight_format: WeightFormat, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = (0.02 * normal(*shape)).to(dtype)
    quantized = quantize(weight, weight_format)
    group = weight_format.group or shape[1]
    scales = quantized.scales.double().repeat_interleave(group, 1)[:, : shape[1]]
    zero = torch.full_like(quantized.scales, 8 if weight_format.group else 128)
    zeros = zero if quantized.zeros is None else quantized.zeros
    zeros = zeros.double().repeat_interleave(group, 1)[:, : shape[1]]
    low, high = (0, 15) if weight_format.group else (1, 255)
    wanted = (weight.double() / torch.where(scales == 0, math.inf, scales) + zeros).clamp(low, high)
    # Half a step, and the rounding of float32.
    assert float((quantized.codes.double() - wanted).abs().max()) <= 0.5 + 1e-4
    unpacked = unpack_linear(pack_linear(quantized))
    assert isinstance(unpacked, QuantizedWeight)
    assert torch.equal(unpacked.dequantize(), quantized.dequantize())


@pytest.mark.parametrize(
    ("weight_format", "bound"),
    [
        (WeightFormat("int8"), 0.0092),  # largest of 2048 normals is 3.5 sigma: 3.5 / 127 / sqrt(12) = 0.008
        (WeightFormat("int4", 128), 0.1),  # the best fixed uniform quantiser of 16 levels has 0.1074
        (WeightFormat("int4", 32), 0.084),
        (WeightFormat("int4", 128, zeros=True), 0.098),
        (WeightFormat("int4", 32, zeros=True), 0.081),
    ],
    ids=str,
)
def test_normal_weights_lose_as_little_as_the_format_allows(
    weight_format: WeightFormat, bound: float
) -> None:
    weight = normal(64, 2048)
    assert relative_error(weight, quantize(weight, weight_format)) <= bound


@pytest.mark.parametrize("weight_format", FORMATS[1:], ids=str)
def test_the_search_beats_the_plain_range(weight_format: WeightFormat) -> None:
    """Rounding to the range of each group is what a quantiser without a search does."""
    weight = normal(32, 512)
    grouped = weight.view(32, -1, weight_format.group)
    if weight_format.zeros:
        low, high = grouped.aminmax(dim=-1, keepdim=True)
        scale, low_code, high_code = (high - low) / 15, (low / (high - low) * 15).round(), None
        high_code = low_code + 15
    else:
        scale = grouped.abs().amax(-1, keepdim=True) / 7
        low_code, high_code = torch.tensor(-8.0), torch.tensor(7.0)
    plain = (grouped / scale).round().clamp(low_code, high_code) * scale
    plain_error = float((plain - grouped).norm() / grouped.norm())
    assert relative_error(weight, quantize(weight, weight_format)) < 0.97 * plain_error


def test_importance_moves_the_error_to_columns_that_matter_less() -> None:
    weight = normal(64, 256)
    importance = torch.logspace(-2, 2, 256)[torch.randperm(256, generator=torch.Generator().manual_seed(1))]
    for weight_format in FORMATS[1:]:
        losses = [
            (importance * (quantize(weight, weight_format, given).dequantize() - weight) ** 2).sum()
            for given in (None, importance)
        ]
        assert losses[1] < 0.9 * losses[0]


@pytest.mark.parametrize("weight_format", FORMATS, ids=str)
def test_zeros_constants_and_extremes_survive(weight_format: WeightFormat) -> None:
    zero = torch.zeros(3, 70)
    assert torch.equal(quantize(zero, weight_format).dequantize(), zero)
    constant = torch.full((2, 128), -3.0)
    assert relative_error(constant, quantize(constant, weight_format)) <= 2**-10
    sizes = torch.tensor([[1e-37], [1e-20], [1.0], [1e20], [1e38]])
    weight = normal(5, 128).clamp(-3, 3) * sizes
    quantized = quantize(weight, weight_format)
    assert bool(quantized.dequantize().isfinite().all())
    for row in range(5):
        assert relative_error(weight[row], QuantizedWeight(*_row(quantized, row), weight_format)) <= 0.15


def _row(quantized: QuantizedWeight, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    rows = slice(row, row + 1)
    zeros = None if quantized.zeros is None else quantized.zeros[rows]
    return quantized.codes[rows], quantized.scales[rows], zeros


def test_rows_do_not_depend_on_each_other() -> None:
    weight = normal(700, 1024)
    for weight_format in FORMATS:
        whole = quantize(weight, weight_format).dequantize()
        parts = [quantize(part, weight_format).dequantize() for part in weight.split(123)]
        assert torch.equal(whole, torch.cat(parts))


def test_rounded_scales_are_a_float16_times_a_power_of_two() -> None:
    scales = normal(50, 9).abs() * torch.logspace(-30, 30, 50).unsqueeze(1)
    rounded = round_scales(scales)
    assert torch.equal(round_scales(rounded), rounded)
    # 11 bits of precision; a scale far below its row's largest counts absolutely.
    largest = scales.amax(1, keepdim=True)
    assert bool(((rounded - scales).abs() <= 2**-11 * scales + 2**-25 * largest).all())
