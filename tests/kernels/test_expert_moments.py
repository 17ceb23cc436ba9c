"""The moments of what each expert made of each token, beside the bits of the mixture on its own."""

import pytest
import torch
from kernels.oracle import random_routing

import moe_runtime._C as _C
from moe_runtime.errors import KernelError
from moe_runtime.kernels import WeightFormat, choose, cpu, packing, reference
from moe_runtime.kernels.packed import PackedExperts
from moe_runtime.quant.rounding import quantize

FORMATS = (
    *(WeightFormat.of(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    WeightFormat("int8"),
    WeightFormat("int4", 32, True),
)
HIDDEN, INTERMEDIATE, EXPERTS = 192, 96, 6


def packed(form: WeightFormat) -> tuple[PackedExperts, PackedExperts]:
    """For the cpu backend, and as rows."""
    generator = torch.Generator().manual_seed(0)
    homes = tuple(module.new_experts(EXPERTS, HIDDEN, INTERMEDIATE, form) for module in (packing, reference))
    for expert in range(EXPERTS):
        for part in ("gate", "up", "down"):
            shape = (HIDDEN, INTERMEDIATE) if part == "down" else (INTERMEDIATE, HIDDEN)
            plain = torch.randn(shape, generator=generator) / shape[1] ** 0.5
            weight = plain.to(form.dtype) if form.kind not in ("int8", "int4") else quantize(plain, form)
            for module, home in zip((packing, reference), homes, strict=True):
                module.pack_expert(home, expert, part, weight)
    return homes[0], homes[1]


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 17, 64])
def test_moments_are_those_of_every_output_and_the_sum_is_the_mixture(
    isa: str, form: WeightFormat, tokens: int
) -> None:
    """Outputs one by one come from mixtures of one expert with weight 1."""
    torch.manual_seed(0)
    x, (ids, weights) = torch.randn(tokens, HIDDEN), random_routing(tokens, EXPERTS, 3)
    counted = (torch.arange(tokens) % 3 > 0).to(torch.uint8)
    for module, experts in zip((cpu, reference), packed(form), strict=True):
        sums = torch.ones(EXPERTS, HIDDEN, dtype=torch.float64)
        mixed, squares, peaks = module.expert_moments(x, ids, weights, experts, counted, sums)
        assert torch.equal(mixed, module.fused_moe(x, ids, weights, experts))
        expected = torch.ones_like(sums)
        # torch's products of other numbers of rows round otherwise.
        close = {"rtol": 1e-13, "atol": 1e-13} if module is cpu else {"rtol": 1e-4, "atol": 1e-5}
        for slot in range(3):
            own = ids[:, slot : slot + 1].contiguous()
            alone = module.fused_moe(x, own, torch.ones(tokens, 1), experts).double()
            torch.testing.assert_close(squares[:, slot], alone.square().sum(1), **close)
            torch.testing.assert_close(peaks[:, slot].double(), alone.abs().amax(1), **close)
            expected.index_add_(0, own[counted.bool(), 0].long(), alone[counted.bool()])
        torch.testing.assert_close(sums, expected, **close)


def test_the_number_of_threads_changes_no_bit_of_the_moments(isa: str) -> None:
    torch.manual_seed(1)
    x, (ids, weights) = torch.randn(64, HIDDEN), random_routing(64, EXPERTS, 3)
    experts, _ = packed(FORMATS[1])
    results = []
    try:
        for count in (1, 2, 3):
            cpu.set_num_threads(count)
            sums = torch.zeros(EXPERTS, HIDDEN, dtype=torch.float64)
            counted = torch.ones(64, dtype=torch.uint8)
            results.append((sums, *cpu.expert_moments(x, ids, weights, experts, counted, sums)))
    finally:
        _C.set_num_threads(0)
    for other in results[1:]:
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(results[0], other, strict=True))


def test_a_number_that_is_not_finite_shows_in_the_squares() -> None:
    experts, _ = packed(FORMATS[0])
    x = torch.full((1, HIDDEN), torch.nan)
    ids, weights = torch.tensor([[0]], dtype=torch.int32), torch.ones(1, 1)
    sums = torch.zeros(EXPERTS, HIDDEN, dtype=torch.float64)
    _, squares, _ = cpu.expert_moments(x, ids, weights, experts, torch.ones(1, dtype=torch.uint8), sums)
    assert not bool(squares.isfinite().any()) and not bool(sums[0].isfinite().any())


def test_it_checks_what_it_is_given_and_follows_the_mixture_it_reads_for() -> None:
    experts, _ = packed(FORMATS[1])
    x, ids = torch.zeros(1, HIDDEN), torch.tensor([[0, EXPERTS]], dtype=torch.int32)
    counted, sums = torch.ones(1, dtype=torch.uint8), torch.zeros(EXPERTS, HIDDEN, dtype=torch.float64)
    with pytest.raises(KernelError, match=r"expert_ids\[0, 1\] = 6"):
        cpu.expert_moments(x, ids, torch.zeros(1, 2), experts, counted, sums)
    with pytest.raises(KernelError, match="expert_moments: x is"):
        cpu.expert_moments(x[:, 1:], ids, torch.zeros(1, 2), experts, counted, sums)
    with pytest.raises(KernelError, match="expert_moments: sums is"):
        cpu.expert_moments(x, ids, torch.zeros(1, 2), experts, counted, sums.float())
    with pytest.raises(KernelError, match="expert_moments: counted is"):
        cpu.expert_moments(x, ids, torch.zeros(1, 2), experts, counted.bool(), sums)
    assert choose("cpu", {"fused_moe": "reference"}).expert_moments is reference.expert_moments
