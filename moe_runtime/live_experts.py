"""Experts that join and leave a running engine: read beside it, switched on and off between its steps."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

from moe_runtime import loader
from moe_runtime.absent_experts import AbsentExperts
from moe_runtime.checkpoint import Checkpoint
from moe_runtime.errors import ConfigError
from moe_runtime.layers.decoder import Decoder
from moe_runtime.layers.growing import GrowingExperts
from moe_runtime.placement import LayerPlacement
from moe_runtime.plan import ExpertMask
from moe_runtime.quant.recipe import Recipe

Wanted: TypeAlias = Mapping[int, Collection[int]]  # by decoder layer, ids of experts


class LiveExperts:
    """One change at a time. ``read`` may run on any thread, while the engine steps; the rest belongs to the
    engine's thread, between steps.
    """

    def __init__(self, model: Decoder, model_dir: Path, recipe: Recipe) -> None:
        """``model`` must not have computed yet: its experts move. Raises ConfigError where that cannot be."""
        if model.device.type != "cpu" or any(
            mixture.placed is not None and mixture.placed.count("host") for _, mixture in model.mixtures()
        ):
            raise ConfigError("experts can only come and go where all are on the CPU; use --device cpu")
        self._model = model
        self._model_dir = model_dir
        self._recipe = recipe
        self._layers: dict[int, GrowingExperts] = {}
        for number, mixture in model.mixtures():
            self._layers[number] = mixture.experts = GrowingExperts(mixture, number)
        self._tell()

    def lacking(self, mask: ExpertMask) -> dict[int, list[int]]:
        """What ``mask`` keeps and is not here."""
        missing = {
            number: [expert for expert in kept if expert not in self._layers[number].here]
            for number, kept in mask.kept.items()
            if number in self._layers
        }
        return {number: experts for number, experts in missing.items() if experts}

    def read(self, wanted: Wanted) -> None:
        """Fetch weights from the checkpoint into their places, where nothing sees them yet. Raises
        CheckpointError, and takes no memory then.
        """
        if not wanted:
            return
        for number, layer in self._layers.items():
            layer.coming = set(wanted.get(number, ()))
        try:
            loader.fill_experts(self._model, Checkpoint(self._model_dir), self._recipe, wanted)
        except BaseException:
            for number, experts in wanted.items():
                self._layers[number].wipe(experts)
            raise

    def admit(self, wanted: Wanted, absent: AbsentExperts) -> None:
        """What has been read may be used."""
        for number, experts in wanted.items():
            self._layers[number].admit(experts)
        self._tell()
        absent.refresh()

    def trim(self, masks: Iterable[ExpertMask], absent: AbsentExperts) -> int:
        """Give up every expert that none of ``masks`` keeps; how many that were."""
        needed: dict[int, set[int]] = {number: set() for number in self._layers}
        for mask in masks:
            for number, kept in mask.kept.items():
                needed[number].update(kept)
        dropped = 0
        for number, layer in self._layers.items():
            leaving = layer.here - needed[number]
            layer.give_up(leaving)
            dropped += len(leaving)
        self._tell()
        absent.refresh()
        return dropped

    def _tell(self) -> None:
        """The layers' own record of where their experts are."""
        for number, mixture in self._model.mixtures():
            here = self._layers[number].here
            mixture.placed = LayerPlacement(
                number,
                tuple(
                    "device" if expert in here else "absent" for expert in range(mixture.config.num_experts)
                ),
            )
