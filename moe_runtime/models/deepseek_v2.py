"""DeepSeek V2: latent attention, dense layers first, shared experts, softmax routing in the best groups."""

from moe_runtime.hf_config import Fields
from moe_runtime.hf_rope import read_rope
from moe_runtime.hf_shared import (
    check_moe,
    layer_pattern,
    read_experts,
    read_groups,
    read_latent_attention,
    read_model,
    width,
)
from moe_runtime.kernels import Kernels
from moe_runtime.layers.assemble import ModelNames, assemble
from moe_runtime.layers.decoder import Decoder
from moe_runtime.model_config import ModelConfig, MoeConfig

PUBLISHED_CODE = frozenset({
    "configuration_deepseek.DeepseekV2Config",
    "modeling_deepseek.DeepseekV2Model",
    "modeling_deepseek.DeepseekV2ForCausalLM",
})  # fmt: skip

NUM_EXPERTS = "n_routed_experts"
NAMES = ModelNames()


def read_config(fields: Fields) -> ModelConfig:
    attention = read_latent_attention(fields)
    num_experts, top_k = read_experts(fields, NUM_EXPERTS)
    method = fields.choice("topk_method", ("greedy", "group_limited_greedy"), "greedy")
    groups = read_groups(fields, default=1)
    fields.expect("scoring_func", "softmax", "DeepSeek V2 routes by softmax")
    fields.expect("norm_topk_prob", False, "the published code and transformers disagree about it")
    fields.expect("mlp_bias", False, "biases in MLPs are not implemented")
    intermediate_size = width(fields, "moe_intermediate_size")
    moe = MoeConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=intermediate_size,
        shared_intermediate_size=intermediate_size * fields.integer("n_shared_experts", 0, 1024),
        num_groups=groups[0] if method == "group_limited_greedy" else 1,
        topk_groups=groups[1] if method == "group_limited_greedy" else 1,
        group_score="max",
        routed_scaling=fields.number("routed_scaling_factor", 0.0, 1e3, 1.0),
    )
    return read_model(
        fields,
        model_type="deepseek_v2",
        rope=read_rope(fields, attention.qk_rope_head_dim, interleaved=True),
        attention=attention,
        moe=check_moe(fields, moe),
        moe_layers=layer_pattern(fields),
        intermediate_size=width(fields, "intermediate_size"),
    )


def build(config: ModelConfig, kernels: Kernels) -> Decoder:
    return assemble(config, kernels, NAMES)
