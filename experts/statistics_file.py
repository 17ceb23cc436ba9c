"""Statistics on disk: one safetensors file, each tensor named "<scenario>/<statistic>", hashed as a whole.

The header says in JSON which model they are of, their shape, and what each scenario's texts were. The same
statistics are the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

import moe_runtime
from moe_runtime.errors import PlanError
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.sketch import SAMPLE_SIZE
from moe_runtime.experts.statistics import NUM_BUCKETS, TENSORS, ScenarioStatistics, Shape, Statistics
from moe_runtime.experts.whole_file import replacing
from moe_runtime.hf_config import parse_json

FORMAT = 1
SUFFIX = ".stats.safetensors"
HEADER = "moe_experts_statistics"  # one entry: safetensors keeps several in no fixed order


def save_statistics(path: Path, statistics: Statistics) -> Statistics:
    """Write them whole or not at all; the same with their digest. Raises PlanError when the disk refuses, or
    there is nothing in them.
    """
    if not statistics.scenarios:
        raise PlanError(f"{path.name}: no scenario has statistics, so there is nothing to write")
    header: dict[str, Any] = {
        "format": FORMAT,
        "tool": moe_runtime.__version__,
        "model": statistics.model.to_json(),
        "shape": asdict(statistics.shape),
        "scenarios": {
            name: {
                "num_documents": found.num_documents,
                "num_tokens": found.num_tokens,
                "corpora": list(found.corpora),
            }
            for name, found in sorted(statistics.scenarios.items())
        },
    }
    tensors = {
        f"{scenario}/{name}": tensor.contiguous()
        for scenario, found in sorted(statistics.scenarios.items())
        for name, tensor in found.tensors().items()
    }
    header["digest"] = _digest(header, tensors)
    with replacing(path) as file:
        file.write(save(tensors, {HEADER: json.dumps(header, sort_keys=True)}))
    return replace(statistics, digest=header["digest"])


def load_statistics(path: Path, model: ModelIdentity | None = None) -> Statistics:
    """Raises PlanError for a file that cannot be read, was changed, is of another format, or of another model
    than ``model``.
    """
    try:
        header, tensors = _read(path)
        digest = header.pop("digest")
        if header["format"] != FORMAT:
            raise PlanError(f"{path.name}: format {header['format']!r}, this version reads {FORMAT}")
        if digest != _digest(header, tensors):
            raise PlanError(f"{path.name}: it was changed since it was written; profile again")
        shape = Shape(**{**header["shape"], "layers": tuple(header["shape"]["layers"])})
        found = Statistics(
            ModelIdentity.from_json(header["model"]),
            shape,
            {
                name: _scenario(path, name, about, tensors, shape)
                for name, about in header["scenarios"].items()
            },
            digest,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise PlanError(f"{path.name}: not a statistics file of `moe-experts profile`: {error!r}") from error
    if model is not None:
        model.check(found.model, path.name)
    return found


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    try:
        if not path.is_file():
            raise PlanError(f"{path.name}: no such file; `moe-experts profile` makes one")
        with safe_open(path, framework="pt") as file:
            header = parse_json((file.metadata() or {})[HEADER].encode())
            # Copies, so that what the digest is taken of is what is used, whatever becomes of the file.
            tensors = {name: file.get_tensor(name).clone() for name in sorted(file.keys())}
    except (OSError, SafetensorError, ValueError) as error:
        raise PlanError(f"{path.name}: not a statistics file: {error}") from error
    if not isinstance(header, dict):
        raise PlanError(f"{path.name}: its header is not an object")
    return header, tensors


def _scenario(
    path: Path, name: str, about: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], shape: Shape
) -> ScenarioStatistics:
    own = {statistic: tensors[f"{name}/{statistic}"] for statistic in TENSORS}
    for statistic, expected in _shapes(shape).items():
        got = tuple(own[statistic].shape)
        if got != expected:
            raise PlanError(f"{path.name}: {name}/{statistic} is {list(got)}, expected {list(expected)}")
    if len(own["sample_keys"]) > SAMPLE_SIZE:
        raise PlanError(f"{path.name}: {name} has a sample of more than {SAMPLE_SIZE} tokens")
    return ScenarioStatistics(
        **own,
        num_documents=about["num_documents"],
        num_tokens=about["num_tokens"],
        corpora=tuple(about["corpora"]),
    )


def _shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    plain = (len(shape.layers), shape.num_experts)
    names = ("counts", "answer_counts", "documents_seen", "gate", "norm", "norm_squared", "gate_norm")
    return {
        **dict.fromkeys((*names, "gate_norm_turn", "peak"), plain),
        "outputs": (*plain, shape.hidden),
        "pairs": (*plain, shape.num_experts),
        "tail": (*plain, NUM_BUCKETS),
    }


def _digest(header: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256, hexadecimal, of the header and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
