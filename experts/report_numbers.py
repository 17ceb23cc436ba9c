"""What tables, sentences and pictures of a report read from its body alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Body = Mapping[str, Any]
NO_VALUE = "–"


def kl_text(value: float) -> str:
    """Three digits, as people write them: 0, 0.0042, 0.123, 2.35."""
    if value == 0:
        return "0"
    return f"{value:.4f}" if abs(value) < 0.01 else f"{value:.3f}" if abs(value) < 1 else f"{value:.2f}"


def has_pareto(body: Body) -> bool:
    """Whether any plan was measured on its way."""
    return any(plan["curve"] for plan in body["plans"])


def set_names(body: Body) -> list[str]:
    """All test sets: those of plans' own scenarios first, in the order in which they are met."""
    found = [each for row in body["evaluations"] for each in row["sets"]]
    own = [each["name"] for each in found if each["in_scenario"]]
    return list(dict.fromkeys([*own, *(each["name"] for each in found)]))


def baseline_panels(body: Body) -> list[tuple[Body, str, Mapping[str, Any]]]:
    """Every evaluation's baselines by test set: evaluation, set's name, masks with the plan among them, which
    is without a recovery, as they are.
    """
    panels: list[tuple[Body, str, Mapping[str, Any]]] = []
    for row in body["evaluations"]:
        sets = {found["name"]: found for found in row["sets"]}
        for name, masks in row["baselines"].items():
            own = sets[name] if row["recovery"] is None else row["recovery"]["sets"][name]["alone"]
            panels.append((row, name, {"this plan": own["divergence"], **masks}))
    return panels
