"""The paged memory of past tokens. Layers read and write it; whose blocks are whose, the engine decides."""

from dataclasses import dataclass

import torch

from moe_runtime.layers.rope import Rotation


@dataclass(frozen=True)
class LayerCache:
    """keys [num_blocks, heads, block_size, D]; values likewise, or None where the keys hold them (MLA)."""

    keys: torch.Tensor
    values: torch.Tensor | None


@dataclass(frozen=True)
class Cache:
    """One LayerCache per layer, and the rotation of every position that fits into it."""

    layers: tuple[LayerCache, ...]
    rotation: Rotation

    @property
    def num_bytes(self) -> int:
        tensors = [
            tensor for layer in self.layers for tensor in (layer.keys, layer.values) if tensor is not None
        ]
        return int(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
