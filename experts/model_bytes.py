"""What a model's experts weigh, from the headers of its weight files; no weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_runtime.checkpoint import Checkpoint
from moe_runtime.errors import CheckpointError
from moe_runtime.loader import expert_tensors
from moe_runtime.plan import ExpertMask


@dataclass(frozen=True)
class ModelBytes:
    """As published: ``full`` of all weight files' tensors, ``experts`` of one expert (all its tensors, scales
    included) by decoder layer.
    """

    full: int
    experts: Mapping[int, int]

    @classmethod
    def of(cls, model_dir: Path, num_experts: Mapping[int, int]) -> ModelBytes:
        """``num_experts`` by decoder layer with a router. Raises CheckpointError."""
        layers = dict.fromkeys(num_experts, 0)
        owners = expert_tensors(model_dir)
        entries = Checkpoint(model_dir).entries
        for name, (layer, _) in owners.items():
            layers[layer] += entries[name].num_bytes
        for layer, num_bytes in layers.items():
            if not num_bytes or num_bytes % num_experts[layer]:
                raise CheckpointError(
                    f"the experts of layer {layer} have {num_bytes} bytes together, which is no equal share "
                    f"for {num_experts[layer]}"
                )
        full = sum(entry.num_bytes for entry in entries.values())
        return cls(full, {layer: num_bytes // num_experts[layer] for layer, num_bytes in layers.items()})

    def kept(self, mask: ExpertMask) -> int:
        """Bytes of a model without the experts that ``mask`` leaves out; router rows count as kept."""
        cut = sum((layer.num_experts - len(layer.kept)) * self.experts[layer.layer] for layer in mask.layers)
        return self.full - cut
