"""Ids of experts become their places in memory, or an error that says which expert is missing."""

from collections.abc import Callable

import pytest
import torch
from kernels.oracle import random_experts, random_routing

from moe_runtime.errors import KernelError
from moe_runtime.kernels import cpu, packing
from moe_runtime.kernels.residence import ABSENT, Residence, expert_slots

Operation = Callable[[torch.Tensor, Residence], torch.Tensor]
OPERATIONS: list[Operation] = [cpu.expert_slots, expert_slots]


def residence(slot_of: list[int], num_slots: int | None = None) -> Residence:
    count = sum(slot >= 0 for slot in slot_of) if num_slots is None else num_slots
    return Residence(torch.tensor(slot_of, dtype=torch.int32), count, 5, torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("tokens", [0, 1, 7, 300])
def test_ids_become_places(operation: Operation, tokens: int) -> None:
    here = residence([3, ABSENT, 0, 1, ABSENT, 2])
    allowed = torch.tensor([0, 2, 3, 5], dtype=torch.int32)
    ids = allowed[torch.randint(4, (tokens, 2), generator=torch.Generator().manual_seed(tokens))]
    before = ids.clone()
    slots = operation(ids, here)
    assert slots.dtype is torch.int32 and torch.equal(slots, here.slot_of[ids.long()])
    assert torch.equal(ids, before)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (1, "layer 5: expert 1, chosen by token 2 of the batch, is not in memory; its mask allows more"),
        (4, "layer 5: expert 4, chosen by token 2 of the batch, is not in memory"),
        (6, "layer 5: expert 6, chosen by token 2 of the batch, does not exist"),
        (-1, "layer 5: expert -1, chosen by token 2 of the batch, does not exist"),
        (2**31 - 1, "layer 5: expert 2147483647, chosen by token 2"),
        (3, "layer 5: expert 3, chosen by token 2 of the batch, is not in memory"),  # a place beyond the last
    ],
)
def test_an_expert_without_a_place_is_named(operation: Operation, bad: int, message: str) -> None:
    here = residence([1, ABSENT, 0, 9, ABSENT, 1], 2)
    ids = torch.tensor([[0, 2], [5, 0], [2, bad], [1, 1]], dtype=torch.int32)
    with pytest.raises(KernelError, match=message):
        operation(ids, here)


def test_a_part_of_the_experts_computes_the_same_bits_as_all(isa: str) -> None:
    kept = (1, 2, 5, 6)
    whole = random_experts(8, 96, 48, torch.bfloat16).packed
    part = packing.new_experts(len(kept), 96, 48, torch.bfloat16)
    for slot, expert in enumerate(kept):
        for name in ("gate", "up", "down"):
            packing.pack_expert(part, slot, name, packing.unpack_expert(whole, expert, name))
    here = residence([kept.index(expert) if expert in kept else ABSENT for expert in range(8)])
    for tokens in (1, 40):
        places, weights = random_routing(tokens, len(kept), 3, seed=tokens)
        ids = torch.tensor(kept, dtype=torch.int32)[places.long()]
        x = torch.randn(tokens, 96, generator=torch.Generator().manual_seed(tokens))
        got = cpu.fused_moe(x, cpu.expert_slots(ids, here), weights, part)
        assert torch.equal(got, cpu.fused_moe(x, ids, weights, whole))


def test_a_wrong_map_or_wrong_ids_are_refused() -> None:
    with pytest.raises(KernelError, match=r"expert_slots: expert_ids is torch.int64"):
        cpu.expert_slots(torch.zeros(2, 2, dtype=torch.int64), residence([0, 1]))
    wide = Residence(torch.tensor([0, 1]), 2, 0, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(KernelError, match=r"expert_slots: slot_of is torch.int64"):
        cpu.expert_slots(torch.zeros(2, 2, dtype=torch.int32), wide)
