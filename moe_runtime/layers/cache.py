"""The paged memory of past tokens. Layers read and write it; whose blocks are whose, the engine decides."""

import math
from dataclasses import dataclass

import numpy
import torch

from moe_runtime.kernels import CPU
from moe_runtime.kernels.cache_rows import row_size
from moe_runtime.kernels.step import StepProgram
from moe_runtime.layers.rope import Rotation


def zeroed(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU) -> torch.Tensor:
    """Zeros; on the CPU in pages that the system provides when they are first written (calloc): a large
    cache costs neither time at start nor memory before it is used. torch.zeros writes every page.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    raw = numpy.zeros(math.prod(shape) * dtype.itemsize, dtype=numpy.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def new_rows(
    num_blocks: int, heads: int, block_size: int, dim: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Zeroed room for rows of ``dim`` numbers, [num_blocks, heads, block_size, row_size(dim, dtype)]."""
    return zeroed((num_blocks, heads, block_size, row_size(dim, dtype)), dtype, device)


@dataclass(frozen=True)
class LayerCache:
    """keys [num_blocks, heads, block_size, D], or rows of an int8 cache (kernels/cache_rows.py); values
    likewise, or None where the keys hold them (MLA).
    """

    keys: torch.Tensor
    values: torch.Tensor | None


@dataclass
class Cache:
    """One LayerCache per layer, and the rotation of every position that fits into it.

    ``program`` runs the whole model over this cache, as the model was after ``moves`` of its tensors; without
    one the layers are called one by one.
    """

    layers: tuple[LayerCache, ...]
    rotation: Rotation
    program: StepProgram | None = None
    moves: int = 0

    @property
    def num_bytes(self) -> int:
        tensors = [
            tensor for layer in self.layers for tensor in (layer.keys, layer.values) if tensor is not None
        ]
        return int(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
