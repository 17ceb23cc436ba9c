"""config.json of a model whose experts were cut."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

from moe_runtime.errors import CheckpointError, PlanError
from moe_runtime.hf_shared import EXPERTS_PER_LAYER
from moe_runtime.model_config import ModelConfig
from moe_runtime.models import Architecture
from moe_runtime.plan import ExpertMask

QUANTIZATION = "quantization_config"
NOT_CONVERTED = "modules_to_not_convert"  # whole names or parts of them
IN_BLOCK = "modules_in_block_to_quantize"  # names below a layer, the same for all layers
ONLY_OURS = (
    "the layers keep different numbers of experts: only moe_runtime can load such a model; transformers, "
    "vLLM, SGLang and llama.cpp have one number for all layers"
)


def cut_config(
    values: Mapping[str, Any],
    architecture: Architecture,
    config: ModelConfig,
    mask: ExpertMask,
    *,
    allow_non_uniform: bool,
) -> dict[str, Any]:
    """``values`` of config.json, which ``config`` was read from, for the model that ``mask`` leaves.

    Raises PlanError for layers of unequal size that were not allowed, CheckpointError for a list of modules
    whose experts cannot be renumbered.
    """
    if not mask.is_uniform and not allow_non_uniform:
        raise PlanError(f"{ONLY_OURS}. Plan with --uniform, or export for it alone with --allow-non-uniform")
    new = copy.deepcopy(dict(values))
    counts = {layer: len(kept) for layer, kept in mask.kept.items()}
    for name in architecture.NUM_EXPERTS.split("|"):
        if new.get(name) is not None:
            new[name] = max(counts.values())
    new.pop(EXPERTS_PER_LAYER, None)
    if not mask.is_uniform:
        new[EXPERTS_PER_LAYER] = [counts.get(layer, 0) for layer in range(config.num_layers)]
    section = new.get(QUANTIZATION)
    if isinstance(section, dict):
        names = architecture.NAMES
        prefix = re.escape(names.decoder.layer).replace(r"\{\}", r"(\d{1,6})")
        experts = re.escape(names.moe.experts)
        whole = re.compile(rf"(?P<head>{prefix}\.{experts}\.)(?P<expert>\d{{1,6}})(?P<tail>(\..*)?)")
        if isinstance(section.get(NOT_CONVERTED), list):
            section[NOT_CONVERTED] = [
                new_name
                for name in section[NOT_CONVERTED]
                for new_name in _renumbered(name, whole, experts, mask)
            ]
        if isinstance(section.get(IN_BLOCK), list):
            section[IN_BLOCK] = _first_experts(section[IN_BLOCK], experts, max(counts.values()))
    return new


def _renumbered(name: Any, whole: re.Pattern[str], experts: str, mask: ExpertMask) -> list[Any]:
    """The name that the module has now; nothing if it is gone."""
    if not isinstance(name, str) or not re.search(rf"{experts}\.\d", name):
        return [name]
    match = whole.fullmatch(name)
    if match is None:
        raise CheckpointError(
            f"{QUANTIZATION}.{NOT_CONVERTED}: {name[:80]!r} names an expert of no certain layer, so it "
            "cannot be given its new number",
            file="config.json",
        )
    kept = mask.kept.get(int(match[2]))
    if kept is None:
        return [name]
    expert = int(match["expert"])
    return [f"{match['head']}{kept.index(expert)}{match['tail']}"] if expert in kept else []


def _first_experts(groups: list[Any], experts: str, count: int) -> list[Any]:
    """Lists of names like "mlp.experts.3.up_proj" that hold for every layer, with the first ``count``
    experts: right if all experts are treated alike, which is checked.
    """
    number = re.compile(rf"((?:.*\.)?{experts})\.(\d{{1,6}})(\..*)?")

    def match_of(name: Any) -> re.Match[str] | None:
        return number.fullmatch(name) if isinstance(name, str) else None

    parts: dict[int, set[str]] = {}
    for name in _leaves(groups):
        if match := match_of(name):
            parts.setdefault(int(match[2]), set()).add(match[3] or "")
    alike = len({frozenset(found) for found in parts.values()}) <= 1
    if not alike or (parts and sorted(parts) != list(range(len(parts)))):
        raise CheckpointError(
            f"{QUANTIZATION}.{IN_BLOCK} treats some experts apart and does not say of which layer, so they "
            "cannot be renumbered",
            file="config.json",
        )

    def stays(name: Any) -> bool:
        match = match_of(name)
        return match is None or int(match[2]) < count

    return _filtered(groups, stays)


def _leaves(value: list[Any]) -> list[Any]:
    return [leaf for item in value for leaf in (_leaves(item) if isinstance(item, list) else [item])]


def _filtered(value: list[Any], stays: Callable[[Any], bool]) -> list[Any]:
    return [
        _filtered(item, stays) if isinstance(item, list) else item
        for item in value
        if isinstance(item, list) or stays(item)
    ]
