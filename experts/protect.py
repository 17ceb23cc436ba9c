"""Experts that a plan must keep, in the words of a user: ids, a file of ids, or another plan."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_runtime.errors import PlanError
from moe_runtime.experts import plan_file
from moe_runtime.hf_config import parse_json

IDS = re.compile(r"(\d{1,6}):(\d{1,6}(?:,\d{1,6})*)")
MAX_BYTES = 1 << 24


def read_protected(words: Sequence[str]) -> dict[int, frozenset[int]]:
    """By decoder layer. A word is ``3:1,5``, a JSON file {"3": [1, 5]}, or a plan file, which protects all
    that it keeps (a plan made from texts of refusals, say). Raises PlanError.
    """
    found: dict[int, set[int]] = {}
    for word in words:
        match = IDS.fullmatch(word)
        if match:
            layers: Mapping[int, Iterable[int]] = {int(match[1]): map(int, match[2].split(","))}
        else:
            layers = _read_file(word)
        for layer, experts in layers.items():
            found.setdefault(layer, set()).update(experts)
    return {layer: frozenset(experts) for layer, experts in sorted(found.items())}


def _read_file(word: str) -> Mapping[int, Iterable[int]]:
    path = Path(word)
    try:
        with path.open("rb") as file:
            value: Any = parse_json(file.read(MAX_BYTES))
    except OSError as error:
        raise PlanError(
            f"--protect {word}: neither LAYER:ID,ID nor a file that can be read ({error.strerror})"
        ) from error
    except ValueError as error:
        raise PlanError(f"--protect {word}: not JSON: {error}") from error
    if isinstance(value, dict) and value.get("kind") == plan_file.KIND:
        return plan_file.PlanFile.load(path).mask.kept
    if not isinstance(value, dict) or not all(
        layer.isdecimal() and isinstance(ids, list) and all(type(each) is int for each in ids)
        for layer, ids in value.items()
    ):
        raise PlanError(f'--protect {word}: expected {{"LAYER": [ID, ...]}} or a plan')
    return {int(layer): ids for layer, ids in value.items()}
