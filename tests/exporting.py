"""Checkpoints and masks that cut them, for the tests of export and verify."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from world import tiny_checkpoint

from moe_runtime.experts.export import Export, Provenance, export
from moe_runtime.loader import read_model_config
from moe_runtime.plan import ExpertMask, LayerMask

ROUTER = re.compile(r"\.gate\.(weight|bias|e_score_correction_bias|expert_bias)")
UNSIGNED = Provenance({}, {})
GROUPED = (0, 1, 6, 7, 8, 11, 12, 14)  # two of each four
# Per architecture: config beyond world.ARCHITECTURES, and the experts that every layer keeps.
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "qwen3_moe": ({}, (1, 3, 4, 7)),
    "qwen2_moe": ({}, (0, 2, 6)),
    "mixtral": ({}, (2, 5)),
    "olmoe": ({}, (0, 1, 2, 3, 4, 6, 7)),
    "deepseek_v2": ({}, (1, 4, 5, 6)),
    "deepseek_v3": ({"n_routed_experts": 16}, GROUPED),
    "glm4_moe": ({"n_routed_experts": 16}, GROUPED),
    "bailing_moe_v2": ({"num_experts": 16}, GROUPED),
}


def case_checkpoint(folder: Path, architecture: str, **settings: Any) -> tuple[Path, ExpertMask]:
    """A tiny checkpoint of the architecture and its case's mask."""
    overrides, kept = CASES[architecture]
    tiny_checkpoint(folder, architecture, **{**overrides, **settings})
    return folder, mask_of(folder, kept)


def mask_of(folder: Path, *kept: Sequence[int]) -> ExpertMask:
    """A mask of the model: what each of its routing layers keeps, the last one given holding for the rest."""
    _, config = read_model_config(folder, "float32")
    layers = [layer for layer, routes in enumerate(config.moe_layers) if routes]
    return ExpertMask(
        tuple(
            LayerMask(layer, config.moe_of(layer).num_experts, tuple(kept[min(row, len(kept) - 1)]))
            for row, layer in enumerate(layers)
        )
    )


def exported(model_dir: Path, mask: ExpertMask, target: Path, **options: bool) -> Export:
    return export(model_dir, mask, target, UNSIGNED, **options)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def expected_bytes(folder: Path, mask: ExpertMask) -> dict[str, bytes]:
    """What an export must hold, told by names alone."""
    expected = {}
    for name, tensor in tensors_of(folder).items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        kept = mask.kept.get(int(layer[1])) if layer else None
        expert = re.search(r"\.experts\.(\d+)\.", name)
        if kept is not None and ROUTER.search(name):
            expected[name] = bytes_of(tensor[list(kept)])
        elif kept is None or expert is None:
            expected[name] = bytes_of(tensor)
        elif int(expert[1]) in kept:
            new = kept.index(int(expert[1]))
            expected[name.replace(f".experts.{expert[1]}.", f".experts.{new}.")] = bytes_of(tensor)
    return expected


def check_bytes(folder: Path, mask: ExpertMask, target: Path) -> None:
    assert {name: bytes_of(tensor) for name, tensor in tensors_of(target).items()} == expected_bytes(
        folder, mask
    )
