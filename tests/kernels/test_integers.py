"""int8 and int4 weights: packing bit by bit, the kernels against the same integers in float64, and what
quantised activations cost.
"""

import pytest
import torch
from kernels.oracle import EPS, assert_within, random_routing

from moe_runtime.errors import KernelError
from moe_runtime.kernels import QuantizedWeight, WeightFormat, cpu, packing, reference

INT8 = WeightFormat("int8")
FORMATS = (
    INT8,
    *(WeightFormat("int4", group, zeros) for group in (32, 64, 128) for zeros in (False, True)),
)
TOKENS = (0, 1, 2, 3, 4, 7, 15, 16, 17, 31, 32, 33, 47, 49, 97)
SHAPES = ((1, 1), (16, 32), (32, 33), (48, 7), (80, 192), (192, 80), (130, 100), (257, 1024))  # N, K
SIZES = ((192, 80), (64, 96), (33, 17), (100, 36), (31, 1), (256, 48))  # H, I
BLOCK = 64  # k that share an activation scale


def random_codes(n: int, k: int, form: WeightFormat, seed: int = 0) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed * 7919 + n * k)
    top = 16 if form.kind == "int4" else 256
    codes = torch.randint(int(form.kind == "int8"), top, (n, k), generator=generator, dtype=torch.uint8)
    groups = form.num_groups(k)
    scales = (torch.rand(n, groups, generator=generator) + 0.1).half().float() / (top * k**0.5)
    if form.kind == "int4":
        scales = scales.half().float()
    zeros = torch.randint(0, 16, (n, groups), generator=generator, dtype=torch.uint8)
    return QuantizedWeight(codes, scales, zeros if form.zeros else None, form)


