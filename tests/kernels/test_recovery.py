"""What stands in for the experts that a mask forbids: constants, and offsets of the others' logits."""

from collections.abc import Callable

import pytest
import torch
from kernels.oracle import EPS, assert_within, moe_truth_and_bound, random_experts, random_routing
from kernels.test_router import FAMILIES, SPECIAL, random_masks

from moe_runtime.errors import KernelError
from moe_runtime.kernels import RouteMeter, RouterSpec, cpu, reference
from moe_runtime.kernels.residence import ABSENT, Residence, expert_slots
from moe_runtime.kernels.route_recovery import RouteRecovery

EXPERTS, MASKS = 64, 9
PLAIN, CONSTANTS, OFFSETS = range(3)  # what the rows of a table have, by turns


def random_recovery(masks: torch.Tensor, seed: int) -> RouteRecovery:
    """Row 0 has nothing, row 1 a number for every forbidden expert, row 2 offsets, and so on."""
    generator = torch.Generator().manual_seed(seed)
    offsets, stand_ins = torch.zeros(masks.shape), torch.full(masks.shape, -1, dtype=torch.int32)
    count = 0
    for row, mask in enumerate(masks):
        if row % 3 == CONSTANTS:
            forbidden = (mask == 0).nonzero().flatten()
            numbers = count + torch.randperm(len(forbidden), generator=generator)
            stand_ins[row, forbidden], count = numbers.int(), count + len(forbidden)
        elif row % 3 == OFFSETS:
            offsets[row] = torch.randn(masks.shape[1], generator=generator) * 2 * mask
    return RouteRecovery(offsets, stand_ins)


def routed(
    route: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    family: str,
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    *tables: torch.Tensor | RouteRecovery,
) -> tuple[torch.Tensor, ...]:
    """Ids, weights, lost and outside; ``tables``: masks, mask rows and a recovery."""
    meter = RouteMeter.zeros(len(logits), logits.device)
    masks, rows, *recovery = tables
    ids, weights = route(logits, FAMILIES[family], bias, masks, rows, meter, *recovery)
    assert meter.lost is not None
    return ids, weights, meter.lost, meter.outside


