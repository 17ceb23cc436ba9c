"""Block-wise float8 (DeepSeek, Qwen): a tensor of e4m3 and one of scales per block. They are widened when
read, or kept as they are where the kernels multiply by them.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import torch

from moe_runtime.checkpoint import Checkpoint, TensorEntry
from moe_runtime.kernels import QuantizedWeight, Weight, WeightFormat
from moe_runtime.kernels.packed import FLOAT8_BLOCK
from moe_runtime.layers.slots import Part, Slot
from moe_runtime.model_config import Fp8Config
from moe_runtime.quant.plain import check_finite, check_shape, refuse

SCALE_SUFFIX = "_scale_inv"
ROWS_PER_STEP = 8  # block rows widened together
LARGEST = 448.0  # of e4m3


@dataclass(frozen=True)
class Fp8Weight:
    """As PlainWeight; ``read`` returns the widened copy in the model's dtype or, if it is ``kept``, codes and
    scales as published.
    """

    slot: Slot
    entry: TensorEntry
    scale: TensorEntry | None
    config: Fp8Config
    dtype: torch.dtype
    kept: bool = False

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return (self.entry,) if self.scale is None else (self.entry, self.scale)

    @property
    def format(self) -> WeightFormat:
        return WeightFormat("float8", FLOAT8_BLOCK) if self.kept else WeightFormat.of(self.dtype)

    def check(self) -> None:
        check_shape(self.entry, self.slot.shape)
        if self.scale is None:
            raise refuse(self.entry, f"float8 without its scales {self.entry.name}{SCALE_SUFFIX}")
        rows, columns = self.entry.shape
        shape = (-(-rows // self.config.block_rows), -(-columns // self.config.block_columns))
        if self.scale.shape != shape or self.scale.dtype not in ("F32", "BF16"):
            raise refuse(
                self.scale,
                f"{self.scale.dtype} {list(self.scale.shape)}, expected F32 or BF16 {list(shape)}",
            )

    def read(self, checkpoint: Checkpoint) -> Weight:
        assert self.scale is not None, "checked"
        tensor, scale = checkpoint.read(self.entry), checkpoint.read(self.scale)
        check_finite(tensor, self.entry)
        check_finite(scale, self.scale)
        codes = None
        if self.kept:
            codes = QuantizedWeight(tensor, scale.float(), None, WeightFormat("float8", FLOAT8_BLOCK))
            if float(codes.scales.abs().amax()) * LARGEST <= torch.finfo(self.dtype).max:
                return codes
        wide = widen_fp8(tensor, scale, self.config, self.dtype)
        check_finite(wide, self.entry)  # a finite scale may still carry it beyond the wider type
        return wide if codes is None else codes


class _HasSlot(Protocol):
    @property
    def slot(self) -> Slot: ...


Stored = TypeVar("Stored", bound=_HasSlot)


def keep_codes(stored: Sequence[Stored], quantized: Collection[Part]) -> list[Stored]:
    """The same weights, those ``kept`` that can be: where one place (a stack of matrices, a layer's experts)
    takes float8, gets nothing else, and no block of scales would straddle two matrices of a stack.
    ``quantized``: the parts that become integers.
    """
    places: defaultdict[tuple[int, str], list[int]] = defaultdict(list)
    for number, weight in enumerate(stored):
        if weight.slot.float8:
            place = weight.slot.places[0]
            places[id(place.owner), place.attribute].append(number)
    result = list(stored)
    for numbers in places.values():
        if all(_can_keep(stored[number], number == numbers[-1], quantized) for number in numbers):
            for number in numbers:
                result[number] = replace(stored[number], kept=True)  # type: ignore[type-var]
    return result


def _can_keep(weight: object, is_last: bool, quantized: Collection[Part]) -> bool:
    if not isinstance(weight, Fp8Weight) or weight.slot.part in quantized:
        return False
    stands_alone = is_last or weight.slot.expert[1] != ""
    square = (weight.config.block_rows, weight.config.block_columns) == (FLOAT8_BLOCK, FLOAT8_BLOCK)
    return square and (stands_alone or weight.entry.shape[0] % FLOAT8_BLOCK == 0)


def widen_fp8(weight: torch.Tensor, scale: torch.Tensor, fp8: Fp8Config, dtype: torch.dtype) -> torch.Tensor:
    """float8 [N, K] times its block's scale, computed in float32, rounded once to ``dtype``."""
    wide = torch.empty(weight.shape, dtype=dtype)
    columns = scale.float().repeat_interleave(fp8.block_columns, dim=1)[:, : weight.shape[1]]
    step = fp8.block_rows * ROWS_PER_STEP
    for start in range(0, len(weight), step):
        rows = weight[start : start + step].float()
        blocks = columns[start // fp8.block_rows :].repeat_interleave(fp8.block_rows, dim=0)
        wide[start : start + step] = rows.mul_(blocks[: len(rows)])
    return wide
