"""What the engine would refuse of scenarios, found before it reads the weights: by its own checks, on a model
that has none.
"""

from __future__ import annotations

from pathlib import Path

from moe_runtime.engine_load import outline
from moe_runtime.errors import PlanError
from moe_runtime.experts.registry import Scenario
from moe_runtime.ghost_router import GhostRouter
from moe_runtime.masks import MaskTable
from moe_runtime.placement import Placement
from moe_runtime.recovery_rows import RecoveryRows


class Rehearsal:
    """A server's start up to its scenarios."""

    def __init__(
        self, model_dir: Path, placement: Placement | None = None, ghosts: GhostRouter | None = None
    ) -> None:
        """``placement`` and ``ghosts``: as the engine gets them. Takes no memory to speak of, nor does
        ``add``. Raises CheckpointError, and PlanError for a placement of another model.
        """
        model = outline(model_dir, placement, ghosts)
        self._masks, self._recoveries = MaskTable(model), RecoveryRows(model)

    def add(self, scenario: Scenario) -> None:
        """Raises PlanError as the engine's MaskTable will, after those that were added before; then it was
        not added. A recovery is checked and not written: its constants may be many.
        """
        self._masks.add(scenario.name, scenario.mask, scenario.policy)
        if scenario.recovery is None:
            return
        try:
            self._recoveries.check(scenario.name, scenario.mask, scenario.recovery)
        except PlanError:
            self._masks.remove(scenario.name)
            raise
