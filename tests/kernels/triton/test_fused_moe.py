"""Mixtures on the device: float64 truth over formats and edge grid; sorting; bits that no company changes."""

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
    exact_values,
    moe_truth_and_bound,
    random_experts,
    random_routing,
    use_exact_dot,
)

pytest.importorskip("triton", reason="triton is not installed")

from moe_runtime.errors import KernelError
from moe_runtime.kernels.packed import PackedExperts, WeightFormat
from moe_runtime.kernels.triton import fused_moe as module
from moe_runtime.kernels.triton import tile_lists
from moe_runtime.kernels.triton.combine import combine
from moe_runtime.kernels.triton.fused_moe import expert_moments, expert_rows, fused_moe, fused_moe_add_norm
from moe_runtime.kernels.triton.tile_lists import list_tiles
from moe_runtime.kernels.triton.tiles import SMALL_PAIRS, matrix_tiles
from moe_runtime.kernels.triton.weights import DeviceExperts

TOKENS = (0, 1, 2, 15, 16, 17, 33)
SOME = (BF16, INTEGERS[-1], FLOAT8[0])


def check(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: DeviceExperts) -> torch.Tensor:
    got = fused_moe(x, ids, weights, experts)
    assert_within(got, *moe_truth_and_bound(x, ids, weights, experts))
    return got


def inputs(tokens: int, hidden: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)).to(device)


# --- the right numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_every_format_is_within_the_error_bound_both_ways(form: WeightFormat, device: torch.device) -> None:
    experts = random_experts(2, 136, 40, form, device)
    for tokens in (2, 33):
        assert (tokens * 2 > SMALL_PAIRS) == (tokens == 33)
        check(inputs(tokens, 136, device), *random_routing(tokens, 2, 2, device), experts)


def test_every_number_of_tokens(device: torch.device) -> None:
    experts = random_experts(4, 33, 17, BF16, device)
    for tokens in TOKENS:
        check(inputs(tokens, 33, device), *random_routing(tokens, 4, 2, device), experts)


@pytest.mark.parametrize("form", [PLAIN[0], BF16, INTEGERS[0]], ids=str)
@pytest.mark.parametrize(("hidden", "intermediate"), [(70, 72), (31, 1)])
def test_odd_sizes(form: WeightFormat, hidden: int, intermediate: int, device: torch.device) -> None:
    experts = random_experts(2, hidden, intermediate, form, device)
    for tokens in (2, 65):
        check(inputs(tokens, hidden, device), *random_routing(tokens, 2, 1, device), experts)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (2, 1), (2, 2), (8, 3), (8, 8)])
def test_every_number_of_experts_and_choices(num_experts: int, top_k: int, device: torch.device) -> None:
    experts = random_experts(num_experts, 64, 40, BF16, device)
    for tokens in (2, 70 if top_k == 1 else 33):
        check(inputs(tokens, 64, device), *random_routing(tokens, num_experts, top_k, device), experts)


@pytest.mark.parametrize("only", [0, 7])
def test_one_expert_may_get_every_token_and_the_others_none(only: int, device: torch.device) -> None:
    experts = random_experts(8, 64, 40, BF16, device)
    for tokens in (17, 65):
        ids = torch.full((tokens, 1), only, dtype=torch.int32, device=device)
        check(inputs(tokens, 64, device), ids, torch.ones(tokens, 1, device=device), experts)


def test_an_expert_chosen_twice_counts_twice(device: torch.device) -> None:
    experts = random_experts(4, 64, 40, PLAIN[0], device)
    for repeats in (1, 12):
        ids = torch.tensor([[2, 2], [1, 1], [0, 3]], dtype=torch.int32, device=device).repeat(repeats, 1)
        weights = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)).to(device)
        check(inputs(len(ids), 64, device), ids, weights, experts)


