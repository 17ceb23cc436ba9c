"""Rotary positions in Triton against float64, and rows written into a paged cache."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from kernels.oracle import EPS, assert_within  # noqa: E402

from moe_runtime.errors import KernelError  # noqa: E402
from moe_runtime.kernels import reference  # noqa: E402
from moe_runtime.kernels.cache_rows import row_size  # noqa: E402
from moe_runtime.kernels.triton.rope import rope, rope_write_cache, write_cache  # noqa: E402

CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
# dim, half, offset: whole heads, partial rotation in front and behind, odd sizes, MLA's key
ROTATIONS = [(64, 32, 0), (64, 16, 0), (64, 16, 32), (7, 1, 5), (6, 3, 0), (192, 32, 128)]


def tables(half: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.rand(50, half, generator=torch.Generator().manual_seed(half)) * 6
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "half", "offset"), ROTATIONS)
def test_rope_rotates_its_dims_and_leaves_the_rest(
    device: torch.device, interleaved: bool, dim: int, half: int, offset: int
) -> None:
    torch.manual_seed(half)
    cos, sin = tables(half)
    for tokens, heads in ((0, 3), (1, 1), (9, 3), (2, 70)):
        x, positions = torch.randn(tokens, heads, dim), torch.randint(0, 50, (tokens,), dtype=torch.int32)
        truth = reference.rope(x.double(), cos, sin, positions, interleaved, offset)
        on_device = x.to(device, copy=True)
        got = rope(on_device, cos.to(device), sin.to(device), positions.to(device), interleaved, offset)
        assert got is on_device
        assert_within(got.cpu(), truth, torch.full_like(truth, 8 * EPS * 6))
        kept = torch.ones(dim, dtype=torch.bool)
        kept[offset : offset + 2 * half] = False
        assert torch.equal(got.cpu()[..., kept], x[..., kept])


def test_a_position_outside_the_tables_makes_nan_of_its_row_alone(device: torch.device) -> None:
    cos, sin = (table.to(device) for table in tables(2))
    positions = torch.tensor([3, 50, -1, 49], dtype=torch.int32, device=device)
    got = rope(torch.ones(4, 2, 5, device=device), cos, sin, positions, False)
    assert got[[0, 3]].isfinite().all() and got[[1, 2], :, :4].isnan().all()
    assert torch.all(got[..., 4] == 1)


def new_cache(blocks: int, heads: int, block_size: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Bits that nobody wrote, to see that they stay."""
    rows = torch.randn(blocks, heads, block_size, row_size(dim, dtype))
    return (rows * 40).to(torch.int8) if dtype is torch.int8 else rows.to(dtype)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize(
    ("heads", "block_size", "dim"), [(1, 1, 8), (3, 4, 20), (2, 16, 128), (33, 2, 64), (1, 3, 198), (2, 4, 3)]
)
def test_rows_reach_their_slots_rounded_and_no_others(
    device: torch.device, dtype: torch.dtype, heads: int, block_size: int, dim: int
) -> None:
    torch.manual_seed(dim)
    blocks = -(-12 // block_size)
    for tokens in (0, 1, 7):
        cache = new_cache(blocks, heads, block_size, dim, dtype)
        sizes = torch.tensor([1000.0, 1e-33, 0.0]).repeat(3)
        values = torch.randn(tokens, heads, dim) * sizes[:tokens, None, None]
        values.flatten()[:3] = torch.tensor([torch.nan, torch.inf, -3e38])[: values.numel()]
        slots = torch.randperm(blocks * block_size)[:tokens]
        got = cache.to(device, copy=True)
        write_cache(got, values.to(device), slots.to(device))
        if tokens:
            reference.write_cache(cache, values, slots)
        torch.testing.assert_close(got.cpu(), cache, rtol=0, atol=0, equal_nan=True)


def test_int8_codes_are_rounded_to_even_as_the_reference_does(device: torch.device) -> None:
    """Halves are ties: with a largest magnitude of 127 the codes are the numbers themselves, rounded."""
    values = (torch.arange(0, 128) - 63.5).view(2, 1, 64)
    values[:, :, 0] = 127.0
    caches = [torch.zeros(1, 1, 2, row_size(64, torch.int8), dtype=torch.int8) for _ in range(2)]
    on_device = caches[0].to(device)
    write_cache(on_device, values.to(device), torch.arange(2, device=device))
    reference.write_cache(caches[1], values, torch.arange(2))
    assert torch.equal(on_device.cpu(), caches[1]) and caches[1][0, 0, 0, 1:4].tolist() == [-62, -62, -60]


def test_a_slot_outside_the_cache_is_not_written(device: torch.device) -> None:
    storage = torch.zeros(6, 2, 4, 8, device=device)
    slots = torch.tensor([-1, 16, 5, 2**40, -(2**40)], device=device)
    write_cache(storage[1:5], torch.ones(5, 2, 8, device=device), slots)
    assert storage.sum() == 16 and torch.all(storage[2, :, 1] == 1)


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "half", "offset"), ROTATIONS)
def test_rotating_into_the_cache_is_rotating_and_then_writing(
    device: torch.device, dtype: torch.dtype, interleaved: bool, dim: int, half: int, offset: int
) -> None:
    torch.manual_seed(half)
    cos, sin = (table.to(device) for table in tables(half))
    x = torch.randn(5, 3, dim, device=device)
    positions = torch.randint(0, 50, (5,), dtype=torch.int32, device=device)
    slots = torch.tensor([7, 0, -1, 11, 24], device=device)
    width = row_size(dim, dtype)
    cache, expected = (torch.zeros(6, 3, 4, width, dtype=dtype, device=where) for where in (device, "cpu"))
    turned = rope(x.clone(), cos, sin, positions, interleaved, offset)
    assert torch.equal(rope_write_cache(x, cos, sin, positions, interleaved, cache, slots, offset), turned)
    written = [0, 1, 3]
    reference.write_cache(expected, turned[written].cpu(), slots[written].cpu())
    assert torch.equal(cache.cpu(), expected)


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    x, positions = torch.zeros(2, 1, 4, device=device), torch.zeros(2, dtype=torch.int32, device=device)
    cos = torch.zeros(10, 2, device=device)
    with pytest.raises(KernelError, match="rope: offset is 1, expected 0 to 0"):
        rope(x, cos, cos, positions, False, 1)
    with pytest.raises(KernelError, match="rope: positions is torch.int64"):
        rope(x, cos, cos, positions.long(), False)
    slots, cache = torch.zeros(2, dtype=torch.int64, device=device), torch.zeros(1, 1, 2, 12, device=device)
    with pytest.raises(KernelError, match=r"write_cache: cache is torch.int8 \[1, 1, 2, 12\].*2, 8\]"):
        write_cache(cache.to(torch.int8), x, slots)
    with pytest.raises(KernelError, match=r"rope_write_cache: cache is torch.int8 \[1, 1, 2, 12\]"):
        rope_write_cache(x, cos, cos, positions, False, cache.to(torch.int8), slots)
    with pytest.raises(KernelError, match=r"write_cache: cache is torch.float32 \[1, 1, 2, 12\], expected"):
        write_cache(cache, x, slots)
