"""Ant Group's Ling 2.0 (Bailing MoE v2): fused query-key-value, per-head norms, partly rotated heads, and
sigmoid routing within the best groups, steered by ``gate.expert_bias``.
"""

from dataclasses import replace

from moe_runtime.hf_config import Fields
from moe_runtime.hf_rope import read_rope
from moe_runtime.hf_shared import (
    layer_pattern,
    read_attention,
    read_extra_layers,
    read_model,
    read_sigmoid_moe,
    refuse_sliding_window,
    width,
)
from moe_runtime.kernels import Kernels
from moe_runtime.layers.assemble import ModelNames, assemble
from moe_runtime.layers.attention import AttentionNames
from moe_runtime.layers.decoder import Decoder, DecoderNames
from moe_runtime.layers.moe import MoeNames
from moe_runtime.model_config import ModelConfig

PUBLISHED_CODE = frozenset({
    "configuration_bailing_moe_v2.BailingMoeV2Config",
    "modeling_bailing_moe_v2.BailingMoeV2Model",
    "modeling_bailing_moe_v2.BailingMoeV2ForCausalLM",
})  # fmt: skip

NUM_EXPERTS = "num_experts"
NAMES = ModelNames(
    decoder=DecoderNames(embedding="model.word_embeddings"),
    attention=AttentionNames(
        inputs=("attention.query_key_value",),
        output="attention.dense",
        query_norm="attention.query_layernorm",
        key_norm="attention.key_layernorm",
    ),
    moe=MoeNames(selection_bias="mlp.gate.expert_bias"),
)


def read_config(fields: Fields) -> ModelConfig:
    refuse_sliding_window(fields, fields.flag("use_sliding_window", False))
    qk_norm = fields.flag("use_qk_norm", True)
    attention = read_attention(
        fields,
        qkv_bias=fields.flag("use_qkv_bias", False),
        output_bias=fields.flag("use_bias", False),
        qk_norm="head" if qk_norm else "none",
    )
    fields.expect("score_function", "sigmoid", "Ling 2.0 routes by sigmoid")
    fields.expect("use_rmsnorm", True, "only RMS norms are implemented")
    fields.choice("router_dtype", ("fp32", "float32", "bf16"), "fp32")  # ours is float32 always
    moe = read_sigmoid_moe(fields, NUM_EXPERTS, "num_shared_experts", 1.0)
    if not moe.norm_topk_prob:
        raise fields.error("norm_topk_prob", "Ling 2.0 always normalises")
    # The published code does not normalise a single weight, and always shares one width among shared experts.
    moe = replace(
        moe,
        norm_topk_prob=moe.top_k > 1,
        selection_bias=fields.flag("moe_router_enable_expert_bias", True),
    )
    shared = fields.optional_integer("moe_shared_expert_intermediate_size", 0, moe.shared_intermediate_size)
    rope = read_rope(fields, attention.head_dim, rotary_fraction=1.0)
    rotary = fields.optional_integer("rotary_dim", 1, attention.head_dim)
    if shared not in (None, moe.shared_intermediate_size, moe.intermediate_size) or rotary not in (
        None,
        rope.rotary_dim,
    ):
        raise fields.error(
            "moe_shared_expert_intermediate_size, rotary_dim", "disagrees with the other sizes"
        )
    return read_model(
        fields,
        model_type="bailing_moe_v2",
        rope=rope,
        attention=attention,
        moe=moe,
        moe_layers=layer_pattern(fields),
        intermediate_size=width(fields, "intermediate_size"),
        num_extra_layers=read_extra_layers(fields),
    )


def build(config: ModelConfig, kernels: Kernels) -> Decoder:
    return assemble(config, kernels, NAMES)