@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_ids_that_name_no_expert_add_nothing(tokens: int, device: torch.device) -> None:
    experts = random_experts(4, 64, 40, BF16, device)
    x, (ids, weights) = inputs(tokens, 64, device), random_routing(tokens, 4, 2, device)
    for place, wrong in enumerate((-1, 4, 2**31 - 1, -(2**31))):
        ids[place % tokens, place // tokens % 2] = wrong
        weights[place % tokens, place // tokens % 2] = torch.nan
    known = weights.masked_fill((ids < 0) | (ids >= 4), 0.0)
    got = fused_moe(x, ids, weights, experts)
    assert_within(got, *moe_truth_and_bound(x, ids, known, experts))
    assert torch.all(fused_moe(x, torch.full_like(ids, -1), weights, experts) == 0)


@pytest.mark.parametrize("tokens", [2, 40])
def test_a_nan_token_does_not_touch_its_neighbours(tokens: int, device: torch.device) -> None:
    for form in (BF16, INTEGERS[-1], PLAIN[0]):
        experts = random_experts(2, 70, 30, form, device)
        x, (ids, weights) = inputs(tokens, 70, device), random_routing(tokens, 2, 2, device)
        clean = fused_moe(x, ids, weights, experts)
        x[1, 5] = torch.nan
        dirty = fused_moe(x, ids, weights, experts)
        others = [row for row in range(tokens) if row != 1]
        assert torch.equal(dirty[others], clean[others]) and dirty[1].isnan().all()


@pytest.mark.parametrize("tokens", [3, 40])
def test_weights_scale_the_outputs(tokens: int, device: torch.device) -> None:
    experts = random_experts(4, 64, 40, BF16, device)
    x, (ids, weights) = inputs(tokens, 64, device), random_routing(tokens, 4, 2, device)
    once = fused_moe(x, ids, weights, experts)
    assert torch.equal(fused_moe(x, ids, weights * 4, experts), once * 4)
    assert torch.all(fused_moe(x, ids, torch.zeros_like(weights), experts) == 0)


# --- the same bits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", SOME, ids=str)
def test_a_token_is_the_same_bits_alone_and_in_any_company(
    form: WeightFormat, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_exact_dot(monkeypatch, device)
    experts = random_experts(4, 136, 40, form, device)
    x, (ids, weights) = exact_values(36, 136).to(device), random_routing(36, 4, 2, device)
    whole = fused_moe(x, ids, weights, experts)
    for rows in ([0], list(range(20, 26)), list(range(35, 2, -1))):
        got = fused_moe(x[rows], ids[rows], weights[rows], experts)
        assert torch.equal(got, whole[rows])


@pytest.mark.parametrize("form", [BF16, INTEGERS[-1]], ids=str)
def test_no_tile_changes_a_bit(
    form: WeightFormat, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_exact_dot(monkeypatch, device)
    experts = random_experts(2, 136, 40, form, device)
    x, (ids, weights) = exact_values(5, 136).to(device), random_routing(5, 2, 1, device)
    results = []
    for tile in matrix_tiles(form.kind):
        monkeypatch.setattr(module, "expert_tile", lambda *_, chosen=tile: chosen)
        for most in (0, 64):
            monkeypatch.setattr(module, "SMALL_PAIRS", most)
            results.append(fused_moe(x, ids, weights, experts))
    assert all(torch.equal(result, results[0]) for result in results)


# --- sorting ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_experts", "pairs", "tokens"), [(1, 5, 16), (3, 70, 16), (8, 300, 32), (64, 90, 16)]
)
def test_tiles_list_every_pair_of_an_expert_once_and_in_order(
    num_experts: int, pairs: int, tokens: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tile_lists, "CHUNK_PAIRS", 64)
    ids = torch.randint(-1, num_experts + 2, (pairs, 1), generator=torch.Generator().manual_seed(0)).int()
    lists = list_tiles(ids.to(device), num_experts, tokens)
    expected = []
    start = 0
    for expert in range(num_experts):
        mine = torch.nonzero(ids[:, 0] == expert)[:, 0].int()
        assert torch.equal(lists.pairs[start : start + len(mine)].cpu(), mine)
        firsts = range(0, len(mine), tokens)
        expected += [[expert, start + first, min(len(mine) - first, tokens)] for first in firsts]
        start += len(mine)
    assert int(lists.num_tiles) == len(expected) <= lists.bound
    assert lists.tiles[: len(expected)].tolist() == expected


# --- what follows a mixture ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [2, 30])
def test_ids_beyond_the_experts_name_constant_vectors(tokens: int, device: torch.device) -> None:
    experts, constants = random_experts(4, 70, 40, BF16, device), inputs(2, 70, device, seed=9)
    x, (ids, weights) = inputs(tokens, 70, device), random_routing(tokens, 7, 3, device)
    ids[1] = torch.tensor([6, 4, 5])  # 6 names nothing
    got = fused_moe(x, ids, weights, experts, constants=constants)
    truth, bound = moe_truth_and_bound(x, ids, weights, experts)
    for index in range(2):
        share = (weights * (ids == 4 + index)).sum(1, keepdim=True).cpu().double()
        truth = truth + share * constants[index].cpu().double()
        bound = bound + 8 * EPS * share * constants[index].cpu().abs()
    assert_within(got, truth, bound + 4 * EPS * truth.abs())


def test_slots_are_added_in_their_order_and_what_is_added_comes_last(device: torch.device) -> None:
    rows = torch.tensor([1e8, 1.0, -1e8, 3.0], device=device)[:, None].repeat(1, 5)
    ids, weights = torch.zeros(1, 4, dtype=torch.int32, device=device), torch.ones(1, 4, device=device)
    added = torch.full((1, 5), 0.5, device=device)
    assert torch.equal(combine(rows, ids, weights, 1, added=added), torch.full((1, 5), 3.5, device=device))
    x, (ids, weights) = inputs(5, 64, device), random_routing(5, 4, 2, device)
    experts, shared = random_experts(4, 64, 40, BF16, device), inputs(5, 64, device, seed=1)
    plain = fused_moe(x, ids, weights, experts)
    assert torch.equal(fused_moe(x, ids, weights, experts, added=shared), plain + shared)
    in_order = expert_rows(x, ids, weights, experts).view(5, 2, 64)
    assert torch.equal(plain, in_order[:, 0] + in_order[:, 1])


@pytest.mark.parametrize("hidden", [1, 64, 70, 200])
def test_the_next_norm_is_of_the_mixture_and_the_residual(hidden: int, device: torch.device) -> None:
    experts, x = random_experts(4, hidden, 24, BF16, device), inputs(7, hidden, device)
    ids, weights = random_routing(7, 4, 2, device)
    residual, shared = inputs(7, hidden, device, seed=2), inputs(7, hidden, device, seed=3)
    norm_weight = inputs(1, hidden, device, seed=4)[0]
    normed, total = fused_moe_add_norm(x, ids, weights, experts, residual, norm_weight, 1e-6, added=shared)
    assert torch.equal(total, fused_moe(x, ids, weights, experts, added=shared) + residual)
    wide = total.cpu().double()
    truth = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-6) * norm_weight.cpu().double()
    assert_within(normed, truth, (hidden**0.5 + 16) * EPS * truth.abs())


@pytest.mark.parametrize("form", SOME, ids=str)
def test_moments_of_the_outputs_beside_their_sum(form: WeightFormat, device: torch.device) -> None:
    experts, x = random_experts(3, 136, 40, form, device), inputs(33, 136, device)
    ids, weights = random_routing(33, 3, 2, device)
    counted = (torch.arange(33, device=device) % 3 > 0).to(torch.uint8)
    sums = torch.ones(3, 136, dtype=torch.float64, device=device)
    mixed, squares, peaks = expert_moments(x, ids, weights, experts, counted, sums)
    assert torch.equal(mixed, fused_moe(x, ids, weights, experts))
    outputs = expert_rows(x, ids, torch.ones_like(weights), experts).view(33, 2, 136).double()
    assert torch.equal(squares, outputs.square().sum(-1)) and torch.equal(
        peaks.double(), outputs.abs().amax(-1)
    )
    expected = torch.ones_like(sums)
    expected.index_add_(0, ids[counted.bool()].flatten().long(), outputs[counted.bool()].flatten(0, 1))
    torch.testing.assert_close(sums, expected, rtol=1e-13, atol=1e-13)


def test_no_tokens_and_no_choices_are_no_work(device: torch.device) -> None:
    experts = random_experts(2, 64, 40, BF16, device)
    none, ids = torch.zeros(0, 64, device=device), torch.zeros(0, 2, dtype=torch.int32, device=device)
    assert fused_moe(none, ids, ids.float(), experts).shape == (0, 64)
    normed, total = fused_moe_add_norm(
        none, ids, ids.float(), experts, none, torch.ones(64, device=device), 1e-6
    )
    assert normed.shape == total.shape == (0, 64)
    ids = torch.zeros(3, 0, dtype=torch.int32, device=device)
    assert torch.all(fused_moe(torch.ones(3, 64, device=device), ids, ids.float(), experts) == 0)


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    experts, x = random_experts(2, 64, 40, BF16, device), inputs(3, 64, device)
    ids, weights = random_routing(3, 2, 1, device)
    with pytest.raises(KernelError, match=r"fused_moe: x is torch.float32 \[3, 63\]"):
        fused_moe(x[:, :63].contiguous(), ids, weights, experts)
    with pytest.raises(KernelError, match="fused_moe: expert_ids is torch.int64"):
        fused_moe(x, ids.long(), weights, experts)
    with pytest.raises(KernelError, match=r"fused_moe: expert_weights is torch.float32 \[2, 1\]"):
        fused_moe(x, ids, weights[:2], experts)
    with pytest.raises(KernelError, match="combine: added is"):
        fused_moe(x, ids, weights, experts, added=x[:2])
    with pytest.raises(KernelError, match="combine: constants is"):
        fused_moe(x, ids, weights, experts, constants=x[:, :9].contiguous())
    with pytest.raises(KernelError, match="combine_add_norm: residual is"):
        fused_moe_add_norm(x, ids, weights, experts, x[:2], x[0], 1e-6)
    rows = PackedExperts(torch.zeros(2, 2, 40, 64), torch.zeros(2, 64, 40), 2, 64, 40, PLAIN[0], "rows")
    with pytest.raises(KernelError, match="fused_moe: experts is packed as 'rows'"):
        fused_moe(x, ids, weights, rows)  # type: ignore[arg-type]
