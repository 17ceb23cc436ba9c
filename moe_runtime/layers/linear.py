"""Matrices: linear maps, stacked ones that share an input, one per head, and the embedding table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from moe_runtime.kernels import Kernels, PackedLinear, QuantizedWeight, Weight
from moe_runtime.layers.slots import Part, Place, Slot, is_separate


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
        self,
        kernels: Kernels,
        in_features: int,
        parts: Sequence[Rows],
        any_float: bool = False,
        part: Part | None = None,
    ) -> None:
        self._kernels = kernels
        self._parts = tuple(parts)
        self._part = part
        self._in_features = in_features
        self._out_features = sum(part.count for part in parts)
        self._any_float = any_float
        self._written: list[Weight] = []  # so far, while a stack is being read
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
                self._write,
                self._any_float,
                self._part,
                float8=self._kernels.float8 and self._part is not None,
                places=(Place(self, "packed"),),
            )
            if part.bias:
                yield Slot(
                    f"{part.name}.bias",
                    (part.count,),
                    partial(self._write_bias, rows),
                    True,
                    places=(Place(self, "bias"),),
                )
            start += part.count

    def _write(self, weight: Weight) -> None:
        """The parts come in order, as ``slots`` names them."""
        self._written.append(weight)
        if len(self._written) == len(self._parts):
            stacked = stack(self._written)
            self._written = []
            self.packed = pack_owned(self._kernels, stacked, keep=stacked is not weight)

    def _write_bias(self, rows: slice, bias: torch.Tensor) -> None:
        if self.bias is None:
            self.bias = torch.zeros(self._out_features, device=self._kernels.device)
        self.bias[rows] = bias


def stack(weights: Sequence[Weight]) -> Weight:
    """Weights [N_i, K] on top of each other. Where they differ in format, or rows of two would share a scale,
    all are widened.
    """
    if len(weights) == 1:
        return weights[0]
    quantized = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    alike = len(quantized) == len(weights) and len({weight.format for weight in quantized}) == 1
    if alike and not any(weight.shape[0] % weight.format.rows_per_scale for weight in quantized[:-1]):
        zeros = [weight.zeros for weight in quantized if weight.zeros is not None]
        return QuantizedWeight(
            torch.cat([weight.codes for weight in quantized]),
            torch.cat([weight.scales for weight in quantized]),
            torch.cat(zeros) if zeros else None,
            quantized[0].format,
        )
    floats = [weight for weight in weights if isinstance(weight, torch.Tensor)]
    dtype = floats[0].dtype if floats else torch.float32
    return torch.cat(
        [
            weight.dequantize().to(dtype) if isinstance(weight, QuantizedWeight) else weight
            for weight in weights
        ]
    )


def pack_owned(kernels: Kernels, weight: Weight, keep: bool) -> PackedLinear:
    """``weight`` packed into memory of its own; ``keep`` when ``weight`` is ours and may be that memory."""
    packed: PackedLinear = kernels.pack_linear(weight)
    if keep or isinstance(weight, QuantizedWeight) or is_separate(packed.data, weight):
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

    def write(self, matrices: Sequence[Weight]) -> None:
        """One [N, K] per head, all in one format; copied."""
        tensors = [matrix for matrix in matrices if isinstance(matrix, torch.Tensor)]
        self.packed = self._kernels.pack_linear_heads(torch.stack(tensors) if tensors else list(matrices))


class Embedding:
    """token ids int64 [T] -> float32 [T, H]. The table keeps the checkpoint's dtype."""

    def __init__(self, kernels: Kernels, name: str, vocab_size: int, hidden: int) -> None:
        self._device = kernels.device
        self._name = name
        self._shape = (vocab_size, hidden)
        self.table: torch.Tensor

    def __call__(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.table.index_select(0, token_ids).float()

    def slots(self) -> Iterator[Slot]:
        yield Slot(f"{self._name}.weight", self._shape, self._write, places=(Place(self, "table"),))

    def _write(self, weight: torch.Tensor) -> None:
        self.table = weight.to(self._device, copy=True)


class TiedHead:
    """The output projection of a model that uses its embedding table for it.

    Backends with a packed layout of their own hold the matrix twice: rows to look up, packed to multiply (and
    quantised, if the user wants that of the head).
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
            yield Slot(
                slot.name,
                slot.shape,
                self._write,
                part="lm_head",
                keep=slot.write,
                places=(*slot.places, Place(self, "packed")),
            )

    def _write(self, weight: Weight) -> None:
        if isinstance(weight, torch.Tensor):
            weight = self._embedding.table  # where the backend keeps rows, once is enough
        self.packed = pack_owned(self._kernels, weight, keep=True)
