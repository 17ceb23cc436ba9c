"""Dense layers on the device: float64 truth for every format; rows that do not depend on their neighbours."""

import pytest
import torch
from kernels.triton.device_weights import (
    BF16,
    EPS,
    FLOAT8,
    FORMATS,
    INTEGERS,
    PLAIN,
    assert_within,
    dot_bound,
    exact_values,
    random_matrix,
    seen,
    use_exact_dot,
)

pytest.importorskip("triton", reason="triton is not installed")

from moe_runtime.errors import KernelError
from moe_runtime.kernels import WeightFormat
from moe_runtime.kernels.packed import PackedLinear
from moe_runtime.kernels.triton import linear as module
from moe_runtime.kernels.triton.linear import linear, linear_heads, silu_mul
from moe_runtime.kernels.triton.tiles import linear_segments, linear_tile, matrix_tiles
from moe_runtime.kernels.triton.unpack import dequantize
from moe_runtime.kernels.triton.weights import DeviceLinear

TOKENS = (0, 1, 2, 15, 16, 17, 33)
SHAPES = ((1, 1), (33, 7), (70, 192))  # N, K


def packed_of(n: int, k: int, form: WeightFormat, device: torch.device, heads: int = 1) -> DeviceLinear:
    return DeviceLinear(random_matrix(heads, n, k, form, device))


def check(x: torch.Tensor, packed: DeviceLinear, bias: torch.Tensor | None = None) -> torch.Tensor:
    got = linear(x, packed, bias)
    weight, rows = dequantize(packed.matrix)[0], seen(x, packed.matrix)
    truth, bound = rows @ weight.T, dot_bound(rows, weight)
    if bias is not None:
        truth = truth + bias.cpu().double()
        bound = bound + 2 * EPS * (truth.abs() + bias.cpu().abs())
    assert_within(got, truth, bound)
    return got


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_format_and_shape_is_within_the_error_bound(
    form: WeightFormat, n: int, k: int, device: torch.device
) -> None:
    torch.manual_seed(0)
    packed, bias = packed_of(n, k, form, device), torch.randn(n, device=device)
    for tokens in TOKENS if form in (BF16, INTEGERS[-1]) else (1, 18):
        check(torch.randn(tokens, k, device=device), packed, bias if tokens % 2 else None)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_sum_in_segments_is_within_the_error_bound(form: WeightFormat, device: torch.device) -> None:
    torch.manual_seed(1)
    k = 1024
    assert linear_segments(20, k, form.kind) > 1
    packed, bias = packed_of(20, k, form, device), torch.randn(20, device=device)
    check(torch.randn(3, k, device=device), packed, bias)
    check(torch.randn(3, k, device=device), packed)


