"""What the engine would refuse of scenarios, found before it reads the weights: by its own checks, on a model
that has none.
"""

from __future__ import annotations

from pathlib import Path

from moe_runtime.engine_load import outline
from moe_runtime.experts.registry import Scenario
from moe_runtime.ghost_router import GhostRouter
from moe_runtime.masks import MaskTable
from moe_runtime.placement import Placement


class Rehearsal:
    """A server's start up to its scenarios."""

    def __init__(
        self, model_dir: Path, placement: Placement | None = None, ghosts: GhostRouter | None = None
    ) -> None:
        """``placement`` and ``ghosts``: as the engine gets them. Takes no memory to speak of. Raises
        CheckpointError, and PlanError for a placement of another model.
        """
        self._masks = MaskTable(outline(model_dir, placement, ghosts))

    def add(self, scenario: Scenario) -> None:
        """Raises PlanError as the engine's MaskTable will, after those that were added before."""
        self._masks.add(scenario.name, scenario.mask, scenario.policy, scenario.recovery)