def quantised_rows(x: torch.Tensor, largest: float) -> torch.Tensor:
    """What the kernels make of activations, in float64: integers of at most ``largest`` per block, rescaled.

    The steps are the kernel's own, in float32: one division for the inverse scale, nearest even.
    """
    tokens, k = x.shape
    padded = torch.zeros(tokens, -(-k // BLOCK) * BLOCK)
    padded[:, :k] = x
    blocks = padded.view(tokens, padded.shape[1] // BLOCK, BLOCK)
    top = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.where(top >= 1e-30, torch.tensor(largest) / top, torch.zeros(()))
    integers = (blocks * inverse).round().double()
    return (integers * (top / torch.tensor(largest)).double()).view(padded.shape)[:, :k]


def seen_rows(x: torch.Tensor, isa: str) -> torch.Tensor:
    """A layer's input as the kernels multiply it: integers of 8 bits in blocks, on AMX bfloat16."""
    return x.bfloat16().double() if isa == "amx" else quantised_rows(x, 127)


def rounding_bound(x: torch.Tensor, weight: torch.Tensor, isa: str) -> torch.Tensor:
    """Float32 roundings: one per product on AMX, else one per block of exact integers; a few for scales."""
    roundings = x.shape[-1] if isa == "amx" else -(-x.shape[-1] // 32)
    return 4 * (roundings**0.5 + 4) * EPS * (x.abs() @ weight.abs().T) + 1e-37


def truth_of(x: torch.Tensor, weight: QuantizedWeight, isa: str) -> torch.Tensor:
    return seen_rows(x, isa) @ weight.dequantize().double().T


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_packing_moves_every_code_scale_and_zero_point(form: WeightFormat, n: int, k: int) -> None:
    weight = random_codes(n, k, form)
    back = packing.unpack_linear(packing.pack_linear(weight))
    assert isinstance(back, QuantizedWeight) and back.format == form
    assert torch.equal(back.codes, weight.codes) and torch.equal(back.scales, weight.scales)
    assert (back.zeros is None and weight.zeros is None) or torch.equal(back.zeros, weight.zeros)


def test_the_packed_bytes_are_those_of_the_written_layout() -> None:
    """csrc/layout.h written a second time, in torch, for int4 with zero points."""
    form, n, k = WeightFormat("int4", 64, True), 32, 128
    weight = random_codes(n, k, form)
    data = packing.pack_linear(weight).data.flatten()
    scales = data[128 : 128 + 2 * 2 * 32].view(torch.float16).view(2, 32).T.float()
    assert torch.equal(scales * data[:128].view(torch.float32)[:, None], weight.scales)
    zeros_at = 128 + 2 * 2 * 32
    assert weight.zeros is not None
    assert torch.equal(data[zeros_at : zeros_at + 64].view(2, 32).T, weight.zeros)
    codes = data[zeros_at + 64 :].view(k // 8, 2, 16, 4)  # group, tile, column, byte
    halves = torch.stack((codes & 15, codes >> 4), dim=3).view(k // 8, 32, 8)
    assert torch.equal(halves.permute(1, 0, 2).reshape(n, k), weight.codes)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear_multiplies_exactly_what_was_quantised(isa: str, form: WeightFormat, n: int, k: int) -> None:
    torch.manual_seed(0)
    weight, bias = random_codes(n, k, form), torch.randn(n)
    packed = packing.pack_linear(weight)
    for tokens in TOKENS:
        x = torch.randn(tokens, k) * torch.logspace(-2, 2, max(tokens, 1))[:tokens, None]
        truth = truth_of(x, weight, isa) + bias.double()
        bound = rounding_bound(x.double(), weight.dequantize().double(), isa) + 4 * EPS * bias.abs()
        # An integer that lies on the edge between two may fall to either side.
        bound += 1e-6 * (x.abs().amax(1, keepdim=True) / 127 @ weight.dequantize().abs().amax(1)[None])
        assert_within(cpu.linear(x, packed, bias), truth, bound)


def moe_of(form: WeightFormat, hidden: int, intermediate: int, num_experts: int = 4) -> tuple:
    packed = packing.new_experts(num_experts, hidden, intermediate, form)
    rows = reference.new_experts(num_experts, hidden, intermediate, form)
    for expert_id in range(num_experts):
        for number, part in enumerate(("gate", "up", "down")):
            n, k = (hidden, intermediate) if part == "down" else (intermediate, hidden)
            weight = random_codes(n, k, form, seed=3 * expert_id + number)
            packing.pack_expert(packed, expert_id, part, weight)
            reference.pack_expert(rows, expert_id, part, weight)
    return packed, rows


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize(("hidden", "intermediate"), SIZES)
def test_experts_multiply_exactly_what_was_quantised(
    isa: str, form: WeightFormat, hidden: int, intermediate: int
) -> None:
    """Input rows of 8 bits, hidden rows of 15; on AMX both bfloat16."""
    torch.manual_seed(0)
    packed, rows = moe_of(form, hidden, intermediate)
    for tokens in TOKENS:
        x, (ids, weights) = torch.randn(tokens, hidden), random_routing(tokens, 4, 2)
        seen = seen_rows(x, isa)
        truth = reference.fused_moe(seen, ids, weights.double(), rows)
        # Hidden rows: half a step of 1 / 16256 of a block's largest per element (on AMX of bfloat16), and
        # float32 roundings.
        magnitude = torch.zeros(tokens, hidden, dtype=torch.float64)
        for expert_id in range(4):
            gate, up = rows.gate_up[expert_id].double()
            h = torch.nn.functional.silu(seen @ gate.T) * (seen @ up.T)
            sizes = (seen.abs() @ gate.abs().T) * (seen @ up.T).abs() + h.abs()
            sizes += (seen @ gate.T).abs() * (seen.abs() @ up.abs().T)
            top = h.abs().amax(1, keepdim=True) if intermediate else h
            step = (h.abs() / 256 if isa == "amx" else top.expand_as(h) / 32512) + 64 * EPS * sizes
            mine = step @ rows.down[expert_id].double().abs().T
            used = ((ids == expert_id) * weights).sum(1, keepdim=True).double()
            magnitude += used * (mine + 64 * EPS * (h.abs() @ rows.down[expert_id].double().abs().T))
        assert_within(cpu.fused_moe(x, ids, weights, packed), truth, 1.01 * magnitude + 1e-30)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_quantised_activations_cost_less_than_one_percent(isa: str, form: WeightFormat) -> None:
    """Root mean square error against float64 of the same weights, normally distributed activations."""
    torch.manual_seed(1)
    packed, rows = moe_of(form, 512, 256)
    x, (ids, weights) = torch.randn(64, 512), random_routing(64, 4, 2)
    truth = reference.fused_moe(x.double(), ids, weights.double(), rows)
    error = cpu.fused_moe(x, ids, weights, packed) - truth
    assert error.norm() / truth.norm() < 0.01


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_token_is_the_same_bits_alone_and_in_any_company(isa: str, form: WeightFormat) -> None:
    torch.manual_seed(4)
    packed, _ = moe_of(form, 192, 80, 8)
    dense = packing.pack_linear(random_codes(200, 700, form))
    x, y, (ids, weights) = torch.randn(250, 192), torch.randn(250, 700), random_routing(250, 8, 2)
    whole, whole_dense = cpu.fused_moe(x, ids, weights, packed), cpu.linear(y, dense)
    for size in (1, 1, 2, 3, 4, 6, 7, 12, 13, 48, 49, 96, 97, 200, 250):
        rows = torch.randperm(250)[:size]
        assert torch.equal(cpu.fused_moe(x[rows], ids[rows], weights[rows], packed), whole[rows])
        assert torch.equal(cpu.linear(y[rows], dense), whole_dense[rows])


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_the_number_of_threads_changes_no_bit(isa: str, form: WeightFormat, threads: None) -> None:
    torch.manual_seed(5)
    packed, _ = moe_of(form, 256, 200)
    x, (ids, weights) = torch.randn(60, 256), random_routing(60, 4, 3)
    results = []
    for count in (1, 2, 3, 7):
        cpu.set_num_threads(count)
        results.append(cpu.fused_moe(x, ids, weights, packed))
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("form", (INT8, WeightFormat("int4", 32)), ids=str)
def test_extreme_codes_do_not_saturate(isa: str, form: WeightFormat) -> None:
    """Every product at its largest, with every sign."""
    k = 256
    low, high = (0, 15) if form.kind == "int4" else (1, 255)
    codes = torch.full((64, k), high, dtype=torch.uint8)
    codes[::2] = low
    scales = torch.full((64, form.num_groups(k)), 2.0**-7)
    weight = QuantizedWeight(codes, scales, None, form)
    x = torch.ones(5, k)
    x[1], x[2, ::2], x[3, 1::2] = -1, -1, -1
    x[4] = torch.linspace(-1, 1, k)
    truth = truth_of(x, weight, isa)
    bound = rounding_bound(x.double(), weight.dequantize().double(), isa)
    assert_within(cpu.linear(x, packing.pack_linear(weight)), truth, bound)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_non_finite_rows_do_not_touch_their_neighbours(isa: str, form: WeightFormat) -> None:
    torch.manual_seed(6)
    packed, x = packing.pack_linear(random_codes(64, 100, form)), torch.randn(20, 100)
    experts, _ = moe_of(form, 100, 48)
    ids, weights = random_routing(20, 4, 2)
    clean = cpu.linear(x, packed), cpu.fused_moe(x, ids, weights, experts)
    x[7, 3], x[11, 80], x[12, 1] = torch.nan, torch.inf, -torch.inf
    dirty = cpu.linear(x, packed), cpu.fused_moe(x, ids, weights, experts)
    others = [row for row in range(20) if row not in (7, 11, 12)]
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(before[others], after[others])
        assert not after[[7, 11, 12]].isfinite().any()


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-38, 1e-31, 1e-29, 1e30, 1e34])
def test_activations_of_any_size_stay_within_the_bound(isa: str, size: float) -> None:
    weight = random_codes(32, 64, WeightFormat("int4", 32, True))
    x = torch.full((3, 64), size)
    truth = (x.bfloat16() if isa == "amx" else x).double() @ weight.dequantize().double().T
    bound = rounding_bound(x.double(), weight.dequantize().double(), isa)
    bound += 1e-30 * weight.dequantize().double().abs().sum(1)  # smaller activations count as zero
    assert_within(cpu.linear(x, packing.pack_linear(weight)), truth, bound)


def test_avx2_and_avx512_give_the_same_bits() -> None:
    import moe_runtime._C as _C

    if "avx512" not in _C.supported_isas():
        pytest.skip("this machine has no AVX-512 VNNI")
    torch.manual_seed(7)
    before = _C.isa()
    try:
        for form in FORMATS:
            packed, x = packing.pack_linear(random_codes(100, 300, form)), torch.randn(50, 300)
            results = []
            for name in ("avx2", "avx512"):
                _C.select_isa(name)
                results.append(cpu.linear(x, packed))
            assert torch.equal(*results)
    finally:
        _C.select_isa(before)


def test_what_cannot_be_stored_is_refused() -> None:
    weight = random_codes(40, 128, WeightFormat("int4", 64))
    scales = weight.scales.clone()
    scales[33, 1] = 0.1
    odd = QuantizedWeight(weight.codes, scales, None, weight.format)
    with pytest.raises(KernelError, match="a scale of output column 33 is not a float16 times a power"):
        packing.pack_linear(odd)
    with pytest.raises(KernelError, match="wrong shape or dtype"):
        QuantizedWeight(weight.codes, weight.scales[:, :1], None, weight.format)
    with pytest.raises(KernelError, match="int4 in groups of 48"):
        WeightFormat("int4", 48)
    with pytest.raises(KernelError, match="int8 has no such scale groups or zero points"):
        WeightFormat("int8", 64)
    experts = packing.new_experts(2, 64, 48, INT8)
    with pytest.raises(KernelError, match=r"gate is int4-g64 \[40, 128\], expected int8 \[48, 64\]"):
        packing.pack_expert(experts, 0, "gate", weight)
