"""RMS norm, alone and fused with the addition to the residual stream."""

from collections.abc import Iterator

import torch

from moe_runtime.kernels import Kernels
from moe_runtime.layers.slots import Place, Slot


class RmsNorm:
    """x / rms(x) * weight over the last dimension, float32."""

    def __init__(self, kernels: Kernels, name: str, size: int, eps: float) -> None:
        self._kernels = kernels
        self._name = name
        self.eps = eps
        self._size = size
        self.weight: torch.Tensor

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self._kernels.rms_norm(x, self.weight, self.eps)
        return result

    def add(self, update: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(residual + update), residual + update), both [T, H]."""
        result: tuple[torch.Tensor, torch.Tensor]
        result = self._kernels.add_rms_norm(update, residual, self.weight, self.eps)
        return result

    def slots(self) -> Iterator[Slot]:
        yield Slot(
            f"{self._name}.weight",
            (self._size,),
            self._write,
            any_float=True,
            places=(Place(self, "weight"),),
        )

    def _write(self, weight: torch.Tensor) -> None:
        self.weight = weight.to(self._kernels.device, torch.float32, copy=True)
