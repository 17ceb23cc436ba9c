"""Norms, SwiGLU and rotary positions against float64."""

import pytest
import torch
from kernels.oracle import EPS, SAFETY, assert_within

from moe_runtime.errors import KernelError
from moe_runtime.kernels import cpu, reference

DIMS = (1, 7, 16, 31, 32, 33, 80, 192, 2048)


@pytest.mark.parametrize("dim", DIMS)
def test_rms_norm_is_within_the_error_bound(isa: str, dim: int) -> None:
    torch.manual_seed(dim)
    for shape in ((0, dim), (1, dim), (50, dim), (3, 5, dim)):
        x, residual, weight = torch.randn(shape), torch.randn(shape), torch.randn(dim)
        truth = reference.rms_norm(x.double(), weight.double(), 1e-6)
        assert_within(cpu.rms_norm(x, weight, 1e-6), truth, SAFETY * (dim**0.5 + 4) * EPS * truth.abs())
        normed, total = cpu.add_rms_norm(x, residual, weight, 1e-6)
        assert torch.equal(total, x + residual)
        assert torch.equal(normed, cpu.rms_norm(total, weight, 1e-6))


def test_a_row_is_normed_the_same_alone_and_in_any_company(isa: str, threads: None) -> None:
    x, weight = torch.randn(400, 200), torch.randn(200)
    whole = cpu.rms_norm(x, weight, 1e-5)
    cpu.set_num_threads(5)
    assert torch.equal(whole, cpu.rms_norm(x, weight, 1e-5))
    assert torch.equal(whole[37], cpu.rms_norm(x[37].clone(), weight, 1e-5))


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 4096, 5000, 100_000])
def test_silu_mul_is_within_the_error_bound(isa: str, count: int) -> None:
    torch.manual_seed(count)
    gate, up = torch.randn(count) * 20, torch.randn(count)
    truth = reference.silu_mul(gate.double(), up.double())
    assert_within(cpu.silu_mul(gate, up), truth, 16 * EPS * truth.abs() + 1e-36)


def test_silu_mul_at_the_ends_of_the_range(isa: str) -> None:
    gate = torch.tensor(
        [-torch.inf, -3e38, -100.0, -88.5, -0.0, 0.0, 88.5, 100.0, 3e38, torch.inf, torch.nan]
    )
    got, expected = cpu.silu_mul(gate, torch.ones(11)), torch.nn.functional.silu(gate)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-35, equal_nan=True)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("dim", "half", "offset"), [(64, 32, 0), (64, 16, 0), (64, 16, 32), (7, 1, 5), (192, 32, 128)]
)
def test_rope_rotates_its_dims_and_leaves_the_rest(
    interleaved: bool, dim: int, half: int, offset: int
) -> None:
    torch.manual_seed(half)
    angles = torch.rand(50, half) * 6
    cos, sin = angles.cos(), angles.sin()
    for tokens in (0, 1, 33, 600):
        x, positions = torch.randn(tokens, 3, dim), torch.randint(0, 50, (tokens,), dtype=torch.int32)
        truth = reference.rope(x.double(), cos, sin, positions, interleaved, offset)
        got = cpu.rope(x, cos, sin, positions, interleaved, offset)
        assert got is x
        assert_within(got, truth, torch.full_like(truth, 8 * EPS * 6))


def test_rope_of_a_position_out_of_range_is_refused() -> None:
    cos, positions = torch.zeros(10, 2), torch.tensor([3, 10], dtype=torch.int32)
    with pytest.raises(KernelError, match=r"rope: positions\[1\] = 10, expected 0 <= position < 10"):
        cpu.rope(torch.zeros(2, 1, 4), cos, cos, positions, False)
    with pytest.raises(KernelError, match=r"rope: offset is 1"):
        cpu.rope(torch.zeros(2, 1, 4), cos, cos, positions, False, 1)
