"""Matrices: linear maps, stacked ones that share an input, one per head, and the embedding table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from moe_runtime.kernels import Kernels, PackedLinear
from moe_runtime.layers.slots import Slot, is_separate


@dataclass(frozen=True)
class Rows:
    """``name``.weight gives the next ``count`` output features of a Linear; ``name``.bias their bias."""

    name: str
    count: int
    bias: bool = False


class Linear:
    """x [T, K] -> x W^T + b, float32 [T, N].

    W stacks the rows of one or more checkpoint tensors: projections that read the same x become one call.
    """

    def __init__(
        self, kernels: Kernels, in_features: int, parts: Sequence[Rows], any_float: bool = False
    ) -> None:
        self._kernels = kernels
        self._parts = tuple(parts)
        self._in_features = in_features
        self._out_features = sum(part.count for part in parts)
        self._any_float = any_float
        self._stack: torch.Tensor | None = None  # rows so far, while a stack is being read
        self._missing = len(self._parts)
        self.packed: PackedLinear
        self.bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self._kernels.linear(x, self.packed, self.bias)
        return result

    def slots(self) -> Iterator[Slot]:
        start = 0
        for part in self._parts:
            rows = slice(start, start + part.count)
            yield Slot(
                f"{part.name}.weight",
                (part.count, self._in_features),
                partial(self._write, rows),
                self._any_float,
            )
            if part.bias:
                yield Slot(
                    f"{part.name}.bias",
                    (part.count,),
                    partial(self._write_bias, rows),
                    True,
                )
            start += part.count

    def _write(self, rows: slice, weight: torch.Tensor) -> None:
        if len(self._parts) > 1:
            if self._stack is None:
                self._stack = torch.empty(self._out_features, self._in_features, dtype=weight.dtype)
            self._stack[rows] = weight
            weight = self._stack
        self._missing -= 1
        if self._missing == 0:
            self.packed = pack_owned(self._kernels, weight, keep=self._stack is not None)
            self._stack = None

    def _write_bias(self, rows: slice, bias: torch.Tensor) -> None:
        if self.bias is None:
            self.bias = torch.zeros(self._out_features)
        self.bias[rows] = bias


def pack_owned(kernels: Kernels, weight: torch.Tensor, keep: bool) -> PackedLinear:
    """``weight`` packed into memory of its own; ``keep`` when ``weight`` is ours and may be that memory."""
    packed: PackedLinear = kernels.pack_linear(weight)
    if keep or is_separate(packed.data, weight):
        return packed
    copy: PackedLinear = kernels.pack_linear(weight.clone())
    return copy


class HeadLinear:
    """One small matrix per head: x [T, heads, K] -> [T, heads, N]."""

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels
        self.packed: PackedLinear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self._kernels.linear_heads(x, self.packed)
        return result

    def write(self, weight: torch.Tensor) -> None:
        """weight [heads, N, K], any strides; copied."""
        self.packed = self._kernels.pack_linear_heads(weight.clone(memory_format=torch.contiguous_format))


class Embedding:
    """token ids int64 [T] -> float32 [T, H]. The table keeps the checkpoint's dtype."""

    def __init__(self, name: str, vocab_size: int, hidden: int) -> None:
        self._name = name
        self._shape = (vocab_size, hidden)
        self.table: torch.Tensor

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.table.index_select(0, token_ids).float()

    def slots(self) -> Iterator[Slot]:
        yield Slot(f"{self._name}.weight", self._shape, self._write)

    def _write(self, weight: torch.Tensor) -> None:
        self.table = weight.clone()


class TiedHead:
    """The output projection of a model that uses its embedding table for it.

    Backends with a packed layout of their own hold the matrix twice: rows to look up, packed to multiply.
    """

    def __init__(self, kernels: Kernels, embedding: Embedding) -> None:
        self._kernels = kernels
        self._embedding = embedding
        self.packed: PackedLinear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self._kernels.linear(x, self.packed, None)
        return result

    def slots(self) -> Iterator[Slot]:
        """The embedding's own slot, packing after it."""
        for slot in self._embedding.slots():
            yield Slot(slot.name, slot.shape, self._write)

    def _write(self, weight: torch.Tensor) -> None:
        self._embedding.table = weight.clone()
        self.packed = pack_owned(self._kernels, self._embedding.table, keep=True)
