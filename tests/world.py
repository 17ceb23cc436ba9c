"""Tiny random checkpoints in the published format, for any test that needs a model folder.

``tiny_checkpoint(tmp_path)`` is a qwen3_moe of 2 layers and 8 experts with a byte-level tokenizer (token
id = byte value, then three special tokens, then ids the tokenizer does not know, as published models
have). Deterministic.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from moe_runtime.hf_config import Fields
from moe_runtime.kernels import choose
from moe_runtime.models import find_architecture

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
END_OF_TEXT, MESSAGE_START, MESSAGE_END = 256, 257, 258
VOCAB_SIZE = 272

CHAT_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "eos_token_id": MESSAGE_END,
    "bos_token_id": END_OF_TEXT,
}
LATENT = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
}
GROUPS = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 1.5}

# What each architecture's config.json has beyond COMMON.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16, "norm_topk_prob": True, "head_dim": 16},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24},
    "mixtral": {"num_local_experts": 8},
    "olmoe": {"num_experts": 8},
    "deepseek_v2": {**LATENT, "n_shared_experts": 2},
    "deepseek_v3": {**LATENT, **GROUPS},
    "glm4_moe": {
        **GROUPS, "head_dim": 16, "n_routed_experts": 8, "n_shared_experts": 1, "moe_intermediate_size": 16,
        "first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": True,
    },
    "bailing_moe_v2": {
        **GROUPS, "head_dim": 16, "num_experts": 8, "num_shared_experts": 1, "moe_intermediate_size": 16,
        "first_k_dense_replace": 1, "use_qk_norm": True, "partial_rotary_factor": 0.5,
    },
}  # fmt: skip


def tiny_config(architecture: str = "qwen3_moe", **overrides: Any) -> dict[str, Any]:
    """A config.json of the architecture; an override of None removes the key."""
    values = {"model_type": architecture, **COMMON, **ARCHITECTURES[architecture], **overrides}
    return {key: value for key, value in values.items() if value is not None}


def tiny_checkpoint(
    folder: Path, architecture: str = "qwen3_moe", *, seed: int = 0, shards: int = 1, **overrides: Any
) -> Path:
    """Write a checkpoint into ``folder`` (created) and return it. ``overrides`` go into config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(architecture, **overrides)
    tensors = random_tensors(config, seed)
    write_weights(folder, tensors, shards)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": [MESSAGE_END, END_OF_TEXT]})
    write_tokenizer(folder)
    return folder


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors for every slot of the model that ``config`` describes, scaled so that activations keep
    their size through the layers, in the config's dtype.
    """
    architecture = find_architecture(config["model_type"])
    model = architecture.build(architecture.read_config(Fields(config)), choose("reference"))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for slot in model.slots():
        noise = torch.randn(slot.shape, generator=generator)
        if len(slot.shape) == 1:
            tensor = 0.1 * noise + ("norm" in slot.name)
        else:
            tensor = noise if "embed" in slot.name else noise / math.sqrt(slot.shape[1])
        dtype = torch.float32 if slot.name.endswith("_bias") else getattr(torch, config["torch_dtype"])
        tensors[slot.name] = tensor.to(dtype)
    return tensors


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """One model.safetensors, or several shards with their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json (bytes, no merges) and tokenizer_config.json with a ChatML template."""
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": CHAT_TEMPLATE,
        },
    )


def byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(256 + others.index(byte)) if byte in others else chr(byte) for byte in range(256)]


def edit_config(folder: Path, **changes: Any) -> Path:
    """Change keys of config.json (None removes one) without touching the weights; the folder itself."""
    values = {**json.loads((folder / "config.json").read_text()), **changes}
    write_json(folder / "config.json", {key: value for key, value in values.items() if value is not None})
    return folder


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
