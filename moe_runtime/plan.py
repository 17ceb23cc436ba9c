"""Which experts a scenario may use, as plain data that travels between ``experts/``, the engine and disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe_runtime.canonical_json import digest
from moe_runtime.errors import PlanError

SCENARIO_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # whole


@dataclass(frozen=True, slots=True)
class LayerMask:
    """``kept``: ascending ids of experts of decoder layer ``layer`` that may be used, of ``num_experts``."""

    layer: int
    num_experts: int
    kept: tuple[int, ...]

    def __post_init__(self) -> None:
        """Raises PlanError for ids out of order or range."""
        if self.layer < 0 or self.num_experts < 1:
            raise PlanError(f"layer {self.layer} with {self.num_experts} experts")
        if list(self.kept) != sorted(set(self.kept)):
            raise PlanError(f"layer {self.layer}: kept ids must be ascending and distinct")
        if self.kept and not 0 <= self.kept[0] <= self.kept[-1] < self.num_experts:
            raise PlanError(
                f"layer {self.layer}: kept ids {self.kept[0]} to {self.kept[-1]}, there are "
                f"{self.num_experts} experts"
            )


@dataclass(frozen=True, slots=True)
class ExpertMask:
    """The experts of every layer with a router that may be used; layers ascending.

    Nothing is cut by it: it is applied to router scores before the choice.
    """

    layers: tuple[LayerMask, ...]

    def __post_init__(self) -> None:
        numbers = [layer.layer for layer in self.layers]
        if not numbers or numbers != sorted(set(numbers)):
            raise PlanError(f"layers {numbers}: at least one, ascending and distinct")

    @classmethod
    def full(cls, num_experts: Mapping[int, int]) -> ExpertMask:
        """Every expert; ``num_experts`` by decoder layer."""
        return cls(
            tuple(
                LayerMask(layer, count, tuple(range(count))) for layer, count in sorted(num_experts.items())
            )
        )

    @property
    def num_experts(self) -> dict[int, int]:
        return {layer.layer: layer.num_experts for layer in self.layers}

    @property
    def kept(self) -> dict[int, tuple[int, ...]]:
        return {layer.layer: layer.kept for layer in self.layers}

    @property
    def num_kept(self) -> int:
        """Experts kept, over all layers."""
        return sum(len(layer.kept) for layer in self.layers)

    @property
    def is_uniform(self) -> bool:
        """Whether every layer keeps as many experts, which is what stock engines can load."""
        return len({len(layer.kept) for layer in self.layers}) == 1

    def union(self, other: ExpertMask) -> ExpertMask:
        """What either keeps. Raises PlanError for masks of different models."""
        return self._merged(other, lambda mine, theirs: mine | theirs)

    def intersection(self, other: ExpertMask) -> ExpertMask:
        """What both keep. Raises PlanError for masks of different models."""
        return self._merged(other, lambda mine, theirs: mine & theirs)

    def contains(self, other: ExpertMask) -> bool:
        """Whether everything that ``other`` keeps is kept here."""
        return self.union(other) == self

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of the canonical JSON: equal masks have equal digests on every machine."""
        return digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": [
                {"layer": layer.layer, "num_experts": layer.num_experts, "kept": list(layer.kept)}
                for layer in self.layers
            ]
        }

    @classmethod
    def from_json(cls, value: Any) -> ExpertMask:
        """Raises PlanError for anything but what ``to_json`` gives."""
        try:
            layers = [(row["layer"], row["num_experts"], tuple(row["kept"])) for row in value["layers"]]
        except (KeyError, TypeError) as error:
            raise PlanError(f"an expert mask needs layers of layer, num_experts and kept: {error}") from error
        for layer, count, kept in layers:
            if not all(type(number) is int for number in (layer, count, *kept)):
                raise PlanError(f"layer {layer!r}: numbers must be whole")
        return cls(tuple(LayerMask(*layer) for layer in layers))

    def _merged(self, other: ExpertMask, merge: Any) -> ExpertMask:
        if self.num_experts != other.num_experts:
            raise PlanError("these masks are of different models: their layers or numbers of experts differ")
        return ExpertMask(
            tuple(
                LayerMask(mine.layer, mine.num_experts, tuple(sorted(merge({*mine.kept}, {*theirs.kept}))))
                for mine, theirs in zip(self.layers, other.layers, strict=True)
            )
        )
