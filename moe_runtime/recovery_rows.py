"""What scenarios carry for the experts that they lack, on its way into the tables of a model's layers."""

from __future__ import annotations

from typing import Any

import torch

from moe_runtime.errors import PlanError
from moe_runtime.plan import ExpertMask
from moe_runtime.recovery import Recovery


class RecoveryRows:
    """By mask row. Belongs to whoever writes the masks (masks.py); between steps alone."""

    def __init__(self, model: Any) -> None:
        """``model``: its ``mixtures()`` are the layers with routers, whose tables' ``moves`` it counts."""
        self._model = model
        self._rows: set[int] = set()

    def check(self, name: str, mask: ExpertMask, recovery: Recovery) -> None:
        """Raises PlanError for a recovery that was made for another mask or another model."""
        recovery.check(mask)
        hidden = self._model.config.hidden_size
        for layer, numbers in recovery.layers.items():
            width = (hidden,) if recovery.kind == "constants" else ()
            if numbers.shape[1:] != width:
                raise PlanError(
                    f"scenario {name!r}: its recovery of layer {layer} is of shape {list(numbers.shape)}, "
                    f"the model wants {[numbers.shape[0], *width]}; it was made for another model"
                )

    def write(self, name: str, row: int, mask: ExpertMask, recovery: Recovery) -> None:
        """Into the tables of all layers, or none, whatever is raised. Raises PlanError when the device has no
        room for them.
        """
        self._rows.add(row)
        kept, moved = mask.kept, False
        try:
            for number, mixture in self._model.mixtures():
                numbers = recovery.layers[number]
                if recovery.kind == "router":
                    moved |= mixture.recovery.put_offsets(row, numbers)
                    continue
                lacking = sorted({*range(mixture.config.num_experts)} - {*kept[number]})
                moved |= mixture.recovery.put_constants(row, lacking, numbers)
        except BaseException as error:  # half a recovery would be the row's next scenario's
            self._model.moves += 1  # some may have
            self.clear(row)
            if not _has_no_room(error):
                raise
            raise PlanError(
                f"scenario {name!r}: the device has no room for its recovery ({error}); a smaller "
                "--cache-bytes leaves more"
            ) from error
        self._model.moves += moved

    def clear(self, row: int) -> None:
        """What ``row`` has, if anything, is no more."""
        if row not in self._rows:
            return
        moved = [mixture.recovery.clear(row) for _, mixture in self._model.mixtures()]
        self._rows.discard(row)
        self._model.moves += any(moved)


def _has_no_room(error: BaseException) -> bool:
    """A GPU's allocator has a class for it, torch's for the CPU says so in a RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)
