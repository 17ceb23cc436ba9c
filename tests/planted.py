"""Planted models: real checkpoints of every family in which it is known which experts a domain needs.

Two domains, credit and wealth, speak in letters of their own (``say``). The residual stream has axes that
nothing but the embedding writes to: one says the token's domain, one which of its four kinds it is. Router
rows read these axes alone, so for every token of a domain the experts of the domain win, with certainty: all
other experts have logit 0. What experts and attention compute goes to the other axes.

Every domain needs 4 of 8 experts, one in each pair (0, 1), (2, 3), (4, 5), (6, 7), so that routers with four
groups keep one of each. Expert 0 serves both domains, expert 1 nobody. By construction: keeping a domain's
experts changes no bit of its logits, and changes those of the other domain.
"""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from world import random_tensors, tiny_checkpoint, write_json, write_tokenizer, write_weights

from moe_runtime.plan import ExpertMask, LayerMask

DOMAINS = {"credit": (0, 2, 4, 6), "wealth": (0, 3, 5, 7)}
LETTERS = {"credit": "abcdefghijklm", "wealth": "nopqrstuvwxyz"}
NUM_EXPERTS, NEVER = 8, 1
NUM_KINDS = 4
NUM_AXES = len(DOMAINS) * (1 + NUM_KINDS)  # the first axes of the residual stream, written by the embedding
STRENGTH = 4.0  # of the embedding on its axes; the other axes have about 0.3 each
# Softmax: logits far above the 0 of the others, whose part in the denominator is lost in float32 rounding.
# Sigmoid: scores apart from each other and from the 0.5 of the others, by more than the selection bias.
SOFTMAX_ROW, SOFTMAX_KINDS = 12.0, (0.6, 0.4, 0.2, 0.0)
SIGMOID_ROW, SIGMOID_KINDS = 0.3, (0.6, 0.35, 0.15, 0.0)
SIGMOID_FAMILIES = ("deepseek_v3", "glm4_moe", "bailing_moe_v2")
# name -> architecture, changes of config.json
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "softmax, normalised": ("qwen3_moe", {}),
    "softmax, not normalised": ("olmoe", {}),
    "softmax, gated shared expert": ("qwen2_moe", {}),
    "softmax, other names": ("mixtral", {}),
    "softmax, latent attention, dense first layer": ("deepseek_v2", {}),
    "sigmoid, bias, groups, dense first layer, shared": ("deepseek_v3", {}),
    "sigmoid, bias, one group": ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    "sigmoid, bias, groups, norms of heads": ("glm4_moe", {}),
    "sigmoid, expert_bias, groups": ("bailing_moe_v2", {}),
    "float8 blocks": ("qwen3_moe", {"torch_dtype": "bfloat16", "quantization_config": {
        "quant_method": "fp8", "weight_block_size": [16, 32]}}),
}  # fmt: skip

Tensors = dict[str, torch.Tensor]


def planted_checkpoint(
    folder: Path, variant: str = "softmax, normalised", change: Callable[[Tensors], None] | None = None
) -> Path:
    """Write the model into ``folder`` (created); ``change`` may alter its tensors before."""
    architecture, overrides = VARIANTS[variant]
    tiny_checkpoint(folder, architecture, num_hidden_layers=3, hidden_size=64, **overrides)
    config = json.loads((folder / "config.json").read_text())
    fp8 = config.get("quantization_config")
    tensors = random_tensors({**config, "quantization_config": None} if fp8 else config)
    for name, tensor in tensors.items():
        _plant(name, tensor, sigmoid=architecture in SIGMOID_FAMILIES)
    if change is not None:
        change(tensors)
    write_weights(folder, _float8(tensors, fp8["weight_block_size"]) if fp8 else tensors)
    write_json(folder / "config.json", config)
    write_tokenizer(folder)
    return folder


def say(domain: str, num_letters: int, seed: int = 0, letters: str = "") -> str:
    """Text of one domain, or of some ``letters``; a letter is a token."""
    return "".join(random.Random(seed).choices(letters or LETTERS[domain], k=num_letters))


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return path


def domain_mask(domain: str, layers: list[int]) -> ExpertMask:
    """The right answer."""
    return ExpertMask(tuple(LayerMask(layer, NUM_EXPERTS, DOMAINS[domain]) for layer in layers))


def kind_of(letter: str) -> int:
    """Which of its domain's kinds a letter is."""
    return ord(letter) % NUM_KINDS


def _plant(name: str, tensor: torch.Tensor, *, sigmoid: bool) -> None:
    if "embed" in name:
        _plant_embedding(tensor)
    elif name.endswith(("input_layernorm.weight", "post_attention_layernorm.weight")):
        tensor.fill_(1.0)
    elif name.endswith("gate.weight") and len(tensor) == NUM_EXPERTS:
        _plant_router(tensor, *((SIGMOID_ROW, SIGMOID_KINDS) if sigmoid else (SOFTMAX_ROW, SOFTMAX_KINDS)))
    elif name.endswith("_bias") and len(tensor) == NUM_EXPERTS:
        tensor.mul_(0.02)  # seen in the choice of others, too small to change this one
    elif name.endswith(("o_proj.weight", "dense.weight", "down_proj.weight", "w2.weight")):
        tensor[:NUM_AXES] = 0


def _plant_embedding(table: torch.Tensor) -> None:
    table.mul_(0.3)
    table[:, :NUM_AXES] = 0
    for axis, domain in enumerate(DOMAINS):
        for letter in LETTERS[domain]:
            table[ord(letter), axis] = STRENGTH
            table[ord(letter), _kind_axis(axis, kind_of(letter))] = STRENGTH


def _plant_router(rows: torch.Tensor, row: float, kinds: tuple[float, ...]) -> None:
    rows.zero_()
    for axis, experts in enumerate(DOMAINS.values()):
        for place, expert in enumerate(experts):
            rows[expert, axis] = row
            for kind in range(NUM_KINDS):  # every kind prefers another of the domain's experts
                rows[expert, _kind_axis(axis, kind)] = kinds[(place + kind) % NUM_KINDS]


def _kind_axis(domain: int, kind: int) -> int:
    return len(DOMAINS) + domain * NUM_KINDS + kind


def _float8(tensors: Tensors, block: list[int]) -> Tensors:
    """Every projection in blocks of float8 with a scale each, as DeepSeek and Qwen publish them."""
    result = {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            result[name] = tensor
            continue
        rows, columns = (-(-size // step) for size, step in zip(tensor.shape, block, strict=True))
        scales = torch.ones(rows, columns)
        for row in range(rows):
            for column in range(columns):
                part = tensor[row * block[0] :, column * block[1] :][: block[0], : block[1]]
                scales[row, column] = part.abs().max().clamp(min=1e-6) / 448
        wide = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        codes = tensor.float() / wide[: tensor.shape[0], : tensor.shape[1]]
        result[name] = codes.to(torch.float8_e4m3fn)
        result[f"{name}_scale_inv"] = scales
    return result
