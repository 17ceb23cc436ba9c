"""4-bit weights as published (AWQ, GPTQ): unpacked code for code, never rounded again.

A linear map ``name`` is qweight, qzeros and scales below ``name``. instead of ``name``.weight. What differs
between the methods is in awq.py and gptq.py, which have three functions each:

    code_shape(N, K)  the shape of qweight
    codes(qweight)    uint8 [N, K]
    zeros(qzeros)     uint8 [N, groups], as stored
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol, cast

import torch

from moe_runtime.checkpoint import Checkpoint, TensorEntry
from moe_runtime.errors import CheckpointError
from moe_runtime.kernels import QuantizedWeight, WeightFormat
from moe_runtime.layers.slots import Slot
from moe_runtime.model_config import Int4Config
from moe_runtime.quant import awq, gptq
from moe_runtime.quant.plain import check_finite, check_shape, refuse

CODES, ZEROS, SCALES, ORDER = "qweight", "qzeros", "scales", "g_idx"
NO_ZERO_POINT = 8


class Method(Protocol):
    def code_shape(self, num_rows: int, in_features: int) -> tuple[int, int]: ...
    def codes(self, qweight: torch.Tensor) -> torch.Tensor: ...
    def zeros(self, qzeros: torch.Tensor) -> torch.Tensor: ...


METHODS: Mapping[str, Method] = MappingProxyType({"awq": cast(Method, awq), "gptq": cast(Method, gptq)})


def find_int4(slot: Slot, checkpoint: Checkpoint, config: Int4Config) -> "Int4Weight | None":
    """The slot's weight, if the checkpoint has it in 4 bits."""
    name = slot.name.removesuffix(".weight")
    parts = {
        part: checkpoint.entries[f"{name}.{part}"]
        for part in (CODES, ZEROS, SCALES, ORDER)
        if f"{name}.{part}" in checkpoint.entries
    }
    return Int4Weight(slot, parts, config) if CODES in parts and len(slot.shape) == 2 else None


@dataclass(frozen=True)
class Int4Weight:
    """As PlainWeight; ``read`` returns a QuantizedWeight."""

    slot: Slot
    parts: Mapping[str, TensorEntry]
    config: Int4Config

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return tuple(self.parts.values())

    @property
    def format(self) -> WeightFormat:
        # A larger stored group is several of ours with equal scales.
        group = self.config.group if self.config.group in (32, 64) else 128
        return WeightFormat("int4", group, self.config.zeros)

    def check(self) -> None:
        num_rows, in_features = self.slot.shape
        if num_rows % 8 or in_features % 8:
            raise refuse(self.parts[CODES], f"{num_rows} x {in_features} cannot be packed by eights")
        groups = -(-in_features // (self.config.group or in_features))
        shapes = {
            CODES: METHODS[self.config.method].code_shape(num_rows, in_features),
            ZEROS: (groups, num_rows // 8),
            SCALES: (groups, num_rows),
            ORDER: (in_features,),
        }
        for part, shape in shapes.items():
            entry = self.parts.get(part)
            if entry is None:
                if part == ORDER:
                    continue
                name = f"{self.slot.name.removesuffix('weight')}{part}"
                raise CheckpointError("missing from the checkpoint", tensor=name)
            check_shape(entry, shape)
            allowed = ("F16", "BF16") if part == SCALES else ("I32",)
            if entry.dtype not in allowed:
                raise refuse(entry, f"dtype {entry.dtype}, expected {' or '.join(allowed)}")

    def read(self, checkpoint: Checkpoint) -> QuantizedWeight:
        config, method = self.config, METHODS[self.config.method]
        num_rows, in_features = self.slot.shape
        stored_group = config.group or in_features
        self._check_order(checkpoint, stored_group)
        scales = checkpoint.read(self.parts[SCALES])
        check_finite(scales, self.parts[SCALES])
        codes = method.codes(checkpoint.read(self.parts[CODES]))
        # The sum runs over 4 bits: AutoGPTQ's zero point 0 is stored as 15.
        zeros = method.zeros(checkpoint.read(self.parts[ZEROS])).add_(config.zero_offset).bitwise_and_(0xF)
        if not config.zeros and not bool((zeros == NO_ZERO_POINT).all()):
            raise refuse(
                self.parts[ZEROS], f"a zero point other than {NO_ZERO_POINT}, but config.json says sym"
            )
        stored = torch.arange(0, in_features, self.format.group) // stored_group
        return QuantizedWeight(
            codes,
            scales.t().float()[:, stored].contiguous(),
            zeros[:, stored].contiguous() if config.zeros else None,
            self.format,
        )

    def _check_order(self, checkpoint: Checkpoint, group: int) -> None:
        entry = self.parts.get(ORDER)
        if entry is None:
            return
        expected = torch.arange(entry.shape[0], dtype=torch.int32) // group
        if not torch.equal(checkpoint.read(entry), expected):
            raise refuse(
                entry,
                "the inputs are reordered (desc_act), which is not supported; quantise with desc_act=False",
            )
