"""Qwen3 MoE: grouped attention with per-head norms of queries and keys; softmax routing, no shared expert."""

from moe_runtime.hf_config import Fields
from moe_runtime.hf_shared import (
    check_moe,
    hidden_size,
    num_layers,
    read_attention,
    read_experts,
    read_model,
    read_rope,
    refuse_sliding_window,
    width,
)
from moe_runtime.kernels import Kernels
from moe_runtime.layers.attention import Attention
from moe_runtime.layers.decoder import Block, Decoder
from moe_runtime.layers.moe import DenseMlp, MoeMlp
from moe_runtime.layers.norm import RmsNorm
from moe_runtime.model_config import MAX_LAYERS, AttentionConfig, ModelConfig, MoeConfig


def read_config(fields: Fields) -> ModelConfig:
    refuse_sliding_window(fields, fields.flag("use_sliding_window", False))
    fields.optional_integer("max_window_layers", 0, MAX_LAYERS)  # says nothing without a window
    bias = fields.flag("attention_bias", False)
    attention = read_attention(fields, qkv_bias=bias, output_bias=bias, qk_norm="head")
    num_experts, top_k = read_experts(fields, "num_experts|num_local_experts")
    moe = MoeConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=width(fields, "moe_intermediate_size"),
        norm_topk_prob=fields.flag("norm_topk_prob", False),
    )
    step = fields.integer("decoder_sparse_step", 1, MAX_LAYERS, 1)
    dense = fields.integers("mlp_only_layers", 0, MAX_LAYERS)
    return read_model(
        fields,
        model_type="qwen3_moe",
        rope=read_rope(fields, attention.head_dim),
        attention=attention,
        moe=check_moe(fields, moe),
        moe_layers=tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers(fields))),
        intermediate_size=width(fields, "intermediate_size", hidden_size(fields)),
    )


def build(config: ModelConfig, kernels: Kernels) -> Decoder:
    return Decoder(kernels, config, [build_block(config, kernels, i) for i in range(config.num_layers)])


def build_block(config: ModelConfig, kernels: Kernels, layer: int) -> Block:
    prefix, hidden, eps = f"model.layers.{layer}", config.hidden_size, config.rms_norm_eps
    attention = config.attention
    if not isinstance(attention, AttentionConfig):
        raise TypeError("qwen3_moe has plain attention")
    return Block(
        attention_norm=RmsNorm(kernels, f"{prefix}.input_layernorm", hidden, eps),
        attention=Attention(kernels, attention, hidden, eps, prefix),
        mlp_norm=RmsNorm(kernels, f"{prefix}.post_attention_layernorm", hidden, eps),
        mlp=MoeMlp(kernels, config.moe, hidden, prefix)
        if config.moe_layers[layer]
        else DenseMlp(kernels, hidden, config.intermediate_size, f"{prefix}.mlp"),
    )
