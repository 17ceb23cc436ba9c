"""Write a random checkpoint with the real layer of Qwen3-30B-A3B: `python bench/slice_checkpoint.py DIR`.

Four layers (hidden 2048, 32/4 heads of 128, 128 experts, top-8, intermediate 768), vocabulary 32768, bf16,
5.25 GB: larger than any cache, small enough for a 16 GB machine. Weights are normal(0, 0.02), the router
normal(0, 0.5) so that the choice of experts is decisive; every tensor has its own seed.
"""

import json
import sys
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "vocab_size": 32768,
}
SEED = 20261122


def _random(name: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED + zlib.crc32(name.encode()))
    return (torch.randn(shape, generator=generator) * std).to(torch.bfloat16)


def _layer(index: int) -> dict[str, torch.Tensor]:
    hidden, heads, kv_heads, dim, intermediate = 2048, 32, 4, 128, 768
    prefix = f"model.layers.{index}."
    shapes = {
        "self_attn.q_proj": (heads * dim, hidden),
        "self_attn.k_proj": (kv_heads * dim, hidden),
        "self_attn.v_proj": (kv_heads * dim, hidden),
        "self_attn.o_proj": (hidden, heads * dim),
    }
    for expert in range(128):
        shapes[f"mlp.experts.{expert}.gate_proj"] = (intermediate, hidden)
        shapes[f"mlp.experts.{expert}.up_proj"] = (intermediate, hidden)
        shapes[f"mlp.experts.{expert}.down_proj"] = (hidden, intermediate)
    tensors = {
        f"{prefix}{name}.weight": _random(prefix + name, shape, 0.02) for name, shape in shapes.items()
    }
    tensors[f"{prefix}mlp.gate.weight"] = _random(f"{prefix}router", (128, hidden), 0.5)
    for name, size in (("self_attn.q_norm", dim), ("self_attn.k_norm", dim)):
        tensors[f"{prefix}{name}.weight"] = torch.ones(size, dtype=torch.bfloat16)
    for name in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{prefix}{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    return tensors


def _tokenizer(vocab_size: int) -> Tokenizer:
    vocabulary = {token: index for index, token in enumerate(["<|bos|>", "<|eos|>"])}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[symbol] = len(vocabulary)
    for index in range(len(vocabulary), vocab_size):
        vocabulary[f"<unused{index}>"] = index
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write(out: Path) -> None:
    """Write the checkpoint into ``out``, one shard per layer."""
    out.mkdir(parents=True, exist_ok=True)
    layers = int(CONFIG["num_hidden_layers"])  # type: ignore[call-overload]
    weight_map: dict[str, str] = {}
    for index in range(layers + 1):
        file = f"model-{index + 1:05d}-of-{layers + 1:05d}.safetensors"
        if index < layers:
            tensors = _layer(index)
        else:
            tensors = {
                "model.embed_tokens.weight": _random("embed", (32768, 2048), 1.0),
                "model.norm.weight": torch.ones(2048, dtype=torch.bfloat16),
                "lm_head.weight": _random("lm_head", (32768, 2048), 0.02),
            }
        save_file(tensors, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (out / "config.json").write_text(json.dumps(CONFIG, indent=1))
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "do_sample": False}))
    (out / "tokenizer_config.json").write_text(
        json.dumps(
            {"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}", "eos_token": "<|eos|>"}
        )
    )
    _tokenizer(int(CONFIG["vocab_size"])).save(str(out / "tokenizer.json"))  # type: ignore[call-overload]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python bench/slice_checkpoint.py DIR")
    write(Path(sys.argv[1]))
