"""A filled Decoder as one C++ call per step: the fast form of this folder's layers, with the same bits.

Each function describes one class; what a layer computes is told by the class, and again by csrc/step*.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moe_runtime.kernels import step
from moe_runtime.kernels.step import Descriptors, StepProgram, step_program
from moe_runtime.layers.attention import Attention
from moe_runtime.layers.experts import ExpertWeights
from moe_runtime.layers.latent_attention import LatentAttention
from moe_runtime.layers.linear import Linear
from moe_runtime.layers.moe import DenseMlp, MoeMlp
from moe_runtime.layers.norm import RmsNorm

if TYPE_CHECKING:
    from moe_runtime.layers.cache import LayerCache
    from moe_runtime.layers.decoder import Block, Decoder
    from moe_runtime.layers.rope import Rotation


def build_program(decoder: Decoder, caches: Sequence[LayerCache], rotation: Rotation) -> StepProgram:
    """The program of ``decoder`` over these caches. Weights may change in place later, and must not move.

    Raises KernelError for parts that do not fit each other.
    """
    make = Descriptors()
    return step_program(
        make,
        embedding=make.table(decoder.embedding.table),
        layers=[_layer(make, block, cache) for block, cache in zip(decoder.blocks, caches, strict=True)],
        norm=_norm(make, decoder.norm),
        head=decoder.head.packed,
        rotation=make.rotation(rotation.cos, rotation.sin, rotation.interleaved),
    )


def _layer(make: Descriptors, block: Block, cache: LayerCache) -> Any:
    parts: dict[str, Any] = {}
    if isinstance(block.attention, LatentAttention):
        parts["attention"] = _latent_attention(make, block.attention)
        latent = block.attention.config
        key_dim, value_dim = latent.kv_lora_rank + latent.qk_rope_head_dim, latent.kv_lora_rank
    elif isinstance(block.attention, Attention):
        parts["attention"] = _grouped_attention(make, block.attention)
        key_dim = value_dim = block.attention.config.head_dim
    else:
        raise TypeError(f"no program for {type(block.attention).__name__}")
    if isinstance(block.mlp, MoeMlp):
        moe = block.mlp
        router = _linear(make, moe.router)
        if not isinstance(moe.experts, ExpertWeights):
            raise TypeError("no program for experts in two memories")
        experts, residence = moe.experts.packed, moe.experts.residence
        recovery, constants = moe.recovery.routing, moe.recovery.constants
        parts["experts"] = make.mixture(
            experts, moe.spec, router, moe.selection_bias, moe.masks, residence, recovery, constants
        )
        if moe.shared is not None:
            parts["shared"] = _dense(make, moe.shared)
    elif isinstance(block.mlp, DenseMlp):
        parts["experts"] = _dense(make, block.mlp)
    else:
        raise TypeError(f"no program for {type(block.mlp).__name__}")
    return step.Layer(
        attention_norm=_norm(make, block.attention_norm),
        mlp_norm=_norm(make, block.mlp_norm),
        cache=make.cache(cache.keys, cache.values, key_dim, value_dim),
        **parts,
    )


def _grouped_attention(make: Descriptors, layer: Attention) -> Any:
    clip = layer.config.clip_qkv
    norms: dict[str, Any] = {}
    if layer.query_norm is not None and layer.key_norm is not None:
        norms = {"query_norm": _norm(make, layer.query_norm), "key_norm": _norm(make, layer.key_norm)}
    return step.GroupedAttention(
        inputs=_linear(make, layer.inputs),
        output=_linear(make, layer.output),
        norm_by_head=layer.config.qk_norm == "head",
        clip=math.inf if clip is None else clip,
        scale=layer.scale,
        **norms,
    )


def _latent_attention(make: Descriptors, layer: LatentAttention) -> Any:
    queries: dict[str, Any] = {}
    if layer.query_norm is not None and layer.query_expand is not None:
        queries["query_norm"] = _norm(make, layer.query_norm)
        queries["query_expand"] = _linear(make, layer.query_expand)
    return step.LatentAttention(
        inputs=_linear(make, layer.inputs),
        latent_norm=_norm(make, layer.latent_norm),
        absorb=make.matrix(layer.absorb.packed),
        expand=make.matrix(layer.expand.packed),
        output=_linear(make, layer.output),
        scale=layer.scale,
        **queries,
    )


def _dense(make: Descriptors, layer: DenseMlp) -> Any:
    if layer.gate is None:
        return make.mixture(layer.experts.packed)
    return make.mixture(layer.experts.packed, layer.GATED, _linear(make, layer.gate))


def _linear(make: Descriptors, layer: Linear) -> Any:
    return make.matrix(layer.packed, layer.bias)


def _norm(make: Descriptors, layer: RmsNorm) -> Any:
    return make.norm(layer.weight, layer.eps)
