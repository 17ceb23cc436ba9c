"""Fused experts: float64 truth over the edge grid, and tokens that do not depend on their neighbours."""

import pytest
import torch
from kernels.oracle import DTYPES, Moe, assert_within, moe_truth_and_bound, random_experts, random_routing

from moe_runtime.errors import KernelError
from moe_runtime.kernels import cpu, packing

TOKENS = (0, 1, 2, 15, 16, 17, 31, 32, 33, 47)
SIZES = ((192, 80), (64, 96), (33, 17), (100, 36), (31, 1), (256, 48))  # H, I


def check(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, moe: Moe, isa: str) -> torch.Tensor:
    got = cpu.fused_moe(x, ids, weights, moe.packed)
    truth, bound = moe_truth_and_bound(x, ids, weights, moe.rows, isa)
    assert_within(got, truth, bound)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden", "intermediate"), SIZES)
def test_every_size_is_within_the_error_bound(
    isa: str, dtype: torch.dtype, hidden: int, intermediate: int
) -> None:
    torch.manual_seed(0)
    moe = random_experts(4, hidden, intermediate, dtype)
    for tokens in TOKENS:
        check(torch.randn(tokens, hidden), *random_routing(tokens, 4, 2), moe, isa)


@pytest.mark.parametrize(
    ("num_experts", "top_k"), [(1, 1), (2, 1), (2, 2), (8, 3), (8, 8), (64, 6), (128, 8)]
)
def test_every_number_of_experts_and_choices(isa: str, num_experts: int, top_k: int) -> None:
    torch.manual_seed(1)
    moe = random_experts(num_experts, 64, 48, torch.bfloat16)
    for tokens in (1, 17, 47):
        check(torch.randn(tokens, 64), *random_routing(tokens, num_experts, top_k), moe, isa)


@pytest.mark.parametrize("only", [0, 3, 7])
def test_one_expert_may_get_every_token(isa: str, only: int) -> None:
    torch.manual_seed(2)
    moe = random_experts(8, 64, 48, torch.bfloat16)
    for tokens in (1, 96, 97, 130):
        ids = torch.full((tokens, 1), only, dtype=torch.int32)
        check(torch.randn(tokens, 64), ids, torch.ones(tokens, 1), moe, isa)


def test_an_expert_chosen_twice_counts_twice(isa: str) -> None:
    torch.manual_seed(3)
    moe = random_experts(4, 64, 48, torch.float32)
    ids = torch.tensor([[2, 2], [1, 1], [0, 3]], dtype=torch.int32)
    check(torch.randn(3, 64), ids, torch.rand(3, 2), moe, isa)


def test_a_token_is_the_same_bits_alone_and_in_any_company(isa: str) -> None:
    torch.manual_seed(4)
    for dtype in DTYPES:
        moe = random_experts(8, 192, 80, dtype)
        x, (ids, weights) = torch.randn(250, 192), random_routing(250, 8, 2)
        whole = cpu.fused_moe(x, ids, weights, moe.packed)
        for size in (1, 1, 2, 3, 6, 7, 12, 13, 96, 97, 200, 250):
            rows = torch.randperm(250)[:size]
            got = cpu.fused_moe(x[rows], ids[rows], weights[rows], moe.packed)
            assert torch.equal(got, whole[rows])


def test_the_number_of_threads_changes_no_bit(isa: str, threads: None) -> None:
    torch.manual_seed(5)
    moe = random_experts(8, 256, 80, torch.bfloat16)
    x, (ids, weights) = torch.randn(60, 256), random_routing(60, 8, 3)
    results = []
    for count in (1, 2, 3, 7):
        cpu.set_num_threads(count)
        results.append(cpu.fused_moe(x, ids, weights, moe.packed))
    assert all(torch.equal(results[0], other) for other in results)


def test_zero_weights_give_exactly_zero(isa: str) -> None:
    moe = random_experts(4, 64, 48, torch.bfloat16)
    ids, weights = random_routing(9, 4, 2)
    assert torch.all(cpu.fused_moe(torch.randn(9, 64), ids, torch.zeros_like(weights), moe.packed) == 0)


def test_the_output_is_linear_in_powers_of_two_of_the_weights(isa: str) -> None:
    moe = random_experts(4, 64, 48, torch.bfloat16)
    x, (ids, weights) = torch.randn(9, 64), random_routing(9, 4, 2)
    once = cpu.fused_moe(x, ids, weights, moe.packed)
    assert torch.equal(cpu.fused_moe(x, ids, weights * 4, moe.packed), once * 4)


def test_a_nan_token_does_not_touch_its_neighbours(isa: str) -> None:
    torch.manual_seed(6)
    moe = random_experts(4, 64, 48, torch.bfloat16)
    x, (ids, weights) = torch.randn(30, 64), random_routing(30, 4, 2)
    clean = cpu.fused_moe(x, ids, weights, moe.packed)
    x[13, 5] = torch.nan
    dirty = cpu.fused_moe(x, ids, weights, moe.packed)
    others = [row for row in range(30) if row != 13]
    assert torch.equal(dirty[others], clean[others]) and dirty[13].isnan().all()


@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1, -(2**31)])
def test_an_expert_id_out_of_range_is_refused(isa: str, bad: int) -> None:
    moe = random_experts(4, 64, 48, torch.bfloat16)
    ids = torch.tensor([[0, 1], [2, bad]], dtype=torch.int32)
    with pytest.raises(KernelError, match=rf"fused_moe: expert_ids\[1, 1\] = {bad}, expected 0 <= id < 4"):
        cpu.fused_moe(torch.zeros(2, 64), ids, torch.zeros(2, 2), moe.packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packing_experts_moves_every_bit(dtype: torch.dtype) -> None:
    moe = random_experts(3, 72, 40, dtype)
    for expert_id in range(3):
        for part, rows in (
            ("gate", moe.rows.gate_up[expert_id, 0]),
            ("up", moe.rows.gate_up[expert_id, 1]),
            ("down", moe.rows.down[expert_id]),
        ):
            assert torch.equal(packing.unpack_expert(moe.packed, expert_id, part), rows)


def test_a_wrong_expert_matrix_is_refused() -> None:
    experts = packing.new_experts(2, 64, 48, torch.bfloat16)
    weight = torch.zeros(48, 64, dtype=torch.bfloat16)
    with pytest.raises(KernelError, match=r"pack_expert: expert_id is 2"):
        packing.pack_expert(experts, 2, "gate", weight)
    with pytest.raises(
        KernelError, match=r"pack_expert: down is bfloat16 \[48, 64\], expected .* \[64, 48\]"
    ):
        packing.pack_expert(experts, 0, "down", weight)
    with pytest.raises(KernelError, match=r"pack_expert: part is 'gte'"):
        packing.pack_expert(experts, 0, "gte", weight)
