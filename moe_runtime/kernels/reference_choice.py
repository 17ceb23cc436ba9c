"""What ``route`` of reference.py chooses among, in which order, and what the chosen weigh."""

from __future__ import annotations

import torch

from moe_runtime.errors import KernelError
from moe_runtime.kernels.packed import RouterSpec


def forbidden_experts(
    num_tokens: int, num_experts: int, masks: torch.Tensor | None, mask_rows: torch.Tensor | None
) -> torch.Tensor:
    """bool [T, E]: the experts that a token may not use."""
    if masks is None or mask_rows is None:
        if masks is not mask_rows:
            raise KernelError("route: masks and mask_rows, expected both or neither")
        return torch.zeros(num_tokens, num_experts, dtype=torch.bool)
    if masks.shape[1:] != (num_experts,) or mask_rows.shape != (num_tokens,):
        raise KernelError(
            f"route: masks {list(masks.shape)} and mask_rows {list(mask_rows.shape)}, "
            f"expected [M, {num_experts}] and [{num_tokens}]"
        )
    if num_tokens and not -1 <= int(mask_rows.min()) <= int(mask_rows.max()) < masks.shape[0]:
        raise KernelError(f"route: mask_rows out of range, expected -1 <= row < {masks.shape[0]}")
    none = torch.zeros(1, num_experts, dtype=torch.bool, device=masks.device)
    return torch.cat((masks == 0, none))[mask_rows.long()]  # row -1 is the last


def in_chosen_groups(choice: torch.Tensor, spec: RouterSpec) -> torch.Tensor:
    """int32 [T, E]: 1 for the experts of the ``topk_groups`` best groups; choice is -inf where forbidden."""
    grouped = choice.view(choice.shape[0], spec.num_groups, choice.shape[1] // spec.num_groups)
    best = grouped.sort(dim=-1, descending=True, stable=True).values
    group_scores = best[..., 0]
    if spec.group_score == "top2_sum" and best.shape[-1] > 1:
        second = best[..., 1]
        group_scores = best[..., 0] + second.masked_fill(second == -torch.inf, 0.0)
    kept = best_first((best[..., 0] > -torch.inf).int(), group_scores)[:, : spec.topk_groups]
    chosen = torch.zeros_like(group_scores, dtype=torch.int32).scatter_(1, kept, 1)
    return chosen.repeat_interleave(grouped.shape[-1], dim=1)


def best_first(level: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The order of each row: by level, then by value, both highest first; ties go to the lowest index."""
    by_value = value.sort(dim=-1, descending=True, stable=True).indices
    by_level = level.gather(1, by_value).sort(dim=-1, descending=True, stable=True).indices
    return by_value.gather(1, by_level)


def weigh(
    ids: torch.Tensor, fenced: torch.Tensor, scores: torch.Tensor, forbidden: torch.Tensor, spec: RouterSpec
) -> torch.Tensor:
    """float64 [T, top_k] of the chosen ids int64 [T, top_k]. The others are [T, E]: the logits, -inf where
    forbidden, their scores, and what is forbidden.
    """
    if spec.softmax_after_topk:
        weights = fenced.gather(1, ids).softmax(-1).masked_fill(forbidden.gather(1, ids), 0.0)
    else:
        weights = scores.gather(1, ids)
        if spec.norm_topk_prob:
            total = weights.sum(-1, keepdim=True) + spec.norm_epsilon
            weights = weights / torch.where(total > 0, total, 1.0)
    return weights * spec.routed_scaling
