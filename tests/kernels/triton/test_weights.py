"""Weights in their device homes: every bit comes back, the layout is as written, wrong ones are refused."""

import pytest
import torch
from kernels.triton.device_weights import FLOAT8, FORMATS, PLAIN, random_matrix, random_weight

pytest.importorskip("triton", reason="triton is not installed")

from moe_runtime.errors import KernelError
from moe_runtime.kernels import QuantizedWeight, Weight, WeightFormat
from moe_runtime.kernels.triton import weights
from moe_runtime.kernels.triton.unpack import dequantize, unpack_expert, unpack_linear
from moe_runtime.kernels.triton.weights import (
    new_experts,
    pack_expert,
    pack_linear,
    pack_linear_heads,
)

SHAPES = ((1, 1), (16, 32), (33, 7), (40, 192), (130, 300))  # N, K


def assert_same(got: Weight, expected: Weight) -> None:
    if isinstance(expected, torch.Tensor):
        assert isinstance(got, torch.Tensor) and got.dtype is expected.dtype and torch.equal(got, expected)
        return
    assert isinstance(got, QuantizedWeight) and got.format == expected.format
    assert torch.equal(got.codes, expected.codes) and torch.equal(got.scales, expected.scales)
    if expected.zeros is not None:
        assert got.zeros is not None and torch.equal(got.zeros, expected.zeros)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_packing_moves_every_bit(form: WeightFormat, n: int, k: int, device: torch.device) -> None:
    weight = random_weight(n, k, form)
    packed = pack_linear(weight, device=device)
    assert_same(unpack_linear(packed), weight)
    assert (packed.layout, packed.heads, packed.out_features, packed.in_features) == ("device", 1, n, k)
    assert packed.format == form and packed.data.device.type == device.type


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_heads_and_experts_have_their_own_places(form: WeightFormat, device: torch.device) -> None:
    heads = [random_weight(20, 70, form, seed) for seed in range(3)]
    packed = pack_linear_heads(heads, device=device)
    for head, weight in enumerate(heads):
        assert_same(unpack_linear(packed, head), weight)
    experts = new_experts(3, 70, 20, form, device=device)
    written = {}
    for expert, part in ((2, "down"), (0, "gate"), (0, "up"), (2, "up"), (1, "down"), (2, "gate")):
        shape = (70, 20) if part == "down" else (20, 70)
        written[expert, part] = random_weight(*shape, form, seed=len(written))
        pack_expert(experts, expert, part, written[expert, part], device=device)
    for (expert, part), weight in written.items():
        assert_same(unpack_expert(experts, expert, part), weight)
    assert not experts.gate_up.data[2:4].any()  # expert 1's, never written


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_matrix_is_copied_in_pieces(
    form: WeightFormat, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "BYTES_PER_COPY", 1000)
    weight = random_weight(50, 70, form)
    assert_same(unpack_linear(pack_linear(weight, device=device)), weight)


def test_a_packed_weight_shares_memory_only_with_a_matrix_that_lies_as_it_should(
    device: torch.device,
) -> None:
    weight = random_weight(16, 64, PLAIN[1])
    assert isinstance(weight, torch.Tensor)
    packed, before = pack_linear_heads([weight], device=device), weight.clone()
    there = weight.to(device, copy=True)
    assert pack_linear(there, device=device).data.data_ptr() == there.data_ptr()
    assert not pack_linear(there[:, :60].contiguous(), device=device).data[..., 60:].any()
    weight.zero_()
    assert_same(unpack_linear(packed), before)
    assert_same(unpack_linear(pack_linear(there, device=device)), before)


def test_a_stacked_tensor_is_one_matrix_per_head(device: torch.device) -> None:
    heads = torch.randn(3, 16, 40).bfloat16()
    packed = pack_linear_heads(heads, device=device)
    assert packed.heads == 3 and torch.equal(packed.data[:, :, :40].cpu(), heads)
    assert packed.data.shape == (3, 16, 64) and not packed.data[:, :, 40:].any()


