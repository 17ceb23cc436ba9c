"""Router top-k: the same experts as the reference, and distinct ids in range whatever the logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.errors import KernelError
from moe_runtime.kernels import RouteMeter, RouterSpec, cpu, reference

FAMILIES = {
    "qwen3": RouterSpec(8, norm_topk_prob=True),
    "olmoe": RouterSpec(8),
    "softmax_after": RouterSpec(4, softmax_after_topk=True),
    "deepseek_v2": RouterSpec(6, num_groups=8, topk_groups=3, routed_scaling=16.0),
    "deepseek_v3": RouterSpec(
        8, "sigmoid", True, num_groups=8, topk_groups=4, group_score="top2_sum", routed_scaling=2.5,
        norm_epsilon=1e-20,
    ),
    "all": RouterSpec(64, norm_topk_prob=True),
    "one": RouterSpec(1, "sigmoid"),
}  # fmt: skip


def assert_valid(ids: torch.Tensor, num_experts: int) -> None:
    assert ids.min() >= 0 and ids.max() < num_experts
    assert all(len(set(row)) == len(row) for row in ids.tolist())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 17, 500])
def test_choices_equal_the_reference_bit_by_bit(family: str, with_bias: bool, tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    logits = torch.randn(tokens, 64, generator=generator) * 4
    bias = torch.randn(64, generator=generator) if with_bias else None
    ids, weights = cpu.route(logits, FAMILIES[family], bias)
    expected_ids, expected_weights = reference.route(logits, FAMILIES[family], bias)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_ties_go_to_the_lowest_ids(family: str) -> None:
    logits = torch.zeros(3, 64)
    ids, _ = cpu.route(logits, FAMILIES[family])
    assert torch.equal(ids, torch.arange(FAMILIES[family].top_k).int().expand(3, -1))
    coarse = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)).round()
    assert torch.equal(cpu.route(coarse, FAMILIES[family])[0], reference.route(coarse, FAMILIES[family])[0])


SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-45, 3.4e38, -3.4e38, 1.0, -1.0, 100.0]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(row=st.lists(st.sampled_from(SPECIAL) | st.floats(width=32), min_size=64, max_size=64))
def test_any_logits_give_distinct_ids_in_range_and_finite_weights(family: str, row: list[float]) -> None:
    logits = torch.tensor([row])
    ids, weights = cpu.route(logits, FAMILIES[family])
    assert_valid(ids, 64)
    assert weights.isfinite().all()
    assert torch.equal(ids, reference.route(logits, FAMILIES[family])[0])


def test_nan_logits_lose_to_every_number() -> None:
    logits = torch.full((1, 8), torch.nan)
    logits[0, 5], logits[0, 2] = -1e30, -1e38
    assert cpu.route(logits, RouterSpec(3))[0].tolist() == [[5, 2, 0]]


def test_no_expert_outside_the_chosen_groups_appears() -> None:
    logits = torch.full((1, 8), -200.0)
    logits[0, 6] = 5.0  # group 3 wins; the rest of its group is as bad as everybody else
    ids, _ = cpu.route(logits, RouterSpec(2, num_groups=4, topk_groups=1))
    assert ids.tolist() == [[6, 7]]


def test_bias_changes_the_choice_but_not_the_weight() -> None:
    logits, bias = torch.zeros(1, 4), torch.tensor([0.0, 0.0, 0.0, 1.0])
    ids, weights = cpu.route(logits, RouterSpec(1, "sigmoid"), bias)
    assert ids.tolist() == [[3]] and weights.tolist() == [[0.5]]


def test_a_bias_against_the_largest_logit_leaves_weights_finite() -> None:
    logits = torch.tensor([[-800.0, 800.0, 0.0, -3.0]])
    bias = torch.tensor([2.0, -0.5, 0.0, 0.0])
    for route in (cpu.route, reference.route):
        ids, weights = route(logits, RouterSpec(2, softmax_after_topk=True), bias)
        assert ids.tolist() == [[0, 1]] and weights.tolist() == [[0.0, 1.0]]


def test_rules_that_cannot_hold_are_refused() -> None:
    for spec in (
        RouterSpec(9),
        RouterSpec(0),
        RouterSpec(2, num_groups=3),
        RouterSpec(3, num_groups=4, topk_groups=1),
    ):
        with pytest.raises(KernelError, match="route: "):
            cpu.route(torch.zeros(1, 8), spec)
    with pytest.raises(KernelError, match="route: bias"):
        cpu.route(torch.zeros(1, 8), RouterSpec(1), torch.zeros(7))


# --- scenario masks -----------------------------------------------------------------------------------------


def random_masks(count: int, least: int, seed: int) -> torch.Tensor:
    """uint8 [count, 64], each allowing from ``least`` to all experts."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(count, 64, dtype=torch.uint8)
    for mask in masks:
        size = int(torch.randint(least, 65, (), generator=generator))
        mask[torch.randperm(64, generator=generator)[:size]] = 1
    return masks


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("least", [0, 8])
def test_masked_choices_and_the_meter_equal_the_reference(family: str, with_bias: bool, least: int) -> None:
    generator = torch.Generator().manual_seed(least)
    logits = torch.randn(300, 64, generator=generator) * 4
    bias = torch.randn(64, generator=generator) if with_bias else None
    masks, rows = random_masks(9, least, 1), torch.randint(-1, 9, (300,), generator=generator).int()
    meters = RouteMeter.zeros(300, logits.device), RouteMeter.zeros(300, logits.device)
    ids, weights = cpu.route(logits, FAMILIES[family], bias, masks, rows, meters[0])
    expected_ids, expected_weights = reference.route(logits, FAMILIES[family], bias, masks, rows, meters[1])
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=0)
    assert meters[0].lost is not None
    torch.testing.assert_close(meters[0].lost, meters[1].lost, rtol=0, atol=2e-6)
    assert meters[0].lost[rows == -1].abs().max() == 0
    assert torch.equal(meters[0].outside, meters[1].outside)
    free = cpu.route(logits, FAMILIES[family], bias)
    unmasked = rows == -1
    assert torch.equal(ids[unmasked], free[0][unmasked]) and torch.equal(weights[unmasked], free[1][unmasked])


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=60, deadline=None)
@given(
    row=st.lists(st.sampled_from(SPECIAL) | st.floats(width=32), min_size=64, max_size=64),
    seed=st.integers(0, 999),
)
def test_no_logits_lead_outside_a_mask(family: str, row: list[float], seed: int) -> None:
    logits, spec = torch.tensor([row]), FAMILIES[family]
    masks, meter = random_masks(1, spec.top_k, seed), RouteMeter.zeros(1, logits.device)
    first = torch.zeros(1, dtype=torch.int32)
    ids, weights = cpu.route(logits, spec, None, masks, first, meter)
    assert_valid(ids, 64)
    assert masks[0, ids[0].long()].all() and meter.outside.item() == 0
    assert weights.isfinite().all() and meter.lost is not None and 0 <= meter.lost.item() <= 1 + 1e-6
    assert torch.equal(ids, reference.route(logits, spec, None, masks, first)[0])


