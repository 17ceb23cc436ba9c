"""``moe-experts diff``: what two plans keep, each and in common."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moe_runtime.errors import PlanError
from moe_runtime.experts.plan_file import PlanFile

DIFFERENT = 3  # exit status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare two plans for one model, layer by layer. Exit status 0 when they keep the same experts, "
        f"{DIFFERENT} when not."
    )
    parser.add_argument("first", type=Path, metavar="PLAN")
    parser.add_argument("second", type=Path, metavar="PLAN")


def run(arguments: argparse.Namespace) -> int:
    """0 or DIFFERENT."""
    first, second = PlanFile.load(arguments.first), PlanFile.load(arguments.second)
    found = difference(first, second)
    if arguments.json:
        print(json.dumps(found))
    else:
        print(_told(first, second, found))
    return 0 if found["equal"] else DIFFERENT


def difference(first: PlanFile, second: PlanFile) -> dict[str, Any]:
    """As plain JSON. ``jaccard`` of experts kept: in common over kept by either. Raises PlanError for plans
    for different models.
    """
    first.model.check(second.model, "the second plan")
    if first.mask.num_experts != second.mask.num_experts:
        raise PlanError("these plans are of different models: their layers or numbers of experts differ")
    layers = []
    for mine, theirs in zip(first.mask.layers, second.mask.layers, strict=True):
        left, right = {*mine.kept}, {*theirs.kept}
        layers.append(
            {
                "layer": mine.layer,
                "both": sorted(left & right),
                "first_only": sorted(left - right),
                "second_only": sorted(right - left),
                "jaccard": len(left & right) / max(1, len(left | right)),
            }
        )
    both, either = first.mask.intersection(second.mask).num_kept, first.mask.union(second.mask).num_kept
    settings = ("scenario", "statistics", "score", "seed", "combine", "budget")
    return {
        "equal": first.mask == second.mask,
        "kept": [first.mask.num_kept, second.mask.num_kept],
        "bytes": [first.num_bytes["kept"], second.num_bytes["kept"]],
        "jaccard": both / max(1, either),
        "made_differently": {
            name: [getattr(first, name), getattr(second, name)]
            for name in settings
            if getattr(first, name) != getattr(second, name)
        },
        "layers": layers,
    }


def _told(first: PlanFile, second: PlanFile, found: dict[str, Any]) -> str:
    lines = [
        f"{first.name} keeps {found['kept'][0]} experts, {second.name} {found['kept'][1]}; of those that "
        f"either keeps both keep {found['jaccard']:.1%}"
    ]
    lines += [f"{name}: {mine} | {theirs}" for name, (mine, theirs) in found["made_differently"].items()]
    for layer in found["layers"]:
        lines.append(
            f"layer {layer['layer']}: {len(layer['both'])} in common; the first alone "
            f"{_ids(layer['first_only'])}; the second alone {_ids(layer['second_only'])}"
        )
    return "\n".join(lines)


def _ids(experts: Iterable[int]) -> str:
    return ", ".join(map(str, experts)) or "none"
