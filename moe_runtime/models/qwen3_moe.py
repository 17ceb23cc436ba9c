"""Qwen3 MoE: grouped attention with per-head norms of queries and keys; softmax routing, no shared expert."""

from moe_runtime.hf_config import Fields
from moe_runtime.hf_rope import read_rope
from moe_runtime.hf_shared import (
    check_moe,
    read_attention,
    read_experts,
    read_model,
    refuse_sliding_window,
    sparse_pattern,
    width,
)
from moe_runtime.kernels import Kernels
from moe_runtime.layers.assemble import ModelNames, assemble
from moe_runtime.layers.decoder import Decoder
from moe_runtime.model_config import ModelConfig, MoeConfig

NUM_EXPERTS = "num_experts|num_local_experts"
NAMES = ModelNames()


def read_config(fields: Fields) -> ModelConfig:
    refuse_sliding_window(fields, fields.flag("use_sliding_window", False))
    bias = fields.flag("attention_bias", False)
    attention = read_attention(fields, qkv_bias=bias, output_bias=bias, qk_norm="head")
    num_experts, top_k = read_experts(fields, NUM_EXPERTS)
    moe = MoeConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=width(fields, "moe_intermediate_size"),
        norm_topk_prob=fields.flag("norm_topk_prob", False),
    )
    return read_model(
        fields,
        model_type="qwen3_moe",
        rope=read_rope(fields, attention.head_dim),
        attention=attention,
        moe=check_moe(fields, moe),
        moe_layers=sparse_pattern(fields),
        intermediate_size=width(fields, "intermediate_size"),
    )


def build(config: ModelConfig, kernels: Kernels) -> Decoder:
    return assemble(config, kernels, NAMES)