def world(seed: int, least: int = 8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, RouteRecovery]:
    """Logits of 150 tokens, masks, their rows, and what the rows have."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(150, EXPERTS, generator=generator) * 4
    logits[::5] = logits[::5].round()
    masks = random_masks(MASKS, least, seed)
    rows = torch.randint(-1, MASKS, (150,), generator=generator).int()
    return logits, masks, rows, random_recovery(masks, seed)


BIASES = {"no bias": None, "bias": 0.05 * torch.randn(EXPERTS, generator=torch.Generator().manual_seed(1))}
CASES = pytest.mark.parametrize(
    ("family", "bias"), [(family, bias) for family in FAMILIES for bias in BIASES]
)


@CASES
@pytest.mark.parametrize("least", [0, 8])
def test_choices_and_the_meter_equal_the_reference(family: str, bias: str, least: int) -> None:
    logits, *tables = world(least, least)
    ids, weights, lost, outside = routed(cpu.route, family, logits, BIASES[bias], *tables)
    expected = routed(reference.route, family, logits, BIASES[bias], *tables)
    assert torch.equal(ids, expected[0]) and torch.equal(outside, expected[3])
    torch.testing.assert_close(weights, expected[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(lost, expected[2], rtol=0, atol=2e-6)
    assert bool((ids >= EXPERTS).any()) and (outside.item() == 0 or FAMILIES[family].top_k > least)


@CASES
def test_who_has_constants_chooses_as_if_nothing_were_cut(family: str, bias: str) -> None:
    logits, masks, _, recovery = world(3)
    rows = torch.full((150,), CONSTANTS, dtype=torch.int32)
    ids, weights, *_ = routed(cpu.route, family, logits, BIASES[bias], masks, rows, recovery)
    free_ids, free_weights = cpu.route(logits, FAMILIES[family], BIASES[bias])
    assert torch.equal(weights, free_weights)
    kept = masks[CONSTANTS][free_ids.long()] == 1
    names = torch.where(kept, free_ids, EXPERTS + recovery.stand_ins[CONSTANTS][free_ids.long()])
    assert torch.equal(ids, names) and not kept.all()


@CASES
def test_offsets_are_other_logits_and_nothing_else(family: str, bias: str) -> None:
    logits, masks, _, recovery = world(4)
    rows = torch.full((150,), OFFSETS, dtype=torch.int32)
    ids, weights, lost, _ = routed(cpu.route, family, logits, BIASES[bias], masks, rows, recovery)
    moved = logits + recovery.offsets[OFFSETS]
    expected = routed(cpu.route, family, moved, BIASES[bias], masks, rows)
    assert torch.equal(ids, expected[0]) and torch.equal(weights, expected[1])
    plain = routed(cpu.route, family, logits, BIASES[bias], masks, rows)
    assert torch.equal(lost, plain[2])  # measured without them
    assert FAMILIES[family].top_k == EXPERTS or not torch.equal(ids, plain[0])


@CASES
def test_rows_without_any_have_the_bits_of_a_table_without_any(family: str, bias: str) -> None:
    logits, masks, rows, recovery = world(5)
    mixed = routed(cpu.route, family, logits, BIASES[bias], masks, rows, recovery)
    plain = routed(cpu.route, family, logits, BIASES[bias], masks, rows)
    without = (rows < 0) | (rows % 3 == PLAIN)
    assert all(torch.equal(one[without], two[without]) for one, two in zip(mixed[:3], plain[:3], strict=True))
    for token in range(0, 150, 29):  # and every row alone has the bits that it has in company
        one = slice(token, token + 1)
        alone = routed(cpu.route, family, logits[one], BIASES[bias], masks, rows[one], recovery)
        assert all(torch.equal(got, part[one]) for got, part in zip(alone[:3], mixed[:3], strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_logits_and_no_offsets_lead_outside_a_mask(family: str) -> None:
    """NaN, infinities, ties and rows of nothing else, under masks of just enough experts."""
    spec, generator = FAMILIES[family], torch.Generator().manual_seed(9)
    special = torch.tensor(SPECIAL)
    logits = special[torch.randint(len(special), (300, EXPERTS), generator=generator)]
    logits[::4] = torch.randn(75, EXPERTS, generator=generator).round()
    logits[1::20], logits[2::20], logits[3::20] = torch.nan, torch.inf, -torch.inf
    masks = torch.zeros(MASKS, EXPERTS, dtype=torch.uint8)
    for mask in masks:
        mask[torch.randperm(EXPERTS, generator=generator)[: spec.top_k]] = 1
    recovery = random_recovery(masks, 9)
    moves = torch.tensor([0.0, 1.0, -3.4e38, 3.4e38])
    recovery.offsets[OFFSETS] = moves[torch.randint(4, (EXPERTS,), generator=generator)]
    tables = masks, (torch.arange(300) % MASKS).int(), recovery
    ids, weights, lost, outside = routed(cpu.route, family, logits, None, *tables)
    assert outside.item() == 0 and weights.isfinite().all()
    assert bool(((lost >= 0) & (lost <= 1 + 1e-6)).all())
    for token, chosen in enumerate(ids.long()):
        experts, constants = chosen[chosen < EXPERTS], chosen[chosen >= EXPERTS] - EXPERTS
        assert masks[token % MASKS, experts].all() and len(chosen.unique()) == spec.top_k
        assert torch.isin(constants, recovery.stand_ins[token % MASKS]).all()
    assert torch.equal(ids, routed(reference.route, family, logits, None, *tables)[0])


def test_the_fence_is_still_watched() -> None:
    """A mask of too few experts, half of whose others have constants."""
    masks = torch.zeros(1, 8, dtype=torch.uint8)
    masks[0, 5] = 1
    stand_ins = torch.full((1, 8), -1, dtype=torch.int32)
    stand_ins[0, 7] = 40
    recovery = RouteRecovery(torch.zeros(1, 8), stand_ins)
    for route in (cpu.route, reference.route):
        meter, row = RouteMeter.zeros(1, masks.device), torch.zeros(1, dtype=torch.int32)
        ids, _ = route(torch.zeros(1, 8), RouterSpec(4), None, masks, row, meter, recovery)
        assert ids.tolist() == [[5, 8 + 40, 0, 1]] and meter.outside.item() == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_constants_are_added_with_their_weight(isa: str, dtype: torch.dtype, tokens: int) -> None:
    experts, hidden = 5, 70
    moe = random_experts(experts, hidden, 48, dtype)
    generator = torch.Generator().manual_seed(tokens)
    x, constants = (
        torch.randn(tokens, hidden, generator=generator),
        torch.randn(7, hidden, generator=generator),
    )
    ids, weights = random_routing(tokens, experts + len(constants), 4, seed=tokens)
    truth = reference.fused_moe(x.double(), ids, weights.double(), moe.rows, constants)
    is_expert = ids < experts
    computed, bound = moe_truth_and_bound(
        x, torch.where(is_expert, ids, 0), torch.where(is_expert, weights, 0.0), moe.rows, isa
    )
    added = torch.where(is_expert, 0, ids - experts).long()
    magnitude = (torch.where(is_expert, 0.0, weights)[..., None] * constants[added]).abs().sum(1)
    assert_within(
        cpu.fused_moe(x, ids, weights, moe.packed, constants),
        truth,
        bound + (ids.shape[1] + 1) * EPS * (magnitude.double() + computed.abs()),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_with_constants_has_the_same_bits_in_any_company(dtype: torch.dtype) -> None:
    experts, hidden = 6, 100
    moe = random_experts(experts, hidden, 64, dtype)
    x, constants = torch.randn(90, hidden), torch.randn(9, hidden)
    ids, weights = random_routing(90, experts + len(constants), 3)
    ids[:2] = experts + torch.arange(3).int()  # nobody computes anything for these
    whole = cpu.fused_moe(x, ids, weights, moe.packed, constants)
    for rows in (slice(0, 1), slice(0, 2), slice(5, 6), slice(40, 90)):
        got = cpu.fused_moe(
            x[rows], ids[rows].contiguous(), weights[rows].contiguous(), moe.packed, constants
        )
        assert torch.equal(got, whole[rows])
    without = (ids < experts).all(1)
    ids, weights = ids[without].contiguous(), weights[without].contiguous()
    assert len(ids) and torch.equal(cpu.fused_moe(x[without], ids, weights, moe.packed), whole[without])


@pytest.mark.parametrize("operation", [cpu.expert_slots, expert_slots])
def test_constants_follow_the_places_of_the_experts_that_are_here(
    operation: Callable[..., torch.Tensor],
) -> None:
    here = Residence(torch.tensor([1, ABSENT, 0], dtype=torch.int32), 2, 5, torch.zeros(1, dtype=torch.int64))
    ids = torch.tensor([[0, 2], [3, 6], [4, 0]], dtype=torch.int32)
    assert operation(ids, here, 4).tolist() == [[1, 0], [2, 5], [3, 1]]
    for bad in (1, 7, -1):
        ids[1, 0] = bad
        with pytest.raises(KernelError, match=f"layer 5: expert {bad}, chosen by token 1"):
            operation(ids, here, 4)


def test_wrong_tables_are_refused() -> None:
    logits, masks, rows = torch.zeros(2, 8), torch.ones(2, 8, dtype=torch.uint8), torch.zeros(2).int()
    good = RouteRecovery(torch.zeros(2, 8), torch.full((2, 8), -1, dtype=torch.int32))
    for route in (cpu.route, reference.route):
        with pytest.raises(KernelError, match="route: recovery"):
            route(logits, RouterSpec(1), None, None, None, None, good)
        for wrong, name in (
            (RouteRecovery(torch.zeros(1, 8), good.stand_ins), "offsets"),
            (RouteRecovery(good.offsets.double(), good.stand_ins), "offsets"),
            (RouteRecovery(good.offsets, good.stand_ins.long()), "stand_ins"),
        ):
            with pytest.raises(KernelError, match=f"route: {name} is"):
                route(logits, RouterSpec(1), None, masks, rows, None, wrong)


@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1])
def test_a_number_that_is_no_constant_is_refused(bad: int) -> None:
    moe = random_experts(2, 32, 16, torch.float32)
    ids = torch.tensor([[0, 3], [1, bad]], dtype=torch.int32)
    for operation, experts in ((cpu.fused_moe, moe.packed), (reference.fused_moe, moe.rows)):
        with pytest.raises(KernelError, match="expected 0 <= id < 4"):
            operation(torch.zeros(2, 32), ids, torch.zeros(2, 2), experts, torch.zeros(2, 32))
    with pytest.raises(KernelError, match="fused_moe: constants"):
        cpu.fused_moe(torch.zeros(2, 32), ids, torch.zeros(2, 2), moe.packed, torch.zeros(2, 31))
