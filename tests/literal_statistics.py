"""The statistics of a few documents, token by token, from the checkpoint's own tensors: an oracle."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from model_oracle import Paged, load
from safetensors.torch import load_file

from moe_runtime.kernels import reference
from moe_runtime.layers.moe import Fence, MoeMlp
from moe_runtime.layers.norm import RmsNorm


def literal_sums(model_dir: Path, documents: list[list[int]]) -> dict[str, Counter[Any]]:
    """By statistic, keys (layer, expert) or (layer, expert, expert); "outputs" holds tensors."""
    tensors = {name: tensor.double() for name, tensor in load_file(model_dir / "model.safetensors").items()}
    sums: dict[str, Counter[Any]] = {}
    for number, ids in enumerate(documents):
        for layer, mlp, x, residual in _mixture_inputs(model_dir, ids):
            for token in range(len(ids)):
                _add_token(sums, tensors, layer, mlp, x[token], residual[token], number)
    seen: Counter[Any] = Counter(key[:2] for key in sums.pop("document_keys"))
    return {**sums, "documents_seen": seen}


def _mixture_inputs(model_dir: Path, ids: list[int]) -> list[tuple[int, MoeMlp, torch.Tensor, torch.Tensor]]:
    model = load(model_dir, "reference")
    numbers = {id(mlp): number for number, mlp in model.mixtures()}
    found = []
    original = MoeMlp.add_norm

    def watched(
        self: MoeMlp, x: torch.Tensor, residual: torch.Tensor, norm: RmsNorm, fence: Fence | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found.append((numbers[id(self)], self, x.double(), residual.double()))
        return original(self, x, residual, norm, fence)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MoeMlp, "add_norm", watched)
        Paged(model, 1, len(ids)).forward({0: torch.tensor(ids)})
    return found


def _add_token(
    sums: dict[str, Counter[Any]],
    tensors: dict[str, torch.Tensor],
    layer: int,
    mlp: MoeMlp,
    x: torch.Tensor,
    residual: torch.Tensor,
    document: int,
) -> None:
    logits = tensors[f"{mlp._prefix}.{mlp._names.gate}.weight"] @ x
    chosen, weights = reference.route(logits.unsqueeze(0), mlp.spec, mlp.selection_bias)
    outputs = {}
    for expert in chosen[0].tolist():
        gate, up, down = (
            tensors[f"{mlp._prefix}.{mlp._names.experts}.{expert}.{part}.weight"] for part in mlp._names.parts
        )
        hidden = gate @ x
        outputs[expert] = down @ (hidden / (1 + torch.exp(-hidden)) * (up @ x))
    pairs = list(zip(chosen[0].tolist(), weights[0].double().tolist(), strict=True))
    after = residual + sum(weight * outputs[expert] for expert, weight in pairs)
    turn = max(0.0, 1 - float(residual @ after) / (_length(residual) * _length(after)))
    for expert, weight in pairs:
        key, length = (layer, expert), _length(outputs[expert])
        for name, value in (
            ("counts", 1), ("gate", weight), ("norm", length), ("norm_squared", length**2),
            ("gate_norm", weight * length), ("gate_norm_turn", weight * length * turn),
            ("outputs", outputs[expert]),
        ):  # fmt: skip
            counter = sums.setdefault(name, Counter())
            counter[key] = counter[key] + value
        peaks = sums.setdefault("peak", Counter())
        peaks[key] = max(peaks[key], float(outputs[expert].abs().max()))
        sums.setdefault("document_keys", Counter())[(*key, document)] = 1
        for other, _ in pairs:
            sums.setdefault("pairs", Counter())[(layer, expert, other)] += 1


def _length(vector: torch.Tensor) -> float:
    return math.sqrt(float(vector @ vector))