def test_int4_words_lie_as_written(device: torch.device) -> None:
    """The layout a second time: k = 8 w + 2 i + half is nibble i + 4 half of word w."""
    form, n, k = WeightFormat("int4", 32, True), 5, 256
    weight = random_weight(n, k, form)
    assert isinstance(weight, QuantizedWeight) and weight.zeros is not None
    matrix = pack_linear(weight, device=device).matrix
    assert matrix.scales is not None and matrix.row_scales is not None and matrix.zeros is not None
    words = matrix.words[0].cpu().long()
    for j in range(k):
        nibble = j % 8 // 2 + 4 * (j % 2)
        assert torch.equal(words[:, j // 8] >> 4 * nibble & 15, weight.codes[:, j].long())
    assert matrix.scales.dtype is torch.float16 and matrix.scales.shape == (1, k // 32, n)
    assert torch.equal(matrix.zeros[0].cpu().T, weight.zeros)
    assert torch.equal(torch.frexp(matrix.row_scales.cpu()).mantissa, torch.full((1, n), 0.5))
    assert torch.equal(matrix.scales[0].cpu().T.float() * matrix.row_scales[0].cpu()[:, None], weight.scales)


def test_bytes_lie_as_written(device: torch.device) -> None:
    """Of int8 and float8: a word holds k, k + 2, k + 1, k + 3."""
    weight = random_weight(5, 256, WeightFormat("int8"))
    assert isinstance(weight, QuantizedWeight)
    data = pack_linear(weight, device=device).data[0].cpu()
    float8 = random_weight(5, 256, FLOAT8[0])
    assert isinstance(float8, QuantizedWeight)
    narrow = pack_linear(float8, device=device).data[0].cpu().view(torch.uint8)
    for place, k in enumerate((0, 2, 1, 3)):
        assert torch.equal(data[:, place::4].int() + 128, weight.codes[:, k::4].int())
        assert torch.equal(narrow[:, place::4], float8.codes.view(torch.uint8)[:, k::4])


def test_float8_is_its_codes_times_its_scales(device: torch.device) -> None:
    for form in FLOAT8:
        heads = [random_weight(130, 300, form, seed) for seed in range(2)]
        got = dequantize(pack_linear_heads(heads, device=device).matrix)
        for weight, wide in zip(heads, got, strict=True):
            assert isinstance(weight, QuantizedWeight)
            for n, k in ((0, 0), (127, 127), (128, 255), (129, 256), (5, 299)):
                place = (n // 128, k // 128) if form.group else (n, 0)
                assert wide[n, k] == weight.codes[n, k].float() * weight.scales[place]


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_the_size_of_large_weights_is_what_the_format_promises(
    form: WeightFormat, device: torch.device
) -> None:
    matrix = random_matrix(2, 256, 1024, form, device)
    assert matrix.num_bytes == pytest.approx(2 * 256 * 1024 * form.bits_per_weight / 8, rel=0.01)


@pytest.mark.parametrize("wrong", [0.1, float("inf"), float("nan")])
def test_a_scale_that_packing_would_change_is_refused(wrong: float, device: torch.device) -> None:
    weight = random_weight(40, 128, WeightFormat("int4", 64))
    assert isinstance(weight, QuantizedWeight)
    weight.scales[33, 1] = wrong
    packed = "a scale of output row 33 is not a float16 times a power of two"
    with pytest.raises(KernelError, match=packed):
        pack_linear(weight, device=device)


def test_scales_of_any_size_that_the_format_knows_are_kept(device: torch.device) -> None:
    weight = random_weight(6, 64, WeightFormat("int4", 32))
    assert isinstance(weight, QuantizedWeight)
    weight.scales[:] = torch.tensor(
        [[0, 0], [1e-38, -1e-38], [3e38, 1.5e38], [2**-140, 0], [1, -1], [1, 2**-23]]
    )
    weight.scales[1:3] = weight.scales[1:3].bfloat16().float()
    assert_same(unpack_linear(pack_linear(weight, device=device)), weight)


def test_wrong_matrices_are_refused(device: torch.device) -> None:
    experts = new_experts(2, 64, 48, torch.bfloat16, device=device)
    weight = torch.zeros(48, 64, dtype=torch.bfloat16)
    with pytest.raises(KernelError, match="pack_expert: expert_id is 2, expected 0 <= id < 2"):
        pack_expert(experts, 2, "gate", weight, device=device)
    with pytest.raises(KernelError, match=r"down is bfloat16 \[48, 64\], expected bfloat16 \[64, 48\]"):
        pack_expert(experts, 0, "down", weight, device=device)
    with pytest.raises(KernelError, match=r"gate is float32 \[48, 64\], expected bfloat16"):
        pack_expert(experts, 0, "gate", weight.float(), device=device)
    with pytest.raises(KernelError, match="part is 'gte', expected 'gate', 'up' or 'down'"):
        pack_expert(experts, 0, "gte", weight, device=device)
    with pytest.raises(KernelError, match="pack_expert: experts is on"):
        pack_expert(experts, 0, "gate", weight, device=torch.device("meta"))
    with pytest.raises(KernelError, match="pack_linear: weight is"):
        pack_linear(torch.zeros(3), device=device)
    with pytest.raises(KernelError, match=r"weights\[1\] is float32"):
        pack_linear_heads([weight, weight.float()], device=device)
    with pytest.raises(KernelError, match="at least one head"):
        pack_linear_heads([], device=device)
    codes = torch.zeros(130, 8).to(torch.float8_e4m3fn)
    with pytest.raises(KernelError, match=r"float8-g128 \[130, 8\]: wrong shape or dtype"):
        QuantizedWeight(codes, torch.ones(1, 1), None, FLOAT8[0])
    with pytest.raises(KernelError, match="float8 in groups of 64, expected 128 or 0"):
        WeightFormat("float8", 64)