@pytest.mark.parametrize("family", ["qwen3", "olmoe", "softmax_after", "one"])
def test_a_masked_router_is_the_router_of_the_kept_experts_to_the_last_bit(family: str) -> None:
    logits = torch.randn(200, 64, generator=torch.Generator().manual_seed(5)) * 4
    kept = torch.randperm(64, generator=torch.Generator().manual_seed(6))[:24].sort().values
    mask = torch.zeros(1, 64, dtype=torch.uint8)
    mask[0, kept] = 1
    ids, weights = cpu.route(logits, FAMILIES[family], None, mask, torch.zeros(200, dtype=torch.int32))
    small_ids, small_weights = cpu.route(logits[:, kept].contiguous(), FAMILIES[family])
    assert torch.equal(ids, kept[small_ids.long()].int()) and torch.equal(weights, small_weights)


def test_the_meter_counts_what_a_mask_of_too_few_experts_lets_through() -> None:
    masks = torch.zeros(1, 8, dtype=torch.uint8)
    masks[0, 5] = 1
    meter = RouteMeter.zeros(2, masks.device)
    ids, weights = cpu.route(
        torch.zeros(2, 8), RouterSpec(3), None, masks, torch.tensor([0, -1]).int(), meter
    )
    assert ids.tolist() == [[5, 0, 1], [0, 1, 2]] and weights[0].tolist() == [1.0, 0.0, 0.0]
    assert meter.outside.item() == 2 and meter.lost is not None and meter.lost.tolist() == [1.0, 0.0]


def test_wrong_masks_are_refused() -> None:
    logits, masks = torch.zeros(2, 8), torch.ones(2, 8, dtype=torch.uint8)
    rows = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(KernelError, match="masks and mask_rows is one of them, expected both or neither"):
        cpu.route(logits, RouterSpec(1), None, masks)
    with pytest.raises(KernelError, match=r"route: mask_rows\[1\] = 2, expected -1 <= row < 2"):
        cpu.route(logits, RouterSpec(1), None, masks, torch.tensor([0, 2]).int())
    with pytest.raises(KernelError, match="route: masks"):
        cpu.route(logits, RouterSpec(1), None, masks[:, :4].contiguous(), rows)
    with pytest.raises(KernelError, match="route: mask_rows"):
        cpu.route(logits, RouterSpec(1), None, masks, rows.long())
