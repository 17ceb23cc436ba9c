"""Arithmetic that every kernel relies on is the same in the interpreter, once repaired, as on a GPU."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

SIZE = 16
TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.int8: tl.int8,
    torch.int32: tl.int32,
}
AWKWARD = (
    0.0, -0.0, 1.0, 1.005, 1.00390625, -1.998, 3.0, 255.9, -17.06, 1e-39, 1.2e-38, 2.0**-10, 400.0, -448.0,
    0.3, 7.99,
)  # fmt: skip
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn)


@triton.jit
def cast_kernel(source, target, TYPE: tl.constexpr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(target + offsets, tl.load(source + offsets).to(TYPE))


@triton.jit
def arithmetic_kernel(a, b, out, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x, y = tl.load(a + offsets), tl.load(b + offsets)
    tl.store(out + offsets, x * y + x)
    tl.store(out + SIZE + offsets, tl.where(x > y, x, y))


@triton.jit
def dot_kernel(a, b, out, SIZE: tl.constexpr):
    rows, columns = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    x, y = tl.load(a + rows * SIZE + columns), tl.load(b + rows * SIZE + columns)
    tl.store(out + rows * SIZE + columns, tl.dot(x, y, input_precision="ieee"))


@triton.jit
def maximum_kernel(a, out, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    x = tl.load(a + offsets)
    tl.store(out + offsets, tl.maximum(x, 1.0))
    tl.store(out + SIZE, tl.max(x, 0))


def cast(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    result = torch.empty_like(values, dtype=dtype)
    cast_kernel[(1,)](values, result, TYPES[dtype], values.numel())
    return result


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(got.float().nan_to_num(nan=1e30), expected.float().nan_to_num(nan=1e30))


@pytest.mark.parametrize("target", FLOATS, ids=str)
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_casts_between_floats_round_to_nearest_even(
    device: torch.device, source: torch.dtype, target: torch.dtype
) -> None:
    if torch.float8_e4m3fn in (source, target) and not can_float8(device):
        pytest.skip("this GPU has no float8")
    values = torch.tensor(AWKWARD).to(source).to(device)
    assert same(cast(values, target), values.float().to(target))


def can_float8(device: torch.device) -> bool:
    return (
        device.type == "cpu" or torch.version.hip is not None or torch.cuda.get_device_capability() >= (8, 9)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_nan_and_infinity_survive_a_cast(device: torch.device, dtype: torch.dtype) -> None:
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38] * 4, device=device)
    assert same(cast(special, dtype), special.to(dtype))


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize("source", [torch.int8, torch.int32], ids=str)
def test_integers_become_the_same_numbers(
    device: torch.device, source: torch.dtype, dtype: torch.dtype
) -> None:
    values = torch.arange(-8, 8, device=device, dtype=source)
    assert same(cast(values, dtype), values.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_arithmetic_is_that_of_the_numbers(device: torch.device, dtype: torch.dtype) -> None:
    a = torch.tensor([1.0, -2.0, 3.0, 0.5] * 4).to(dtype).to(device)
    b = torch.tensor([2.0, 2.0, -1.5, 8.0] * 4).to(dtype).to(device)
    out = torch.empty(2 * SIZE, device=device, dtype=dtype)
    arithmetic_kernel[(1,)](a, b, out, SIZE)
    assert torch.equal(out, torch.cat([a * b + a, torch.maximum(a, b)]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dot_multiplies_the_numbers_and_adds_in_float32(device: torch.device, dtype: torch.dtype) -> None:
    if dtype is torch.float8_e4m3fn and device.type == "cuda":
        pytest.skip("a GPU's float8 dot wants deeper tiles than this test's")
    torch.manual_seed(0)
    a, b = torch.randn(2, SIZE, SIZE).to(dtype).to(device)
    out = torch.empty(SIZE, SIZE, device=device)
    dot_kernel[(1,)](a, b, out, SIZE)
    truth, most = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    assert torch.all((out - truth).abs() <= 2.0**-20 * most)


def test_the_larger_of_nan_and_a_number_is_the_number(device: torch.device) -> None:
    for values in ([torch.nan] * SIZE, [torch.nan, 5.0] * (SIZE // 2)):
        a, out = torch.tensor(values, device=device), torch.empty(SIZE + 1, device=device)
        maximum_kernel[(1,)](a, out, SIZE)
        expected = [5.0 if value == 5.0 else 1.0 for value in values]
        assert out[:SIZE].tolist() == expected
        assert out[SIZE].isnan() if 5.0 not in values else out[SIZE] == 5.0
