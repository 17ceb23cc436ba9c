"""Ling 2.0 (bailing_moe_v2) against a literal forward, as transformers has no class for it.

The reference below follows the published description and its tensor names; it is float64, one token at a time
through every expert it chose, with no cache. float32 against float64: the same bound as in test_parity.py.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from model_oracle import chunked_logits, greedy, load
from safetensors.torch import load_file
from world import edit_config, tiny_checkpoint, write_weights

BOUND = 5e-6

CASES: dict[str, dict[str, Any]] = {
    "gqa, groups, half rotary": {},
    "mha, biases, no qk norm, two shared experts": {
        "num_key_value_heads": 4, "use_qkv_bias": True, "use_bias": True, "use_qk_norm": False,
        "num_shared_experts": 2,
    },
    "one expert, one group, all rotated, tied": {
        "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "partial_rotary_factor": 1.0,
        "tie_word_embeddings": True, "num_hidden_layers": 3, "first_k_dense_replace": 2,
    },
}  # fmt: skip

Weights = dict[str, torch.Tensor]


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def mlp(x: torch.Tensor, weights: Weights, prefix: str) -> torch.Tensor:
    gate = x @ weights[f"{prefix}.gate_proj.weight"].T
    up = x @ weights[f"{prefix}.up_proj.weight"].T
    return (gate * gate.sigmoid() * up) @ weights[f"{prefix}.down_proj.weight"].T


def rotate(x: torch.Tensor, position: int, theta: float, rotary_dim: int) -> torch.Tensor:
    """x [heads, D]; dimension i turns with dimension i + rotary_dim / 2."""
    out = x.clone()
    half = rotary_dim // 2
    for i in range(half):
        angle = position / theta ** (2 * i / rotary_dim)
        out[:, i] = x[:, i] * math.cos(angle) - x[:, i + half] * math.sin(angle)
        out[:, i + half] = x[:, i + half] * math.cos(angle) + x[:, i] * math.sin(angle)
    return out


def attention(x: torch.Tensor, weights: Weights, prefix: str, config: dict[str, Any]) -> torch.Tensor:
    heads, kv_heads, size = (
        config[key] for key in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    fused = x @ weights[f"{prefix}.query_key_value.weight"].T
    if config.get("use_qkv_bias"):
        fused = fused + weights[f"{prefix}.query_key_value.bias"]
    query, key, value = fused.view(len(x), heads + 2 * kv_heads, size).split(
        [heads, kv_heads, kv_heads], dim=1
    )
    if config["use_qk_norm"]:
        query = norm(query, weights[f"{prefix}.query_layernorm.weight"])
        key = norm(key, weights[f"{prefix}.key_layernorm.weight"])
    turn = config["rope_theta"], int(size * config["partial_rotary_factor"])
    query = torch.stack([rotate(row, position, *turn) for position, row in enumerate(query)])
    key = torch.stack([rotate(row, position, *turn) for position, row in enumerate(key)])
    out = torch.zeros(len(x), heads, size, dtype=x.dtype)
    for position in range(len(x)):
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = key[: position + 1, group] @ query[position, head] / math.sqrt(size)
            out[position, head] = scores.softmax(0) @ value[: position + 1, group]
    out = out.view(len(x), -1) @ weights[f"{prefix}.dense.weight"].T
    return out + weights[f"{prefix}.dense.bias"] if config.get("use_bias") else out


def mixture(x: torch.Tensor, weights: Weights, prefix: str, config: dict[str, Any]) -> torch.Tensor:
    """Scores are sigmoids; score + expert_bias chooses groups (by their two best), then experts; the chosen
    experts' plain scores, summing to one, times the scaling factor, weigh them."""
    out = mlp(x, weights, f"{prefix}.shared_experts")
    groups, top_k = config["n_group"], config["num_experts_per_tok"]
    for token, row in enumerate(x):
        scores = (weights[f"{prefix}.gate.weight"] @ row).sigmoid()
        choice = scores + weights[f"{prefix}.gate.expert_bias"]
        by_group = choice.view(groups, -1)
        best_groups = by_group.topk(2).values.sum(-1).topk(config["topk_group"]).indices.tolist()
        per_group = by_group.shape[1]
        allowed = [group * per_group + i for group in best_groups for i in range(per_group)]
        chosen = sorted(allowed, key=lambda expert: -float(choice[expert]))[:top_k]
        total = sum(scores[expert] for expert in chosen) if top_k > 1 else 1.0
        for expert in chosen:
            weight = scores[expert] / total * config["routed_scaling_factor"]
            out[token] += weight * mlp(row, weights, f"{prefix}.experts.{expert}")
    return out


