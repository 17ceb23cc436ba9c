"""What a scenario may carry to make up for the experts it lacks, as plain data; no expert is touched.

``constants``: every absent expert's mean output stands in for it, and the router chooses as if nothing were
cut (MoNE, arXiv 2507.00390). ``router``: numbers that are added to the kept experts' router logits before
they are scored, so that the masked layer's output comes nearer to the full one's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from moe_runtime.errors import PlanError
from moe_runtime.plan import ExpertMask

Kind = Literal["constants", "router"]


@dataclass(frozen=True, eq=False)
class Recovery:
    """float32 tensors by decoder layer, for every layer of the mask that it was made for.

    constants   [experts that the layer's mask does not keep, H], ascending ids
    router      [E]: 0 for experts that are not kept
    """

    kind: Kind
    layers: Mapping[int, torch.Tensor]

    def check(self, mask: ExpertMask) -> None:
        """Raises PlanError unless it was made for a mask of this shape."""
        if self.kind not in ("constants", "router"):
            raise PlanError(f"recovery of kind {self.kind!r}: must be constants or router")
        if {*self.layers} != {layer.layer for layer in mask.layers}:
            raise PlanError("recovery and mask are of different layers: they were made for different models")
        for layer in mask.layers:
            found = self.layers[layer.layer]
            lacking = layer.num_experts - len(layer.kept)
            rows = lacking if self.kind == "constants" else layer.num_experts
            if found.dtype != torch.float32 or found.shape[:1] != (rows,):
                raise PlanError(
                    f"recovery of layer {layer.layer} is {found.dtype} {list(found.shape)}, where the mask "
                    f"needs {rows} rows of float32"
                )
            if not found.isfinite().all():
                raise PlanError(f"recovery of layer {layer.layer} has numbers that are not finite")

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of kind, layers and numbers."""
        found = hashlib.sha256(self.kind.encode())
        for layer, numbers in sorted(self.layers.items()):
            found.update(f"\n{layer} {list(numbers.shape)}\n".encode())
            found.update(numbers.contiguous().numpy().astype("<f4", copy=False).tobytes())
        return found.hexdigest()
