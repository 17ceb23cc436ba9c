"""Lost masses as they were measured on the demo.

data/demo_lost_mass.json (bench/drift.py) holds, of prompts under the mask of their own scenario and of the
two others, the counts per bin.
"""

import json
import random
from pathlib import Path

MEASURED = json.loads((Path(__file__).parent / "data" / "demo_lost_mass.json").read_text())
SCENARIOS = list(MEASURED["counts"])


class Traffic:
    """Lost masses drawn from what was measured under one scenario's mask."""

    def __init__(self, scenario: str, seed: int) -> None:
        self._rng = random.Random(seed)
        self._counts = MEASURED["counts"][scenario]
        self._scenario = scenario

    def draw(self, origin: str, count: int) -> list[float]:
        """Prompts of the scenario ``origin``."""
        found, width = self._counts[origin], MEASURED["bin"]
        bins = range(found["first"], found["first"] + len(found["counts"]))
        chosen = self._rng.choices(bins, found["counts"], k=count)
        return [(number + self._rng.random()) * width for number in chosen]

    def own(self, count: int) -> list[float]:
        return self.draw(self._scenario, count)

    def mixed(self, count: int, share: float) -> list[float]:
        """``share`` of them are of the other scenarios."""
        foreign = [self.draw(name, count) for name in self._counts if name != self._scenario]
        return [
            self._rng.choice(foreign)[index] if self._rng.random() < share else mass
            for index, mass in enumerate(self.own(count))
        ]
