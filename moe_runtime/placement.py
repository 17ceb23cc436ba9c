"""Where each expert of a model lives: on the device, in the host's memory, or nowhere. Plain data."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, TypeAlias

from moe_runtime.canonical_json import digest
from moe_runtime.errors import PlanError
from moe_runtime.plan import ExpertMask, LayerMask

Tier = Literal["device", "host", "absent"]
TIERS: tuple[Tier, ...] = ("device", "host", "absent")
# By decoder layer, how often each expert was chosen; any unit, the same for all layers.
Hotness: TypeAlias = Mapping[int, Sequence[float]]


@dataclass(frozen=True, slots=True)
class LayerPlacement:
    """``tiers``: one per expert of decoder layer ``layer``."""

    layer: int
    tiers: tuple[Tier, ...]

    def __post_init__(self) -> None:
        """Raises PlanError."""
        if self.layer < 0 or not self.tiers:
            raise PlanError(f"layer {self.layer} with {len(self.tiers)} experts")
        for expert, tier in enumerate(self.tiers):
            if tier not in TIERS:
                raise PlanError(f"layer {self.layer}: expert {expert} is {tier!r}, not one of {TIERS}")

    def experts(self, *tiers: Tier) -> tuple[int, ...]:
        """The ids that live in one of ``tiers``, ascending."""
        return tuple(expert for expert, tier in enumerate(self.tiers) if tier in tiers)

    def count(self, tier: Tier) -> int:
        return self.tiers.count(tier)


@dataclass(frozen=True, slots=True)
class Placement:
    """The experts of every layer with a router; layers ascending.

    Experts of the tier "absent" are not loaded: the masks of all requests must keep off them. Where a model
    computes on the CPU, "device" and "host" are one memory.
    """

    layers: tuple[LayerPlacement, ...]

    def __post_init__(self) -> None:
        numbers = [layer.layer for layer in self.layers]
        if not numbers or numbers != sorted(set(numbers)):
            raise PlanError(f"layers {numbers}: at least one, ascending and distinct")

    @classmethod
    def of(cls, mask: ExpertMask) -> Placement:
        """What ``mask`` keeps on the device, the others absent."""
        return cls(
            tuple(
                LayerPlacement(
                    layer.layer, _tiers(layer.num_experts, {expert: "device" for expert in layer.kept})
                )
                for layer in mask.layers
            )
        )

    @property
    def resident(self) -> ExpertMask:
        """The experts that are in one of the memories."""
        return ExpertMask(
            tuple(
                LayerMask(layer.layer, len(layer.tiers), layer.experts("device", "host"))
                for layer in self.layers
            )
        )

    def count(self, tier: Tier) -> int:
        """Experts of a tier, over all layers."""
        return sum(layer.count(tier) for layer in self.layers)

    def check(self, num_experts: Mapping[int, int], top_k: int) -> None:
        """Raises PlanError unless it fits a model of ``num_experts`` by decoder layer and leaves every token
        its ``top_k`` experts.
        """
        mine = self.resident.num_experts
        if mine != dict(num_experts):
            layers = sorted({*mine, *num_experts})
            different = next(layer for layer in layers if mine.get(layer) != num_experts.get(layer))
            raise PlanError(
                f"the placement was made for another model: it has {mine.get(different, 0)} experts in layer "
                f"{different}, the model {num_experts.get(different, 0)}"
            )
        for layer, kept in self.resident.kept.items():
            if len(kept) < top_k:
                raise PlanError(
                    f"the placement leaves {len(kept)} experts in layer {layer}, each token takes {top_k}"
                )

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of the canonical JSON: equal placements have equal digests everywhere."""
        return digest(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """Experts that are in neither list are absent."""
        return {
            "layers": [
                {
                    "layer": layer.layer,
                    "num_experts": len(layer.tiers),
                    "device": list(layer.experts("device")),
                    "host": list(layer.experts("host")),
                }
                for layer in self.layers
            ]
        }

    @classmethod
    def from_json(cls, value: Any) -> Placement:
        """Raises PlanError for anything but what ``to_json`` gives."""
        try:
            layers = [
                (row["layer"], row["num_experts"], list(row["device"]), list(row["host"]))
                for row in value["layers"]
            ]
        except (KeyError, TypeError) as error:
            raise PlanError(
                f"a placement needs layers of layer, num_experts, device and host: {error}"
            ) from error
        made = []
        for layer, count, device, host in layers:
            ids = [*device, *host]
            if not all(type(number) is int for number in (layer, count, *ids)):
                raise PlanError(f"layer {layer!r}: numbers must be whole")
            if len(set(ids)) != len(ids) or not all(0 <= expert < count for expert in ids):
                raise PlanError(f"layer {layer}: expert ids must be distinct and below {count}")
            homes: dict[int, Tier] = {expert: "device" for expert in device}
            made.append(LayerPlacement(layer, _tiers(count, homes | {expert: "host" for expert in host})))
        return cls(tuple(made))

    def table(self, num_bytes: Mapping[tuple[int, Tier], int]) -> str:
        """To be read: experts and bytes by tier; layers that are alike share one line, all are in the last.

        ``num_bytes``: of all experts of a layer and tier.
        """

        def cells(layers: Collection[LayerPlacement]) -> tuple[str, ...]:
            made = []
            for tier in TIERS:
                count = sum(layer.count(tier) for layer in layers)
                size = sum(num_bytes.get((layer.layer, tier), 0) for layer in layers)
                made.append(f"{count} ({readable_bytes(size)})" if count and tier != "absent" else str(count))
            return tuple(made)

        rows = [("layers", *TIERS)]
        for _, group in groupby(self.layers, key=lambda layer: cells([layer])):
            alike = list(group)
            first, last = alike[0].layer, alike[-1].layer
            rows.append((str(first) if first == last else f"{first} to {last}", *cells(alike)))
        if len(rows) > 2:
            rows.append(("all", *cells(self.layers)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )


def readable_bytes(num_bytes: int) -> str:
    """``1.50 GB``, ``12.3 MB``, ``0.4 KB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= size:
            return f"{num_bytes / size:.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{num_bytes / 1e3:.1f} KB"


def plan_placement(
    wanted: Placement,
    expert_bytes: Mapping[int, int],
    device_bytes: int,
    hotness: Hotness | None = None,
) -> Placement:
    """``wanted`` with as many of its device's experts on the host as ``device_bytes`` cannot hold.

    ``expert_bytes``: of one expert on the device, by decoder layer. The hottest stay, by choices per byte;
    without ``hotness``, and among equals, the lowest ids of all layers alike, so that every layer has its
    share. The same arguments give the same placement. Raises PlanError for a hotness of another model.
    """
    candidates = []
    for layer in wanted.layers:
        counts = _counts(layer, hotness)
        for place, expert in enumerate(layer.experts("device")):
            density = counts[expert] / expert_bytes[layer.layer]
            candidates.append((-density, place, layer.layer, expert))
    left, staying = device_bytes, set()
    for _, _, number, expert in sorted(candidates):
        if expert_bytes[number] <= left:
            left -= expert_bytes[number]
            staying.add((number, expert))
    return Placement(
        tuple(
            LayerPlacement(
                layer.layer,
                tuple(
                    "host" if tier == "device" and (layer.layer, expert) not in staying else tier
                    for expert, tier in enumerate(layer.tiers)
                ),
            )
            for layer in wanted.layers
        )
    )


def _counts(layer: LayerPlacement, hotness: Hotness | None) -> Sequence[float]:
    if hotness is None:
        return [1.0] * len(layer.tiers)
    counts = hotness.get(layer.layer, ())
    if len(counts) != len(layer.tiers):
        raise PlanError(
            f"the experts' statistics count {len(counts)} experts in layer {layer.layer}, the model has "
            f"{len(layer.tiers)}"
        )
    if not all(math.isfinite(count) and count >= 0 for count in counts):
        raise PlanError(
            f"the experts' statistics of layer {layer.layer}: counts must be finite and not negative"
        )
    return counts


def _tiers(num_experts: int, homes: Mapping[int, Tier]) -> tuple[Tier, ...]:
    return tuple(homes.get(expert, "absent") for expert in range(num_experts))
