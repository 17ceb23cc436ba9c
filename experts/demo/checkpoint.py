"""The demo network as a Hugging Face folder (qwen3_moe), and back."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe_runtime.experts.demo.network import Network, Shape

ATTENTION_NAMES = {
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "attention.query_norm.weight": "self_attn.q_norm.weight",
    "attention.key_norm.weight": "self_attn.k_norm.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "experts_norm.weight": "post_attention_layernorm.weight",
    "experts.router.weight": "mlp.gate.weight",
}


def to_named(network: Network) -> dict[str, Tensor]:
    """The checkpoint's tensors, by their Hugging Face names, float32."""
    state = network.state_dict()
    out = {"model.embed_tokens.weight": state["embedding.weight"], "model.norm.weight": state["norm.weight"]}
    for layer in range(network.shape.layers):
        mine, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        out.update({theirs + name: state[mine + own] for own, name in ATTENTION_NAMES.items()})
        for expert in range(network.shape.experts):
            prefix = f"{theirs}mlp.experts.{expert}."
            gate, up = state[mine + "experts.gate_up"][expert].chunk(2, dim=0)
            down = state[mine + "experts.down"][expert]
            out |= {
                f"{prefix}{part}_proj.weight": t for part, t in (("gate", gate), ("up", up), ("down", down))
            }
    return out


def from_named(tensors: dict[str, Tensor], shape: Shape) -> Network:
    """A float32 network with a checkpoint's values; its own order of tensors undone."""
    network = Network(shape)
    with torch.no_grad():
        for name, view in to_named(network).items():
            view.copy_(tensors[name].float())  # the views share storage with the network's parameters
    return network


def config(shape: Shape, eos: int, pad: int) -> dict[str, object]:
    """config.json as transformers writes it for this architecture."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "decoder_sparse_step": 1,
        "dtype": "bfloat16",
        "eos_token_id": eos,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": 2 * shape.intermediate,
        "max_position_embeddings": shape.context,
        "max_window_layers": shape.layers,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": shape.intermediate,
        "norm_topk_prob": True,
        "num_attention_heads": shape.heads,
        "num_experts": shape.experts,
        "num_experts_per_tok": shape.top_k,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "output_router_logits": False,
        "pad_token_id": pad,
        "rms_norm_eps": shape.norm_eps,
        "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
        "rope_theta": shape.rope_theta,
        "router_aux_loss_coef": 0.05,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": shape.vocab,
    }


def save(network: Network, folder: Path, eos: int, pad: int) -> None:
    """Write model.safetensors (bfloat16), config.json and generation_config.json (greedy by default)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in to_named(network).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes it for its owner alone
    generation = {"do_sample": False, "eos_token_id": [eos, pad], "pad_token_id": pad}
    for name, content in (("config", config(network.shape, eos, pad)), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> Network:
    """The network of a model folder, its bfloat16 values widened to float32."""
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = Shape(
        vocab=raw["vocab_size"],
        layers=raw["num_hidden_layers"],
        hidden=raw["hidden_size"],
        heads=raw["num_attention_heads"],
        kv_heads=raw["num_key_value_heads"],
        head_dim=raw["head_dim"],
        experts=raw["num_experts"],
        top_k=raw["num_experts_per_tok"],
        intermediate=raw["moe_intermediate_size"],
        context=raw["max_position_embeddings"],
    )
    return from_named(load_file(folder / "model.safetensors"), shape).eval()
