"""Norms in Triton against float64."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from kernels.oracle import EPS, SAFETY, assert_within  # noqa: E402

from moe_runtime.errors import KernelError  # noqa: E402
from moe_runtime.kernels import reference  # noqa: E402
from moe_runtime.kernels.triton.norm import add_rms_norm, rms_norm  # noqa: E402

DIMS = (1, 7, 16, 31, 32, 33, 80, 192, 2048)


@pytest.mark.parametrize("dim", DIMS)
def test_rms_norm_is_within_the_error_bound(device: torch.device, dim: int) -> None:
    torch.manual_seed(dim)
    for shape in ((0, dim), (1, dim), (17, dim), (3, 5, dim)):
        x, residual, weight = torch.randn(shape), torch.randn(shape), torch.randn(dim)
        truth = reference.rms_norm(x.double(), weight.double(), 1e-6)
        got = rms_norm(x.to(device), weight.to(device), 1e-6)
        assert_within(got.cpu(), truth, SAFETY * (dim**0.5 + 4) * EPS * truth.abs())
        normed, total = add_rms_norm(x.to(device), residual.to(device), weight.to(device), 1e-6)
        assert torch.equal(total.cpu(), x + residual)
        assert torch.equal(normed, rms_norm(total, weight.to(device), 1e-6))


@pytest.mark.parametrize("dim", [20, 128, 1500])
def test_a_row_is_normed_the_same_alone_and_beside_rows_of_nan(device: torch.device, dim: int) -> None:
    torch.manual_seed(dim)
    x, weight = torch.randn(19, dim, device=device), torch.randn(dim, device=device)
    x[::3], x[1::3, 4] = torch.nan, torch.inf
    whole = rms_norm(x, weight, 1e-5)
    assert whole[2::3].isfinite().all() and whole[::3].isnan().all()
    for row in (2, 11, 17):
        assert torch.equal(whole[row], rms_norm(x[row].clone(), weight, 1e-5))


def test_very_large_and_very_small_numbers_are_normed_as_in_float32(device: torch.device) -> None:
    x = torch.stack([torch.full((8,), value) for value in (3e38, 1e-42, 0.0, 1e-3, 1e18)])
    got = rms_norm(x.to(device), torch.ones(8, device=device), 1e-6).cpu()
    torch.testing.assert_close(got, reference.rms_norm(x, torch.ones(8), 1e-6), rtol=1e-6, atol=1e-38)


def test_wrong_shapes_and_dtypes_are_refused(device: torch.device) -> None:
    x, weight = torch.zeros(2, 8, device=device), torch.zeros(8, device=device)
    with pytest.raises(KernelError, match=r"rms_norm: weight is torch.float32 \[7\], expected"):
        rms_norm(x, weight[:7], 1e-6)
    with pytest.raises(KernelError, match="rms_norm: x is torch.bfloat16"):
        rms_norm(x.bfloat16(), weight, 1e-6)
    with pytest.raises(KernelError, match="rms_norm: x is on .* with strides"):
        rms_norm(x.expand(3, 2, 8), weight, 1e-6)
    with pytest.raises(KernelError, match=r"add_rms_norm: residual is torch.float32 \[1, 8\]"):
        add_rms_norm(x, x[:1], weight, 1e-6)
    with pytest.raises(KernelError, match=r"rms_norm: x is \[2, 0\], expected rows of 1 to 65536"):
        rms_norm(x[:, :0], weight[:0], 1e-6)
