"""A weight that is one tensor of the checkpoint. The other files here have the same members."""

import math
from dataclasses import dataclass

import torch

from moe_runtime.checkpoint import DTYPES, Checkpoint, TensorEntry
from moe_runtime.errors import CheckpointError
from moe_runtime.kernels import WeightFormat
from moe_runtime.layers.slots import Slot

CHECK_ELEMENTS = 1 << 22  # elements looked at together when searching for NaN


@dataclass(frozen=True)
class PlainWeight:
    """``entries`` are the tensors it is made of; ``check`` compares them with the slot before anything is
    read; ``read`` returns the weight, all finite and in ``format``: here a view of the file. Both raise
    CheckpointError.
    """

    slot: Slot
    entry: TensorEntry
    dtype: torch.dtype  # the model's

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        return (self.entry,)

    @property
    def format(self) -> WeightFormat:
        return WeightFormat.of(DTYPES[self.entry.dtype])

    def check(self) -> None:
        check_shape(self.entry, self.slot.shape)
        dtype = DTYPES.get(self.entry.dtype)
        if dtype is None or dtype in (torch.float8_e4m3fn, torch.int32):
            raise refuse(self.entry, f"dtype {self.entry.dtype} is not one this model's config allows here")
        if not self.slot.any_float and dtype is not self.dtype:
            wanted = str(self.dtype).removeprefix("torch.")
            raise refuse(self.entry, f"dtype {self.entry.dtype}, but config.json says {wanted}")

    def read(self, checkpoint: Checkpoint) -> torch.Tensor:
        tensor = checkpoint.read(self.entry)
        check_finite(tensor, self.entry)
        return tensor


def refuse(entry: TensorEntry, message: str) -> CheckpointError:
    return CheckpointError(message, file=entry.path.name, tensor=entry.name)


def check_shape(entry: TensorEntry, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise refuse(entry, f"shape {list(entry.shape)}, config.json makes it {list(shape)}")


def check_finite(tensor: torch.Tensor, entry: TensorEntry) -> None:
    """Raise CheckpointError naming the first NaN or infinity; ``entry`` says where the tensor came from."""
    flat = tensor.view(-1)
    for start in range(0, len(flat), CHECK_ELEMENTS):
        part = flat[start : start + CHECK_ELEMENTS]
        if part.dtype is torch.float8_e4m3fn:
            bad = bool((part.view(torch.uint8) & 0x7F == 0x7F).any())  # e4m3fn has NaN but no infinity
        else:
            # The extremes of a part with NaN are NaN, of one with infinity infinite.
            low, high = part.aminmax()
            bad = not (math.isfinite(low) and math.isfinite(high))
        if bad:
            index = next(i for i, value in enumerate(part.float().tolist(), start) if value - value != 0)
            where = ", ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(index), tensor.shape))
            raise refuse(entry, f"NaN or infinity at [{where}]")
