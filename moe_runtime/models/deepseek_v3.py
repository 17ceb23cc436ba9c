"""DeepSeek V3 (and R1): V2's shape; sigmoid routing where a bias steers the choice of groups and experts."""

from moe_runtime.hf_config import Fields
from moe_runtime.hf_rope import read_rope
from moe_runtime.hf_shared import (
    layer_pattern,
    read_extra_layers,
    read_latent_attention,
    read_model,
    read_sigmoid_moe,
    width,
)
from moe_runtime.kernels import Kernels
from moe_runtime.layers.assemble import ModelNames, assemble
from moe_runtime.layers.decoder import Decoder
from moe_runtime.model_config import ModelConfig

PUBLISHED_CODE = frozenset({
    "configuration_deepseek.DeepseekV3Config",
    "modeling_deepseek.DeepseekV3Model",
    "modeling_deepseek.DeepseekV3ForCausalLM",
})  # fmt: skip

NUM_EXPERTS = "n_routed_experts|num_local_experts"
NAMES = ModelNames()


def read_config(fields: Fields) -> ModelConfig:
    attention = read_latent_attention(fields)
    fields.expect("topk_method", "noaux_tc", "DeepSeek V3 chooses by score plus bias")
    fields.expect("scoring_func", "sigmoid", "DeepSeek V3 routes by sigmoid")
    interleaved = fields.flag("rope_interleave", True)
    return read_model(
        fields,
        model_type="deepseek_v3",
        rope=read_rope(fields, attention.qk_rope_head_dim, interleaved=interleaved),
        attention=attention,
        moe=read_sigmoid_moe(fields, NUM_EXPERTS, "n_shared_experts", 2.5),
        moe_layers=layer_pattern(fields),
        intermediate_size=width(fields, "intermediate_size"),
        num_extra_layers=read_extra_layers(fields),
    )


def build(config: ModelConfig, kernels: Kernels) -> Decoder:
    return assemble(config, kernels, NAMES)