@pytest.mark.parametrize(
    "form", [BF16, *INTEGERS[-2:], INTEGERS[0], FLOAT8[0], WeightFormat("float32")], ids=str
)
def test_no_tile_and_no_way_to_add_segments_changes_a_bit(
    form: WeightFormat, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a row has the same bits whatever the number of rows, which is all that the choice depends on."""
    use_exact_dot(monkeypatch, device)
    packed, x = packed_of(70, 1024, form, device), exact_values(20, 1024).to(device)
    bias = torch.randn(70, generator=torch.Generator().manual_seed(0)).to(device)
    results = []
    for tile in matrix_tiles(form.kind):
        for split in (False, True):
            monkeypatch.setattr(module, "linear_tile", lambda *_, chosen=(tile, split): chosen)
            results.append(linear(x, packed, bias))
            assert torch.equal(linear(x[7:8].clone(), packed, bias)[0], results[0][7])
    assert all(torch.equal(result, results[0]) for result in results)


def test_many_rows_take_large_tiles_and_segments_follow_from_the_weight_alone() -> None:
    assert linear_segments(151936, 2048, "bfloat16") == 1
    assert linear_segments(2048, 4096, "bfloat16") == 4
    assert [linear_tile("bfloat16", rows, 2048, 4)[0].tokens for rows in (1, 16, 512, 4096)] == [
        16,
        16,
        128,
        128,
    ]
    assert linear_tile("bfloat16", 1, 2048, 4)[1] and not linear_tile("bfloat16", 4096, 2048, 4)[1]
    for kind in ("float32", "bfloat16", "int4", "float8"):
        for rows in (1, 3, 40, 70, 1000):
            tile, _ = linear_tile(kind, rows, 151936, 1)
            assert tile.tokens >= min(rows, 64)


@pytest.mark.parametrize("form", [*PLAIN, INTEGERS[0], INTEGERS[-1], FLOAT8[0]], ids=str)
def test_each_head_goes_through_its_own_weight(form: WeightFormat, device: torch.device) -> None:
    torch.manual_seed(2)
    packed, x = packed_of(40, 96, form, device, heads=3), torch.randn(5, 3, 96, device=device)
    got, weight, rows = linear_heads(x, packed), dequantize(packed.matrix), seen(x, packed.matrix)
    for head in range(3):
        truth = rows[:, head] @ weight[head].T
        assert_within(got[:, head], truth, dot_bound(rows[:, head], weight[head]))
    assert linear_heads(x[:0], packed).shape == (0, 3, 40)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_activations_of_any_size_stay_within_the_bound(form: WeightFormat, device: torch.device) -> None:
    packed = packed_of(32, 64, form, device)
    weight = dequantize(packed.matrix)[0]
    top = 6e4 if form == WeightFormat("float16") else 1e34
    for size in (0.0, 1e-42, 1e-30, 1.0, top):
        x = torch.full((2, 64), size, device=device)
        rows = seen(x, packed.matrix)
        assert_within(linear(x, packed), rows @ weight.T, dot_bound(rows, weight))


@pytest.mark.parametrize("form", [*PLAIN, INTEGERS[0], INTEGERS[-1], FLOAT8[0]], ids=str)
def test_non_finite_rows_do_not_touch_their_neighbours(form: WeightFormat, device: torch.device) -> None:
    torch.manual_seed(3)
    packed, x = packed_of(70, 200, form, device), torch.randn(20, 200, device=device)
    clean = linear(x, packed)
    x[7, 3], x[11, 150], x[12, 199] = torch.nan, torch.inf, -torch.inf
    dirty = linear(x, packed)
    others = [row for row in range(20) if row not in (7, 11, 12)]
    assert torch.equal(dirty[others], clean[others])
    assert not dirty[[7, 11, 12]].isfinite().any(1).all()


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    packed, x = packed_of(32, 64, BF16, device), torch.zeros(3, 64, device=device)
    with pytest.raises(
        KernelError, match=r"linear: x is torch.float32 \[3, 63\], expected torch.float32 \[3, 64\]"
    ):
        linear(x[:, :63].contiguous(), packed)
    with pytest.raises(KernelError, match="linear: x is torch.float64"):
        linear(x.double(), packed)
    with pytest.raises(KernelError, match="linear: x is on .* expected contiguous on"):
        linear(torch.zeros(64, 3, device=device).T, packed)
    with pytest.raises(KernelError, match="linear: bias is"):
        linear(x, packed, torch.zeros(31, device=device))
    with pytest.raises(KernelError, match="linear: packed is 2 heads, expected one head"):
        linear(x, packed_of(32, 64, BF16, device, heads=2))
    with pytest.raises(KernelError, match="linear_heads: x is"):
        linear_heads(x, packed)
    rows = PackedLinear(torch.zeros(1, 32, 64), 1, 32, 64, PLAIN[0], "rows")
    with pytest.raises(KernelError, match="linear: packed is packed as 'rows', expected packed for a device"):
        linear(x, rows)  # type: ignore[arg-type]


def test_silu_mul_is_within_a_few_roundings(device: torch.device) -> None:
    torch.manual_seed(4)
    gate, up = torch.randn(3, 700, device=device) * 10, torch.randn(3, 700, device=device)
    gate[0, :5] = torch.tensor([0.0, -200.0, 200.0, 3e38, -3e38])
    truth = torch.nn.functional.silu(gate.cpu().double()) * up.cpu().double()
    assert_within(silu_mul(gate, up), truth, 16 * EPS * truth.abs() + 2.0**-126)
    gate[1, 3] = torch.nan
    assert silu_mul(gate, up).isnan().sum() == 1
    assert silu_mul(gate[:0], up[:0]).shape == (0, 700)
    with pytest.raises(KernelError, match="silu_mul: up is"):
        silu_mul(gate, up[:2])
