"""Block-wise float8 (DeepSeek, Qwen): a tensor of e4m3 and one of scales per block; widened when read."""

from dataclasses import dataclass

import torch

from moe_runtime.checkpoint import Checkpoint, TensorEntry
from moe_runtime.layers.slots import Slot
from moe_runtime.model_config import Fp8Config
from moe_runtime.quant.plain import check_finite, check_shape, refuse

SCALE_SUFFIX = "_scale_inv"
ROWS_PER_STEP = 8  # block rows widened together


@dataclass(frozen=True)
class Fp8Weight:
    """As PlainWeight; ``read`` returns the widened copy in the model's dtype."""

    slot: Slot
    entry: TensorEntry
    scale: TensorEntry | None
    config: Fp8Config
    dtype: torch.dtype

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return (self.entry,) if self.scale is None else (self.entry, self.scale)

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

    def read(self, checkpoint: Checkpoint) -> torch.Tensor:
        assert self.scale is not None, "checked"
        tensor, scale = checkpoint.read(self.entry), checkpoint.read(self.scale)
        check_finite(tensor, self.entry)
        check_finite(scale, self.scale)
        wide = widen_fp8(tensor, scale, self.config, self.dtype)
        check_finite(wide, self.entry)  # a finite scale may still carry it beyond the wider type
        return wide


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
