"""What becomes of each tensor of a checkpoint when experts are cut: names, shapes and byte ranges.

Nothing is computed and nothing is read: experts that stay keep their bytes, in whatever form they are
published (scales, zero points and the like move with them), and get new numbers in the order of the old ones.
A router loses the rows of the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from moe_runtime.checkpoint import TensorEntry
from moe_runtime.errors import CheckpointError, PlanError
from moe_runtime.layers.assemble import ModelNames
from moe_runtime.model_config import ModelConfig
from moe_runtime.plan import ExpertMask


@dataclass(frozen=True)
class Piece:
    """A tensor to write: its bytes are the ``ranges`` (start, number) of ``source.path``, one after the
    other.
    """

    name: str
    shape: tuple[int, ...]
    source: TensorEntry
    ranges: tuple[tuple[int, int], ...]

    @classmethod
    def whole(cls, source: TensorEntry, name: str) -> Piece:
        return cls(name, source.shape, source, ((source.start, source.num_bytes),))

    @property
    def num_bytes(self) -> int:
        return sum(count for _, count in self.ranges)


def check_cut(config: ModelConfig, mask: ExpertMask) -> None:
    """Raises PlanError for a mask of another model, one that cuts nothing, and one that leaves a layer too
    few experts, or a routing group with more than another.
    """
    mixtures = [layer for layer, routes in enumerate(config.moe_layers) if routes]
    expected = {layer: config.moe_of(layer).num_experts for layer in mixtures}
    if mask.num_experts != expected:
        raise PlanError("the mask was made for another model: its layers or numbers of experts differ")
    if mask.num_kept == sum(expected.values()):
        raise PlanError(
            "the mask keeps every expert, so there is nothing to cut; the model is its own export"
        )
    for layer in mask.layers:
        moe = config.moe_of(layer.layer)
        if len(layer.kept) < moe.top_k:
            raise PlanError(
                f"layer {layer.layer} keeps {len(layer.kept)} experts, each token takes {moe.top_k}"
            )
        size = moe.num_experts // moe.num_groups
        groups = [sum(expert // size == group for expert in layer.kept) for group in range(moe.num_groups)]
        # Engines cut the experts into num_groups equal runs: an unequal cut would put some into another
        # group, and the model would choose among other groups than it learned to.
        if len({*groups}) > 1:
            raise PlanError(
                f"layer {layer.layer} keeps {', '.join(map(str, groups))} experts in its {moe.num_groups} "
                "routing groups; an exported model must keep as many in each"
            )
        if moe.topk_groups * groups[0] < moe.top_k:
            raise PlanError(
                f"layer {layer.layer} keeps {groups[0]} experts in each of {moe.num_groups} groups; the "
                f"{moe.topk_groups} groups that a token may choose must have {moe.top_k} together"
            )
        if moe.group_score == "top2_sum" and moe.num_groups > 1 and groups[0] < 2:
            raise PlanError(
                f"layer {layer.layer} keeps one expert in each routing group; groups are chosen by their "
                "best two"
            )


class Cut:
    """The tensors of one family's checkpoint under a mask that ``check_cut`` let pass."""

    def __init__(self, names: ModelNames, mask: ExpertMask) -> None:
        self._names = names.moe
        self._layers = {layer.layer: layer for layer in mask.layers}
        self._new_id = {
            (layer.layer, old): new for layer in mask.layers for new, old in enumerate(layer.kept)
        }
        prefix = re.escape(names.decoder.layer).replace(r"\{\}", r"(\d{1,6})")
        self._name = re.compile(rf"({prefix})\.(.+)")
        rows = (f"{self._names.gate}.weight", f"{self._names.gate}.bias", self._names.selection_bias)
        self._router_rows = frozenset(rows)

    def pieces(self, entries: Iterable[TensorEntry]) -> list[Piece]:
        """What stays of ``entries``, in their order. Raises CheckpointError for a tensor that cannot be cut,
        and for a layer that lacks its router or the tensors of an expert that stays.
        """
        kept = [piece for piece in map(self._piece, entries) if piece is not None]
        self._check_complete({piece.name for piece in kept})
        return kept

    def routers(self, entries: Iterable[TensorEntry]) -> list[Piece]:
        """The routers' tensors with all their rows, under their own names."""
        return [Piece.whole(entry, entry.name) for entry in entries if self._is_router(entry.name)]

    def _is_router(self, name: str) -> bool:
        match = self._name.fullmatch(name)
        return match is not None and int(match[2]) in self._layers and match[3] in self._router_rows

    def _piece(self, entry: TensorEntry) -> Piece | None:
        match = self._name.fullmatch(entry.name)
        if match is None or int(match[2]) not in self._layers:
            return Piece.whole(entry, entry.name)
        layer, rest = int(match[2]), match[3]
        if rest in self._router_rows:
            return self._rows(entry, layer)
        if rest.startswith(f"{self._names.gate}."):
            raise _refuse(entry, "a part of a router that has no row per expert; routers in float are cut")
        if not rest.startswith(f"{self._names.experts}."):
            return Piece.whole(entry, entry.name)
        expert = re.fullmatch(r"(\d{1,6})\.(.+)", rest.removeprefix(f"{self._names.experts}."))
        if expert is None or int(expert[1]) >= self._layers[layer].num_experts:
            count = self._layers[layer].num_experts
            raise _refuse(entry, f"not a tensor of one expert of the {count} that config.json says")
        new = self._new_id.get((layer, int(expert[1])))
        if new is None:
            return None
        return Piece.whole(entry, f"{match[1]}.{self._names.experts}.{new}.{expert[2]}")

    def _rows(self, entry: TensorEntry, layer: int) -> Piece:
        """The rows of the experts that stay; neighbours as one range."""
        mask = self._layers[layer]
        if not entry.shape or entry.shape[0] != mask.num_experts:
            raise _refuse(
                entry, f"shape {list(entry.shape)}, expected a row for each of {mask.num_experts} experts"
            )
        size = entry.num_bytes // mask.num_experts
        ranges: list[tuple[int, int]] = []
        for expert in mask.kept:
            start = entry.start + expert * size
            if ranges and sum(ranges[-1]) == start:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + size)
            else:
                ranges.append((start, size))
        return Piece(entry.name, (len(mask.kept), *entry.shape[1:]), entry, tuple(ranges))

    def _check_complete(self, names: set[str]) -> None:
        """Every expert of a layer has the parts that any of them has."""
        parts: dict[int, dict[int, set[str]]] = {layer: {} for layer in self._layers}
        routers = set()
        for name in names:
            match = self._name.fullmatch(name)
            if match is None or int(match[2]) not in self._layers:
                continue
            if match[3] == f"{self._names.gate}.weight":
                routers.add(int(match[2]))
            elif match[3].startswith(f"{self._names.experts}."):
                expert, _, part = match[3].removeprefix(f"{self._names.experts}.").partition(".")
                parts[int(match[2])].setdefault(int(expert), set()).add(part)
        for layer, mask in self._layers.items():
            if layer not in routers:
                raise CheckpointError(f"layer {layer} has no router {self._names.gate}.weight")
            every = set[str]().union(*parts[layer].values())
            for new, old in enumerate(mask.kept):
                lacking = sorted(every - parts[layer].get(new, set())) or ([] if every else ["any tensor"])
                if lacking:
                    raise CheckpointError(f"layer {layer}: expert {old} lacks {', '.join(lacking)}")


def _refuse(entry: TensorEntry, message: str) -> CheckpointError:
    return CheckpointError(message, file=entry.path.name, tensor=entry.name)
