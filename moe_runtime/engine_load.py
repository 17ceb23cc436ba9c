"""All that the engine needs from a model folder, read in the order in which mistakes are cheapest."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moe_runtime import kernels, loader
from moe_runtime.autotune import autotune
from moe_runtime.chat import ChatTemplate
from moe_runtime.config import EngineConfig
from moe_runtime.device import choose_device, told_as_config_errors, use
from moe_runtime.engine_setup import check_vocabulary, default_params
from moe_runtime.expert_room import ExpertRoom, describe
from moe_runtime.ghost_router import GhostRouter
from moe_runtime.layers.decoder import Decoder
from moe_runtime.live_experts import LiveExperts
from moe_runtime.packed_store import PackedStore
from moe_runtime.placement import Hotness, Placement
from moe_runtime.quant.quality import Gate
from moe_runtime.quant.recipe import Recipe
from moe_runtime.quant.statistics import load_moments
from moe_runtime.sampling import SamplingParams
from moe_runtime.tokenizer import Tokenizer

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """``params`` are generation_config.json's; ``chooser`` and ``sampler`` are the kernels' ways to choose
    tokens, on the host and on the device, if they have any.
    """

    model: Decoder
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    params: SamplingParams
    chooser: Callable[..., Any] | None
    sampler: Callable[..., Any] | None
    live: LiveExperts | None


def load_parts(
    model_dir: Path,
    config: EngineConfig,
    placement: Placement | None,
    hotness: Hotness | None,
    *,
    live: bool = False,
    ghosts: GhostRouter | None = None,
) -> Parts:
    """``live``: experts can come and go; then no packed file is mapped, which would hold what has gone.
    ``ghosts``: read an exported checkpoint as the model that it was cut from, see ghost_router.py. Raises
    CheckpointError, ConfigError or PlanError.

    On the cpu backend torch is left with one thread: ours do the work, torch's would spin beside them. A GPU
    is left as the one that the calling thread computes on.
    """
    tokenizer = Tokenizer.load(model_dir)
    # Before the weights: they take minutes. Their dtype does not matter here.
    _, model_config = loader.read_model_config(model_dir, "float32")
    check_vocabulary(tokenizer, model_config.vocab_size)
    chat = ChatTemplate.load(model_dir, tokenizer)
    params = default_params(model_dir)
    if config.threads is not None:
        kernels.set_num_threads(config.threads)
        torch.set_num_threads(config.threads)
    place = choose_device(config.device, config.backend)
    LOGGER.info(place.reason)
    use(place.device)
    chosen, recipe = kernels.choose(config.backend, device=place.device), Recipe.of(config)
    if config.quantize_statistics is not None:
        recipe = replace(recipe, moments=load_moments(config.quantize_statistics, model_dir))
    room = ExpertRoom(config, placement, hotness, ghosts)
    store = None
    if config.packed_file and chosen.backend == "cpu" and not live:
        beside = None if ghosts is None else ghosts.path
        store = PackedStore(model_dir, recipe, config.packed_dir, config.packed_verify, room.kept, beside)
    gate = Gate.choose(config.max_quant_kl, recipe, model_config, model_dir, tokenizer)
    with told_as_config_errors(chosen.device):
        model = loader.load_model(model_dir, chosen, recipe, store, gate, room)
        if config.autotune_dir is not None:
            autotune(model, config.autotune_dir, config.max_batch_tokens)
    growing = LiveExperts(model, model_dir, recipe) if live else None
    if chosen.backend == "cpu":
        torch.set_num_threads(1)
    LOGGER.info(describe(model))
    return Parts(model, tokenizer, chat, params, chosen.choose_token, chosen.sample_rows, growing)


def outline(
    model_dir: Path, placement: Placement | None = None, ghosts: GhostRouter | None = None
) -> Decoder:
    """The model without a weight, its experts placed as ``load_parts`` would on the CPU: for who must know
    what fits before minutes are spent on loading. Raises CheckpointError, PlanError.
    """
    reference = kernels.choose("reference")
    architecture, config = loader.read_model_config(model_dir, "float32", ghosts)  # whatever the dtype is
    model = architecture.build(config, reference)
    if placement is not None:
        ExpertRoom(EngineConfig(), placement).place(model, reference, Recipe(), list)
    return model
