"""What happens to a request whose prompt its scenario does not fit: plain data, obeyed by the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from moe_runtime.errors import PlanError

Action = Literal["flag", "reject", "fallback"]


@dataclass(frozen=True, slots=True)
class DriftPolicy:
    """What to do when a prompt's lost mass (lost_mass.py) is above ``threshold``, 0 to below 1.

    flag      answer all the same, and say so
    reject    end the request before its first token
    fallback  start it again with all experts
    """

    threshold: float
    action: Action

    def __post_init__(self) -> None:
        """Raises PlanError."""
        number = isinstance(self.threshold, int | float) and not isinstance(self.threshold, bool)
        if not number or not 0 <= self.threshold <= 1:
            raise PlanError(f"a drift policy's threshold is a lost mass of 0 to 1, not {self.threshold!r}")
        if self.threshold == 1:
            raise PlanError("a drift policy with a threshold of 1 never acts: no lost mass is above it")
        if self.action not in get_args(Action):
            raise PlanError(f"a drift policy's action is one of {get_args(Action)}, not {self.action!r}")
