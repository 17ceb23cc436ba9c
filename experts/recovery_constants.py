"""A constant in the place of every expert that a plan lacks: its mean output (MoNE, arXiv 2507.00390).

The router chooses as if nothing were cut, with its own weights; a chosen expert that is not there adds its
weight times the mean of what it made of the scenario's tokens that were routed to it. Nothing is computed but
a quotient of two sums that profiling has taken.
"""

from __future__ import annotations

import torch

from moe_runtime.errors import PlanError
from moe_runtime.experts.plan_file import ByLayer, PlanFile
from moe_runtime.experts.statistics import Statistics
from moe_runtime.recovery import Recovery


def constants(statistics: Statistics, plan: PlanFile) -> tuple[Recovery, ByLayer]:
    """``plan``'s constants; and the experts that no token chose, by layer: theirs are zeros.

    Raises PlanError for statistics that the plan was not made from, and when no absent expert has a constant.
    """
    if statistics.digest != plan.statistics:
        raise PlanError("the plan was made from other statistics; give --statistics its own")
    sums = statistics.merge(plan.scenarios)
    layers: dict[int, torch.Tensor] = {}
    unseen: dict[int, tuple[int, ...]] = {}
    for place, layer in enumerate(plan.mask.layers):
        kept = set(layer.kept)
        lacking = [expert for expert in range(layer.num_experts) if expert not in kept]
        counts, outputs = sums.counts[place, lacking], sums.outputs[place, lacking].double()
        layers[layer.layer] = (outputs / counts.clamp(min=1).unsqueeze(-1)).float()
        never = tuple(expert for expert, count in zip(lacking, counts.tolist(), strict=True) if not count)
        if never:
            unseen[layer.layer] = never
    if not any(bool(rows.any()) for rows in layers.values()):
        raise PlanError(
            "no token chose any expert that the plan cuts, so there is nothing to put in its place"
        )
    return Recovery("constants", layers), unseen
