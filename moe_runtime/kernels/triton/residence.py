# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Ids of experts -> their places in memory, where not all of a layer's experts are on the device.

A device cannot raise an error. An expert without a place keeps the negative number that the map has for it,
which fused_moe.py leaves out; choices of experts that nobody computes are counted, for the host to look at.
A negative id, of a row that only pads a batch, chooses nothing. The ids of constants follow the experts', and
become those after the experts that are here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.checks import check_dims
from moe_runtime.kernels.residence import ABSENT, ELSEWHERE, Residence
from moe_runtime.kernels.triton.aot_case import AotCase
from moe_runtime.kernels.triton.arguments import check

PAIRS = 256  # of a program


@triton.jit(do_not_specialize=["num_pairs", "num_constants"])
def _expert_slots_kernel(
    ids, slot_of, slots, missed, num_pairs, num_experts, num_slots, num_constants,
    ABSENT_SLOT: tl.constexpr, NO_SLOT: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """slots [pairs]; ``missed`` grows by the absent ones."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    inside = pair < num_pairs
    expert = tl.load(ids + pair, mask=inside, other=0)
    known = (expert >= 0) & (expert < num_experts)
    slot = tl.load(slot_of + expert, mask=inside & known, other=ABSENT_SLOT)
    slot = tl.where(expert < 0, NO_SLOT, slot)
    constant = expert - num_experts
    slot = tl.where((constant >= 0) & (constant < num_constants), num_slots + constant, slot)
    tl.store(slots + pair, slot, mask=inside)
    absent = tl.sum((inside & (slot == ABSENT_SLOT)).to(tl.int32), 0)
    if absent > 0:
        tl.atomic_add(missed, absent.to(tl.int64))


def expert_slots(expert_ids: torch.Tensor, residence: Residence, num_constants: int = 0) -> torch.Tensor:
    """ids int32 [T, top_k] -> int32 [T, top_k]"""
    op, device = "expert_slots", residence.slot_of.device
    check_dims(op, "expert_ids", expert_ids, 2)
    check(op, "expert_ids", expert_ids, expert_ids.shape, device, (torch.int32,))
    check(op, "missed", residence.missed, (1,), device, (torch.int64,))
    num_experts, num_pairs = residence.slot_of.shape[0], expert_ids.numel()
    slots = torch.empty_like(expert_ids)
    if num_pairs:
        _expert_slots_kernel[(triton.cdiv(num_pairs, PAIRS),)](
            expert_ids, residence.slot_of, slots, residence.missed, num_pairs, num_experts,
            residence.num_slots, num_constants, ABSENT_SLOT=ABSENT, NO_SLOT=ELSEWHERE, PAIRS=PAIRS,
            num_warps=4,
        )  # fmt: skip
    return slots


# --- ahead of time ------------------------------------------------------------------------------------------

_POINTERS = {"ids": "*i32", "slot_of": "*i32", "slots": "*i32", "missed": "*i64"}
_SIZES = ("num_pairs", "num_experts", "num_slots", "num_constants")
_CONSTANTS = {"ABSENT_SLOT": ABSENT, "NO_SLOT": ELSEWHERE, "PAIRS": PAIRS}
AOT_CASES = (
    AotCase(
        f"{PAIRS} pairs",
        _expert_slots_kernel,
        _POINTERS | dict.fromkeys(_SIZES, "i32") | dict.fromkeys(_CONSTANTS, "constexpr"),
        _CONSTANTS,
        4,
        3,
        ("ids", "slots", "slot_of"),  # ``missed`` is one of a row of counters
    ),
)
