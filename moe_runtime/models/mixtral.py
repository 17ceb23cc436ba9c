"""Mixtral: Mistral's attention, every layer a mixture whose chosen weights always sum to one."""

from moe_runtime.hf_config import Fields
from moe_runtime.hf_rope import read_rope
from moe_runtime.hf_shared import (
    check_moe,
    num_layers,
    read_attention,
    read_experts,
    read_model,
    refuse_sliding_window,
    width,
)
from moe_runtime.kernels import Kernels
from moe_runtime.layers.assemble import ModelNames, assemble
from moe_runtime.layers.decoder import Decoder
from moe_runtime.layers.moe import MoeNames
from moe_runtime.model_config import ModelConfig, MoeConfig

NUM_EXPERTS = "num_local_experts|num_experts"
NAMES = ModelNames(
    moe=MoeNames(gate="block_sparse_moe.gate", experts="block_sparse_moe.experts", parts=("w1", "w3", "w2"))
)


def read_config(fields: Fields) -> ModelConfig:
    refuse_sliding_window(fields, True)
    attention = read_attention(fields)
    num_experts, top_k = read_experts(fields, NUM_EXPERTS)
    intermediate_size = width(fields, "intermediate_size")
    moe = MoeConfig(num_experts, top_k, intermediate_size, norm_topk_prob=True)
    return read_model(
        fields,
        model_type="mixtral",
        rope=read_rope(fields, attention.head_dim, theta=1e6),
        attention=attention,
        moe=check_moe(fields, moe),
        moe_layers=(True,) * num_layers(fields),
        intermediate_size=intermediate_size,
    )


def build(config: ModelConfig, kernels: Kernels) -> Decoder:
    return assemble(config, kernels, NAMES)
