"""The plain data that travels between the models and the kernels: packed weights and the router's rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from moe_runtime.errors import KernelError

# "rows": the checkpoint's own row-major tensor. "panels": csrc/layout.h, 32-column panels of VNNI k-groups.
Layout = Literal["rows", "panels"]
WEIGHT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """One or several (``heads``) weight matrices [N, K] in the layout their backend reads.

    ``data`` is [heads, N, K] for "rows" and uint8 [heads, bytes] for "panels".
    """

    data: torch.Tensor
    heads: int
    out_features: int  # N
    in_features: int  # K
    dtype: torch.dtype
    layout: Layout

    @property
    def num_bytes(self) -> int:
        return int(self.data.numel() * self.data.element_size())


@dataclass(frozen=True, eq=False)
class PackedExperts:
    """The weights of all experts of one layer, in their final home.

    "rows": gate_up [E, 2, I, H], down [E, H, I]. "panels": uint8 [E, bytes] each.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    num_experts: int  # E
    hidden: int  # H
    intermediate: int  # I
    dtype: torch.dtype
    layout: Layout

    @property
    def num_bytes(self) -> int:
        return int(sum(part.numel() * part.element_size() for part in (self.gate_up, self.down)))


@dataclass(frozen=True)
class RouterSpec:
    """How router logits become expert ids and weights.

    1. Logits are made finite: NaN and -inf become the lowest float, +inf the highest.
    2. Scores are the softmax over all experts, or the sigmoid of each logit.
    3. With groups, the ``topk_groups`` best of ``num_groups`` equal ranges of ids stay in the race; a group
       is as good as its best expert ("max") or as the sum of its best two ("top2_sum").
    4. The ``top_k`` best experts of these win: by score + bias (float32), or, where softmax cannot change the
       order (no bias, no "top2_sum"), by logit. Ties go to the lowest id, for groups too.
    5. Weights are the winners' scores without the bias, divided by their sum + ``norm_epsilon`` when
       ``norm_topk_prob``, times ``routed_scaling``. With ``softmax_after_topk`` they are instead the softmax
       over the winners' logits.
    """

    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    routed_scaling: float = 1.0
    softmax_after_topk: bool = False
    norm_epsilon: float = 0.0

    def check(self, num_experts: int) -> None:
        """KernelError where no row of ``num_experts`` logits could be routed by these rules."""
        if self.scoring not in ("softmax", "sigmoid") or self.group_score not in ("max", "top2_sum"):
            raise KernelError(f"route: unknown scoring {self.scoring!r} or group_score {self.group_score!r}")
        if self.num_groups < 1 or num_experts % self.num_groups:
            raise KernelError(f"route: num_groups = {self.num_groups} does not divide {num_experts} experts")
        if not 1 <= self.topk_groups <= self.num_groups:
            raise KernelError(f"route: topk_groups = {self.topk_groups}, expected 1 to {self.num_groups}")
        eligible = num_experts // self.num_groups * self.topk_groups
        if not 1 <= self.top_k <= eligible:
            raise KernelError(
                f"route: top_k = {self.top_k}, expected 1 to {eligible} (experts in chosen groups)"
            )

    def chooses_by_logit(self, has_bias: bool) -> bool:
        """Softmax keeps the order of logits, and logits have no rounding ties."""
        return self.scoring == "softmax" and not has_bias and self.group_score == "max"
