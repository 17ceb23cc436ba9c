"""The plain data that travels between the models and the kernels: weights, in integers or packed, and the
router's rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

from moe_runtime.errors import KernelError

# "rows": the checkpoint's own row-major tensor. "panels": csrc/layout.h, 32-column panels of VNNI k-groups.
Layout = Literal["rows", "panels"]
Kind = Literal["float32", "bfloat16", "float16", "int8", "int4", "float8"]
KINDS: tuple[Kind, ...] = ("float32", "bfloat16", "float16", "int8", "int4")  # csrc/layout.h's numbers
GROUPS = (32, 64, 128)
FLOAT8_BLOCK = 128  # rows and columns that share a scale
NOBODY = -2  # the mask row of a row that pads a batch: the Triton router gives it no expert


@dataclass(frozen=True)
class WeightFormat:
    """How the elements of a weight matrix [N, K] are stored.

    int8: one scale per row n. int4: one scale per row and ``group`` of k, and a zero point too with ``zeros``
    (else it is 8). float8 (e4m3; the Triton kernels alone): one scale per 128 rows and 128 of k, or, with a
    ``group`` of 0, per row. The others are plain numbers.
    """

    kind: Kind
    group: int = 0
    zeros: bool = False

    def __post_init__(self) -> None:
        if self.kind not in (*KINDS, "float8"):
            raise KernelError(f"weight format {self.kind!r}, expected one of {', '.join(KINDS)}, float8")
        if self.kind == "int4" and self.group not in GROUPS:
            raise KernelError(f"int4 in groups of {self.group}, expected one of {GROUPS}")
        if self.kind == "float8" and self.group not in (0, FLOAT8_BLOCK):
            raise KernelError(f"float8 in groups of {self.group}, expected {FLOAT8_BLOCK} or 0")
        if (self.kind not in ("int4", "float8") and self.group) or (self.kind != "int4" and self.zeros):
            raise KernelError(f"{self.kind} has no such scale groups or zero points")

    @classmethod
    def of(cls, what: torch.dtype | WeightFormat) -> WeightFormat:
        """The format of a plain tensor's dtype; a format is itself."""
        if isinstance(what, WeightFormat):
            return what
        name = str(what).removeprefix("torch.")
        if name not in KINDS[:3]:
            raise KernelError(f"weights of {what}, expected one of {', '.join(KINDS[:3])}")
        return cls(name)

    @property
    def is_integer(self) -> bool:
        return self.kind in ("int8", "int4")

    @property
    def is_plain(self) -> bool:
        """Whether a weight is one tensor of plain numbers."""
        return self.kind in ("float32", "bfloat16", "float16")

    @property
    def tag(self) -> int:
        """csrc/layout.h's number of this format."""
        return KINDS.index(self.kind) | self.group << 8 | self.zeros << 24

    @property
    def dtype(self) -> torch.dtype:
        """Of the plain tensor; of the dequantised one for integers and float8."""
        plain: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16}
        return plain.get(self.kind, torch.float32)

    @property
    def bits_per_weight(self) -> float:
        """Of large matrices, scales and zero points included."""
        if self.kind == "int4":
            return 4 + (16 + 8 * self.zeros) / self.group
        if self.kind == "float8":
            return 8 + (32 / self.group**2 if self.group else 0)
        return {"float32": 32.0, "int8": 8.0}.get(self.kind, 16.0)

    def num_groups(self, k: int) -> int:
        """Scales per row of K = ``k``."""
        return -(-k // self.group) if self.group else 1

    @property
    def rows_per_scale(self) -> int:
        return FLOAT8_BLOCK if self.kind == "float8" and self.group else 1

    def __str__(self) -> str:
        return f"{self.kind}-g{self.group}{'z' if self.zeros else ''}" if self.group else self.kind


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """One matrix [N, K] in integers or float8, row-major.

    value[n, k] = scales[n // r, g] * (codes[n, k] - zero[n, g]) with g = k // group, r = rows_per_scale.
    codes uint8 [N, K]: 0 to 15 for int4, 1 to 255 for int8; float8_e4m3fn, all finite, for float8.
    scales float32 [N / r, num_groups(K)], rounded up; the kernels store an int4 scale as float16 times a
    power of two of its row, and packing refuses one that this would change. zeros uint8 [N, num_groups(K)],
    or None: the zero point is 8 (int4), 128 (int8) or 0 (float8).
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    format: WeightFormat

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        shape = (-(-n // self.format.rows_per_scale), self.format.num_groups(k))
        if self.format.is_plain or (self.zeros is not None) != self.format.zeros:
            raise KernelError(f"quantised weight: format {self.format} does not fit its parts")
        zeros = self.scales if self.zeros is None else self.zeros
        dtypes = (self.codes.dtype, self.scales.dtype, zeros.dtype)
        codes = torch.uint8 if self.format.is_integer else torch.float8_e4m3fn
        wanted = (codes, torch.float32, torch.float32 if self.zeros is None else torch.uint8)
        if self.scales.shape != shape or zeros.shape != shape or dtypes != wanted:
            raise KernelError(f"quantised weight {self.format} [{n}, {k}]: wrong shape or dtype of a part")

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dequantize(self) -> torch.Tensor:
        """float32 [N, K]."""
        n, k = self.codes.shape
        group, rows = self.format.group or k, self.format.rows_per_scale
        scales = self.scales if rows == 1 else self.scales.repeat_interleave(rows, dim=0)[:n]
        scales = scales.repeat_interleave(group, dim=1)[:, :k]
        if self.format.kind == "float8":
            return self.codes.float().mul_(scales)
        zero = 128 if self.format.kind == "int8" else 8
        zeros = torch.full_like(self.scales, zero) if self.zeros is None else self.zeros.float()
        return (self.codes.float() - zeros.repeat_interleave(group, dim=1)[:, :k]).mul_(scales)


Weight: TypeAlias = torch.Tensor | QuantizedWeight


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """One or several (``heads``) weight matrices [N, K] in the layout their backend reads.

    ``data`` is [heads, N, K] for "rows" (dequantised where the format is of integers) and uint8
    [heads, bytes] for "panels".
    """

    data: torch.Tensor
    heads: int
    out_features: int  # N
    in_features: int  # K
    format: WeightFormat
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
    format: WeightFormat
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
