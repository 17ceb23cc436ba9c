"""Router top-k: the same experts as the reference, and distinct ids in range whatever the logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.errors import KernelError
from moe_runtime.kernels import RouterSpec, cpu, reference

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
