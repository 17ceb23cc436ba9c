"""Which expert goes where on this machine: decided before a weight is loaded, so that none moves later."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from moe_runtime.config import EngineConfig
from moe_runtime.device import free_bytes
from moe_runtime.engine_setup import plan_cache
from moe_runtime.errors import ConfigError, PlanError
from moe_runtime.ghost_router import GhostRouter
from moe_runtime.kernels import Kernels, WeightFormat, choose
from moe_runtime.layers.decoder import Decoder
from moe_runtime.layers.experts import TieredExperts
from moe_runtime.layers.host_link import HostLink
from moe_runtime.layers.slots import Slot
from moe_runtime.placement import Hotness, LayerPlacement, Placement, Tier, plan_placement, readable_bytes
from moe_runtime.plan import ExpertMask
from moe_runtime.quant.recipe import Recipe

# Of a GPU's memory, beside weights and cache: activations, logits (a quarter of this), copies under way. On
# a small GPU a sixteenth of what is free.
WORKSPACE_BYTES = 1 << 30
LOGGER = logging.getLogger(__name__)


class Stored(Protocol):
    """A weight as the checkpoint has it, of the loader's kinds."""

    @property
    def slot(self) -> Slot: ...
    @property
    def format(self) -> WeightFormat: ...


@dataclass(frozen=True)
class ExpertRoom:
    """Places the experts of a model as ``wanted`` says (None: all of them where the kernels compute), as far
    as there is room. What a GPU cannot hold goes to the host, the coldest by ``hotness`` first, unless
    --require-placement forbids it. ``ghosts``: the checkpoint is read as the model that it was cut from.
    """

    config: EngineConfig
    wanted: Placement | None = None
    hotness: Hotness | None = None
    ghosts: GhostRouter | None = None

    @property
    def kept(self) -> ExpertMask | None:
        """The experts to load; None for all."""
        if self.wanted is None or not self.wanted.count("absent"):
            return None
        return self.wanted.resident

    def place(
        self, model: Decoder, kernels: Kernels, recipe: Recipe, stored: Callable[[], Sequence[Stored]]
    ) -> None:
        """Prepare a model that has no weights yet. ``stored`` lists those that are to come.

        Raises PlanError for a placement of another model, ConfigError for what does not fit.
        """
        num_experts = {number: mixture.config.num_experts for number, mixture in model.mixtures()}
        if not num_experts:
            if self.wanted is not None:
                raise PlanError("a placement for a model without experts")
            return
        placement = self.wanted or Placement.of(ExpertMask.full(num_experts))
        placement.check(num_experts, model.config.moe.top_k)
        if kernels.backend == "triton":
            placement = self._fitted(placement, model, kernels, _sizes(model, kernels, recipe, stored()))
        else:
            placement = _in_one_memory(placement)
            if self.hotness is not None:
                LOGGER.warning(
                    "the experts' statistics are not used: without a GPU there is nothing to divide"
                )
        if placement.count("host") or placement.count("absent"):
            _place(model, kernels, placement)

    def _fitted(self, wanted: Placement, model: Decoder, kernels: Kernels, sizes: _Sizes) -> Placement:
        room = self._room(model, kernels.device, sizes)
        if room is None:
            return wanted
        placement = plan_placement(wanted, sizes.expert_bytes, room, self.hotness)
        moved = placement.count("host") - wanted.count("host")
        if not moved:
            return placement
        size = _device_bytes(wanted, sizes) - _device_bytes(placement, sizes)
        told = (
            f"{moved} of {wanted.count('device')} experts ({readable_bytes(size)} of "
            f"{readable_bytes(_device_bytes(wanted, sizes))}) do not fit the {readable_bytes(room)} that "
            f"{kernels.device} has for them"
        )
        if self.config.require_placement:
            raise ConfigError(
                f"--require-placement: {told}; use --quantize int8 or int4, a lower --cache-bytes, or leave "
                "--require-placement out to have them computed on the CPU"
            )
        LOGGER.warning("%s and are computed on the CPU, more slowly; --require-placement refuses this", told)
        if self.hotness is not None:
            share = _share_of_choices(placement, self.hotness)
            LOGGER.info("those that stay have %.1f %% of the choices that were counted", 100 * share)
        return placement

    def _room(self, model: Decoder, device: torch.device, sizes: _Sizes) -> int | None:
        """Bytes for experts; None for as many as they take. Raises ConfigError."""
        asked = self.config.device_bytes
        if device.type != "cuda":  # the interpreter computes in the host's memory
            return asked
        free = free_bytes(device)
        cache = plan_cache(model, self.config)
        cache_bytes = cache.num_blocks * cache.block_bytes
        has, takes = f"{device} has {readable_bytes(free)} free", readable_bytes(cache_bytes)
        if cache_bytes > free:
            raise ConfigError(
                f"the cache takes {takes} and {has}; lower --cache-bytes, --num-blocks, --max-running or "
                "--max-context"
            )
        room = free - cache_bytes - sizes.other_bytes - min(WORKSPACE_BYTES, free // 16)
        if room < (asked or 0):
            wanted = f", and --device-bytes wants {readable_bytes(asked)} for experts" if asked else ""
            raise ConfigError(
                f"{has}: too little for the cache ({takes}), the weights that are not experts "
                f"({readable_bytes(sizes.other_bytes)}) and room to compute{wanted}; lower --cache-bytes"
                f"{' or --device-bytes' if asked else ''}, or use --quantize int8 or int4"
            )
        return room if asked is None else asked


@dataclass(frozen=True)
class _Sizes:
    """``expert_bytes``: one expert on the device, by decoder layer; ``other_bytes``: all other weights."""

    expert_bytes: Mapping[int, int]
    other_bytes: int


def _sizes(model: Decoder, kernels: Kernels, recipe: Recipe, stored: Sequence[Stored]) -> _Sizes:
    layer_of = {id(mixture.experts): number for number, mixture in model.mixtures()}
    hidden, intermediate = model.config.hidden_size, model.config.moe.intermediate_size
    expert_bytes: dict[int, int] = {}
    other_bytes = 0
    for weight in stored:
        slot, form = weight.slot, recipe.format_of(weight.slot, weight.format)
        layer = layer_of.get(id(slot.places[0].owner)) if slot.places else None
        if layer is None:
            bits = form.bits_per_weight + (weight.format.bits_per_weight if slot.keep else 0)
            other_bytes += round(torch.Size(slot.shape).numel() * bits / 8)
        elif layer not in expert_bytes:
            # On "meta" a home has a size and takes no memory.
            home = kernels.new_experts(1, hidden, intermediate, form, device=torch.device("meta"))
            expert_bytes[layer] = home.num_bytes
    return _Sizes(expert_bytes, other_bytes)


def _device_bytes(placement: Placement, sizes: _Sizes) -> int:
    return sum(layer.count("device") * sizes.expert_bytes[layer.layer] for layer in placement.layers)


def _share_of_choices(placement: Placement, hotness: Hotness) -> float:
    """Of all choices of resident experts, those of experts on the device; 0 where none was counted."""

    def choices(*tiers: Tier) -> float:
        return sum(
            hotness[layer.layer][expert] for layer in placement.layers for expert in layer.experts(*tiers)
        )

    return choices("device") / max(choices("device", "host"), 1.0)


def _in_one_memory(placement: Placement) -> Placement:
    """Where the CPU computes, the host is the device."""
    return Placement(
        tuple(
            LayerPlacement(
                layer.layer, tuple("absent" if tier == "absent" else "device" for tier in layer.tiers)
            )
            for layer in placement.layers
        )
    )


def _place(model: Decoder, kernels: Kernels, placement: Placement) -> None:
    missed = torch.zeros(len(placement.layers), dtype=torch.int64, device=kernels.device)
    host = (choose("auto"), HostLink(kernels.device)) if placement.count("host") else None
    for index, ((_, mixture), placed) in enumerate(zip(model.mixtures(), placement.layers, strict=True)):
        mixture.place(placed, missed[index : index + 1], host)


def describe(model: Decoder) -> str:
    """Where the experts of a loaded model are and what they take, to be read."""
    layers: list[LayerPlacement] = []
    num_bytes: dict[tuple[int, Tier], int] = {}
    for number, mixture in model.mixtures():
        if mixture.placed is None:
            full = ExpertMask.full({number: mixture.config.num_experts})
            layers += Placement.of(full).layers
        else:
            layers.append(mixture.placed)
        if isinstance(mixture.experts, TieredExperts):
            num_bytes[number, "device"] = mixture.experts.device.num_bytes
            num_bytes[number, "host"] = mixture.experts.host.num_bytes
        else:
            num_bytes[number, "device"] = mixture.experts.num_bytes
    if not layers:
        return "no layer has experts"
    return f"experts on {model.device}, on the host and left out\n{Placement(tuple(layers)).table(num_bytes)}"
