"""GLM-4.5 MoE: grouped attention with half of each head rotated; DeepSeek V3's routing and shared experts."""

from moe_runtime.hf_config import Fields
from moe_runtime.hf_rope import read_rope
from moe_runtime.hf_shared import (
    layer_pattern,
    read_attention,
    read_extra_layers,
    read_model,
    read_sigmoid_moe,
    width,
)
from moe_runtime.kernels import Kernels
from moe_runtime.layers.assemble import ModelNames, assemble
from moe_runtime.layers.decoder import Decoder
from moe_runtime.model_config import ModelConfig

NUM_EXPERTS = "n_routed_experts|num_local_experts"
NAMES = ModelNames()


def read_config(fields: Fields) -> ModelConfig:
    fields.expect("topk_method", "noaux_tc", "GLM-4.5 chooses by score plus bias")
    fields.expect("scoring_func", "sigmoid", "GLM-4.5 routes by sigmoid")
    qk_norm = fields.flag("use_qk_norm", False)
    attention = read_attention(
        fields,
        qkv_bias=fields.flag("attention_bias", False),
        qk_norm="head" if qk_norm else "none",
    )
    return read_model(
        fields,
        model_type="glm4_moe",
        rope=read_rope(fields, attention.head_dim, rotary_fraction=0.5),
        attention=attention,
        moe=read_sigmoid_moe(fields, NUM_EXPERTS, "n_shared_experts", 1.0),
        moe_layers=layer_pattern(fields),
        intermediate_size=width(fields, "intermediate_size"),
        num_extra_layers=read_extra_layers(fields),
    )


def build(config: ModelConfig, kernels: Kernels) -> Decoder:
    return assemble(config, kernels, NAMES)
