"""Which experts of a layer are in memory, and the step from an expert's id to its place there.

A router always chooses among all E experts of its layer; weights may be there for R of them. Between the two
stands a map of E numbers. Where all experts are in memory there is none, and nothing to do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_runtime.errors import KernelError

# What a map says of an expert that has no place. Negative, so that no kernel can take it for one.
ABSENT = -1  # in no memory: nothing may choose it
ELSEWHERE = -2  # other kernels compute it


@dataclass(frozen=True, eq=False)
class Residence:
    """slot_of    int32 [E] on the kernels' device: the place of each expert, or ABSENT or ELSEWHERE
    num_slots  R, the experts that have one
    layer      the decoder layer, for messages
    missed     int64 [1] on the kernels' device: choices of absent experts, counted by kernels that cannot
               raise an error
    """

    slot_of: torch.Tensor
    num_slots: int
    layer: int
    missed: torch.Tensor


def expert_slots(expert_ids: torch.Tensor, residence: Residence, num_constants: int = 0) -> torch.Tensor:
    """int32 [T, top_k] ids of a layer's experts -> int32 [T, top_k] their places; what every backend must
    equal. The ids of constants, ``num_constants`` from E on, become as many from R on. KernelError names
    layer and expert of one that has none; on a GPU that stays what the map says of it, adds nothing to a
    mixture, and is counted if it is ABSENT.
    """
    num_experts = residence.slot_of.shape[0]
    known = (expert_ids >= 0) & (expert_ids < num_experts)
    slots = residence.slot_of[torch.where(known, expert_ids, 0).long()]
    is_constant = (expert_ids >= num_experts) & (expert_ids < num_experts + num_constants)
    bad = torch.nonzero(~is_constant & (~known | (slots < 0) | (slots >= residence.num_slots)))
    if len(bad):
        token, column = bad[0].tolist()
        why = "is not in memory; its mask allows more than the placement holds"
        raise KernelError(
            f"layer {residence.layer}: expert {int(expert_ids[token, column])}, chosen by token {token} of "
            f"the batch, {why if known[token, column] else 'does not exist'}"
        )
    return torch.where(is_constant, residence.num_slots + expert_ids - num_experts, slots)
