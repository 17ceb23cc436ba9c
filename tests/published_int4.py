"""Rewrites a tiny checkpoint as AWQ or GPTQ publish theirs, for any test that needs one.

Written from the published programs' formulas, number by number; shares nothing with the code under test.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from world import edit_config, write_weights

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # AutoAWQ: output order[i] of eight lies in bits 4i to 4i + 3
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
Tensors = dict[str, torch.Tensor]


def signed(number: int) -> int:
    return number - (1 << 32) if number >= 1 << 31 else number


def packed(codes: list[int], order: tuple[int, ...] = tuple(range(8))) -> int:
    return signed(sum(codes[order[i]] << (4 * i) for i in range(8)))


def published(weight: torch.Tensor, settings: dict[str, Any], seed: int) -> tuple[Tensors, torch.Tensor]:
    """Random codes about the size of ``weight`` as the method stores them, and the float32 weight they
    are.
    """
    generator = torch.Generator().manual_seed(seed)
    n, k = weight.shape
    group = k if settings["group_size"] == -1 else settings["group_size"]
    groups = -(-k // group)
    codes = torch.randint(0, 16, (n, k), generator=generator)
    symmetric = settings.get("sym", False)
    zeros = (
        torch.full((n, groups), 8) if symmetric else torch.randint(0, 16, (n, groups), generator=generator)
    )
    scales = (0.25 * weight.abs().mean() * (0.5 + torch.rand(n, groups, generator=generator))).half()
    value = torch.empty(n, k)
    for i in range(n):
        for j in range(k):
            value[i, j] = float(scales[i, j // group]) * int(codes[i, j] - zeros[i, j // group])
    if settings["quant_method"] == "awq":
        qweight = [
            [packed(codes[8 * c : 8 * c + 8, j].tolist(), AWQ_ORDER) for c in range(n // 8)] for j in range(k)
        ]
        stored, order = zeros, AWQ_ORDER
    else:
        qweight = [[packed(codes[i, 8 * r : 8 * r + 8].tolist()) for i in range(n)] for r in range(k // 8)]
        # AutoGPTQ stores one less; its zero point 0 becomes 15.
        stored = zeros if settings.get("checkpoint_format") == "gptq_v2" else (zeros - 1) % 16
        order = tuple(range(8))
    qzeros = [
        [packed(stored[8 * c : 8 * c + 8, g].tolist(), order) for c in range(n // 8)] for g in range(groups)
    ]
    tensors = {
        "qweight": torch.tensor(qweight, dtype=torch.int32),
        "qzeros": torch.tensor(qzeros, dtype=torch.int32),
        "scales": scales.t().contiguous(),
    }
    if settings["quant_method"] == "gptq":
        tensors["g_idx"] = torch.tensor([j // group for j in range(k)], dtype=torch.int32)
    return tensors, value


def publish(folder: Path, settings: dict[str, Any], skip: str = "nothing") -> Tensors:
    """Rewrite a checkpoint's projections as ``settings`` say; the widened weights they stand for."""
    stored, widened = {}, {}
    for seed, (name, tensor) in enumerate(load_file(folder / "model.safetensors").items()):
        stored[name] = widened[name] = tensor
        eights = tensor.shape[-1] % 8 == 0 == tensor.shape[0] % 8
        if "_proj" in name and name.endswith("weight") and skip not in name and eights:
            parts, widened[name] = published(tensor, settings, seed)
            stored |= {f"{name.removesuffix('weight')}{part}": value for part, value in parts.items()}
            del stored[name]
    write_weights(folder, stored)
    edit_config(folder, quantization_config=settings)
    return widened
