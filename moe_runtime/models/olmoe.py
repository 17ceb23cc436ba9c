"""OLMoE: norms over the whole query and key projections, optional clipping, every layer a mixture."""

from moe_runtime.hf_config import Fields
from moe_runtime.hf_rope import read_rope
from moe_runtime.hf_shared import (
    check_moe,
    num_layers,
    read_attention,
    read_experts,
    read_model,
    width,
)
from moe_runtime.kernels import Kernels
from moe_runtime.layers.assemble import ModelNames, assemble
from moe_runtime.layers.decoder import Decoder
from moe_runtime.model_config import ModelConfig, MoeConfig

NUM_EXPERTS = "num_experts|num_local_experts"
NAMES = ModelNames()


def read_config(fields: Fields) -> ModelConfig:
    bias = fields.flag("attention_bias", False)
    clip = fields.optional_number("clip_qkv", 1e-6, 1e6)
    attention = read_attention(fields, qkv_bias=bias, output_bias=bias, qk_norm="full", clip_qkv=clip)
    num_experts, top_k = read_experts(fields, NUM_EXPERTS)
    intermediate_size = width(fields, "intermediate_size")
    norm_topk_prob = fields.flag("norm_topk_prob", False)
    moe = MoeConfig(num_experts, top_k, intermediate_size, norm_topk_prob=norm_topk_prob)
    return read_model(
        fields,
        model_type="olmoe",
        rope=read_rope(fields, attention.head_dim),
        attention=attention,
        moe=check_moe(fields, moe),
        moe_layers=(True,) * num_layers(fields),
        intermediate_size=intermediate_size,
    )


def build(config: ModelConfig, kernels: Kernels) -> Decoder:
    return assemble(config, kernels, NAMES)
