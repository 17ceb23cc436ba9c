"""Builds a Decoder from its config and the names of its tensors; which layer gets what follows from the
config.
"""

from dataclasses import dataclass

from moe_runtime.kernels import Kernels
from moe_runtime.layers.attention import Attention, AttentionNames
from moe_runtime.layers.decoder import AttentionLayer, Block, Decoder, DecoderNames
from moe_runtime.layers.latent_attention import LatentAttention
from moe_runtime.layers.moe import DenseMlp, MoeMlp, MoeNames
from moe_runtime.layers.norm import RmsNorm
from moe_runtime.model_config import AttentionConfig, ModelConfig


@dataclass(frozen=True)
class ModelNames:
    """What a family calls its tensors. The defaults are the names most families share."""

    decoder: DecoderNames = DecoderNames()
    attention: AttentionNames = AttentionNames()
    latent_attention: str = "self_attn"
    moe: MoeNames = MoeNames()
    dense: str = "mlp"
    attention_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"


def assemble(
    config: ModelConfig,
    kernels: Kernels,
    names: ModelNames = ModelNames(),  # noqa: B008 (frozen)
) -> Decoder:
    """The model, its slots still empty; allocates no weights."""
    blocks = [_block(config, kernels, names, layer) for layer in range(config.num_layers)]
    return Decoder(kernels, config, blocks, names.decoder)


def _block(config: ModelConfig, kernels: Kernels, names: ModelNames, layer: int) -> Block:
    prefix, hidden, eps = names.decoder.layer.format(layer), config.hidden_size, config.rms_norm_eps
    return Block(
        attention_norm=RmsNorm(kernels, f"{prefix}.{names.attention_norm}", hidden, eps),
        attention=_attention(config, kernels, names, prefix),
        mlp_norm=RmsNorm(kernels, f"{prefix}.{names.mlp_norm}", hidden, eps),
        mlp=MoeMlp(kernels, config.moe_of(layer), hidden, prefix, names.moe)
        if config.moe_layers[layer]
        else DenseMlp(kernels, hidden, config.intermediate_size, f"{prefix}.{names.dense}"),
    )


def _attention(config: ModelConfig, kernels: Kernels, names: ModelNames, prefix: str) -> AttentionLayer:
    hidden = config.hidden_size
    if isinstance(config.attention, AttentionConfig):
        return Attention(kernels, config.attention, hidden, config.rms_norm_eps, prefix, names.attention)
    return LatentAttention(
        kernels, config.attention, hidden, f"{prefix}.{names.latent_attention}", config.rope.softmax_scale
    )