def reference_logits(ids: torch.Tensor, weights: Weights, config: dict[str, Any]) -> torch.Tensor:
    x = weights["model.word_embeddings.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        normed = norm(x, weights[f"{prefix}.input_layernorm.weight"])
        x = x + attention(normed, weights, f"{prefix}.attention", config)
        normed = norm(x, weights[f"{prefix}.post_attention_layernorm.weight"])
        dense = layer < config["first_k_dense_replace"]
        x = x + (
            mlp(normed, weights, f"{prefix}.mlp")
            if dense
            else mixture(normed, weights, f"{prefix}.mlp", config)
        )
    head = "model.word_embeddings.weight" if config.get("tie_word_embeddings") else "lm_head.weight"
    return norm(x, weights["model.norm.weight"]) @ weights[head].T


class Recorder(dict[str, torch.Tensor]):
    """Weights that remember which of them were read."""

    def __init__(self, weights: Weights) -> None:
        super().__init__(weights)
        self.read: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        self.read.add(name)
        return super().__getitem__(name)


@pytest.fixture(scope="module", params=CASES)
def ling(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_checkpoint(tmp_path_factory.mktemp("ling"), "bailing_moe_v2", **CASES[request.param])
    weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    return folder, Recorder(weights), json.loads((folder / "config.json").read_text())


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(0, 272, (length,), generator=generator) for length in (29, 18, 4)]


def test_logits_equal_the_literal_forward(ling: Any, backend: str) -> None:
    folder, weights, config = ling
    for ids, logits in zip(prompts(), chunked_logits(load(folder, backend), prompts()), strict=True):
        expected = reference_logits(ids, weights, config)
        error = float((logits - expected).abs().max() / expected.abs().max())
        print(f"relative error {error:.1e}")
        assert error <= BOUND
    experts = {name for name in weights if ".experts." in name}
    assert weights.read | experts == set(weights), "the checkpoint has tensors that the description does not"


def test_greedy_tokens_equal_the_literal_forward(ling: Any, backend: str) -> None:
    folder, weights, config = ling
    ids = prompts()[1]
    generated = greedy(load(folder, backend), ids, 64)
    # One pass over the whole text checks all 64 choices: each must be the best after what precedes it.
    whole = torch.cat([ids, torch.tensor(generated)])
    expected = reference_logits(whole, weights, config).argmax(-1)
    assert generated == expected[len(ids) - 1 : -1].tolist()


def test_the_published_config_is_taken_as_it_is(tmp_path: Path) -> None:
    """Its model_type is an older family's, its auto_map names code (never run, as we implement it), and it
    may declare layers for multi-token prediction, whose tensors are left aside.
    """
    folder = tiny_checkpoint(tmp_path / "model", "bailing_moe_v2")
    expected = greedy(load(folder, "reference"), prompts()[2], 8)
    edit_config(
        folder,
        model_type="bailing_moe",
        architectures=["BailingMoeV2ForCausalLM"],
        auto_map={"AutoModelForCausalLM": "modeling_bailing_moe_v2.BailingMoeV2ForCausalLM"},
        num_nextn_predict_layers=1,
        router_dtype="fp32",
        score_function="sigmoid",
        use_rmsnorm=True,
        embedding_dropout=0.0,
        moe_shared_expert_intermediate_size=16,
    )
    (folder / "modeling_bailing_moe_v2.py").write_text("raise SystemExit('executed')")
    tensors = load_file(folder / "model.safetensors")
    write_weights(folder, {**tensors, "model.layers.2.eh_proj.weight": torch.ones(32, 64)})
    assert greedy(load(folder, "reference"), prompts()[2], 8) == expected
