"""A model of which some experts were left out serves only who does not want them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from moe_runtime.errors import KernelError, PlanError, RequestError
from moe_runtime.plan import ExpertMask


@dataclass(frozen=True, slots=True)
class Held:
    """``num_experts`` of ``total`` routed experts, over all layers, are in memory and take ``num_bytes``."""

    num_experts: int = 0
    total: int = 0
    num_bytes: int = 0


class AbsentExperts:
    """What a model lacks. Where nothing is missing every check passes and costs nothing."""

    def __init__(self, model: Any) -> None:
        """``model``: its ``mixtures()`` are the layers with routers, by decoder layer."""
        self._model = model
        self.refresh()

    def refresh(self) -> None:
        """Look again where the experts are."""
        lacking = [
            (number, mixture)
            for number, mixture in self._model.mixtures()
            if mixture.placed is not None and mixture.placed.count("absent")
        ]
        self._here = {number: set(mixture.placed.experts("device", "host")) for number, mixture in lacking}
        self._missed = [mixture.experts.residence.missed for _, mixture in lacking]

    @property
    def is_empty(self) -> bool:
        """Whether every expert is in a memory."""
        return not self._here

    def held(self) -> Held:
        """What is in memory now."""
        mixtures = [mixture for _, mixture in self._model.mixtures()]
        total = sum(mixture.config.num_experts for mixture in mixtures)
        absent = sum(mixture.placed.count("absent") for mixture in mixtures if mixture.placed is not None)
        return Held(total - absent, total, sum(mixture.experts.num_bytes for mixture in mixtures))

    def check_mask(self, scenario: str, mask: ExpertMask) -> None:
        """Raises PlanError for a mask that allows what is not there."""
        for layer in mask.layers:
            wanted = set(layer.kept) - self._here.get(layer.layer, set(layer.kept))
            if wanted:
                raise PlanError(
                    f"scenario {scenario!r} uses expert {min(wanted)} of layer {layer.layer} (and "
                    f"{len(wanted) - 1} more there), which this server has not loaded; add the scenario to "
                    "those it is started with"
                )

    def check_unmasked(self) -> None:
        """Raises RequestError if a request must name a scenario, since it may not use all experts."""
        if self._here:
            raise RequestError(
                "this server holds the experts of its scenarios alone; name one of them", param="model"
            )

    def check_step(self) -> None:
        """Raises KernelError if a token was sent to an expert that is not there. The CPU's kernels raise it
        themselves; a GPU only counts, and what it computed since is not what the model says.
        """
        if not self._missed:
            return
        for layer, count in zip(self._here, torch.cat(self._missed).tolist(), strict=True):
            if count:
                raise KernelError(
                    f"layer {layer}: {count} choices of experts that are not in memory; a mask allows more "
                    "than the placement holds"
                )
