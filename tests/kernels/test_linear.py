"""Dense linear layers: float64 truth, layout, and rows that do not depend on their neighbours."""

import pytest
import torch
from kernels.oracle import DTYPES, EPS, assert_within, dot_bound

from moe_runtime.errors import KernelError
from moe_runtime.kernels import cpu, packing

TOKENS = (0, 1, 2, 15, 16, 17, 31, 32, 33, 47, 97, 200)
SHAPES = ((1, 1), (16, 32), (32, 33), (48, 7), (80, 192), (192, 80), (130, 100), (257, 2048))  # N, K


def weight_of(n: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(n, k, generator=torch.Generator().manual_seed(n * k)) / k**0.5).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_shape_is_within_the_error_bound(isa: str, dtype: torch.dtype, n: int, k: int) -> None:
    torch.manual_seed(0)
    weight, bias = weight_of(n, k, dtype), torch.randn(n)
    packed = packing.pack_linear(weight)
    for tokens in TOKENS:
        x = torch.randn(tokens, k)
        truth = x.double() @ weight.double().T + bias.double()
        bound = dot_bound(x.double(), weight.double(), isa, dtype) + 2 * EPS * (truth.abs() + bias.abs())
        assert_within(cpu.linear(x, packed, bias), truth, bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_packing_moves_every_bit_and_pads_with_zeros(dtype: torch.dtype, n: int, k: int) -> None:
    """csrc/layout.h written a second time, in torch: [panel][group][tile][column][k of group]."""
    weight = weight_of(n, k, dtype)
    group = 2 if dtype is torch.bfloat16 else 1
    padded = torch.zeros(-(-n // 32) * 32, -(-k // 32) * 32, dtype=dtype)
    padded[:n, :k] = weight
    panels = padded.view(-1, 2, 16, padded.shape[1] // group, group).permute(0, 3, 1, 2, 4)
    packed = packing.pack_linear(weight)
    assert torch.equal(packed.data.view(dtype).flatten(), panels.flatten())
    assert torch.equal(packing.unpack_linear(packed), weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_bits_alone_and_in_any_company(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    n, k = 200, 1200
    packed, x = packing.pack_linear(weight_of(n, k, dtype)), torch.randn(300, k)
    whole = cpu.linear(x, packed)
    for row in (0, 1, 95, 96, 97, 299):
        assert torch.equal(cpu.linear(x[row : row + 1].clone(), packed)[0], whole[row])
    for size in range(1, 40):
        rows = torch.randperm(300)[:size]
        assert torch.equal(cpu.linear(x[rows], packed), whole[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(isa: str, dtype: torch.dtype, threads: None) -> None:
    torch.manual_seed(2)
    packed, x = packing.pack_linear(weight_of(700, 500, dtype)), torch.randn(130, 500)
    results = []
    for count in (1, 2, 3, 7):
        cpu.set_num_threads(count)
        results.append(cpu.linear(x, packed))
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_head_goes_through_its_own_weight(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    weight = (torch.randn(5, 48, 96) / 10).to(dtype)
    packed, x = packing.pack_linear_heads(weight), torch.randn(37, 5, 96)
    got = cpu.linear_heads(x, packed)
    for head in range(5):
        truth = x[:, head].double() @ weight[head].double().T
        assert_within(got[:, head], truth, dot_bound(x[:, head].double(), weight[head].double(), isa, dtype))
    assert torch.equal(cpu.linear_heads(x[9:10].clone(), packed)[0], got[9])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_subnormal_and_huge_activations_stay_within_the_bound(isa: str, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    weight = (torch.rand(32, 64) / 64 - 1 / 128).to(dtype)
    for size in (1e-42, 1e-39, 1e-30, 3e38):
        x = torch.full((3, 64), size)
        bound = dot_bound(x.double(), weight.double(), isa, dtype)
        assert_within(cpu.linear(x, packing.pack_linear(weight)), x.double() @ weight.double().T, bound)


def test_non_finite_rows_do_not_touch_their_neighbours(isa: str) -> None:
    torch.manual_seed(5)
    packed, x = packing.pack_linear(weight_of(64, 64, torch.bfloat16)), torch.randn(20, 64)
    clean = cpu.linear(x, packed)
    x[7, 3], x[11, 5] = torch.nan, torch.inf
    dirty = cpu.linear(x, packed)
    others = [row for row in range(20) if row not in (7, 11)]
    assert torch.equal(dirty[others], clean[others])
    assert not dirty[7].isfinite().any() and not dirty[11].isfinite().any()


def test_memory_at_odd_addresses_is_fine(isa: str) -> None:
    torch.manual_seed(6)
    weight = weight_of(64, 96, torch.bfloat16)
    room = torch.randn(10 * 96 + 1)
    x, bias = room[1:].view(10, 96), torch.randn(65)[1:]
    packed = packing.pack_linear(weight)
    assert x.data_ptr() % 64 == 4
    assert torch.equal(cpu.linear(x, packed, bias), cpu.linear(x.clone(), packed, bias.clone()))


def test_wrong_tensors_are_named_in_the_error() -> None:
    packed = packing.pack_linear(torch.zeros(4, 8))
    with pytest.raises(KernelError, match=r"linear: x is torch.float64 \[2, 8\], expected torch.float32"):
        cpu.linear(torch.zeros(2, 8).double(), packed)
    with pytest.raises(KernelError, match=r"linear: x is torch.float32 \[2, 7\], expected .* \[2, 8\]"):
        cpu.linear(torch.zeros(2, 7), packed)
    with pytest.raises(KernelError, match=r"linear: bias"):
        cpu.linear(torch.zeros(2, 8), packed, torch.zeros(5))
    with pytest.raises(KernelError, match=r"contiguous"):
        cpu.linear(torch.zeros(8, 2).T, packed)
    for shape in ((4, 0), (0, 4)):
        with pytest.raises(KernelError, match=r"a matrix with rows and columns"):
            packing.pack_linear(torch.zeros(shape))
    with pytest.raises(KernelError, match=r"weights of torch.int8"):
        packing.pack_linear(torch.zeros(4, 8, dtype=torch.int8))
