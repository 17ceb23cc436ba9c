"""The parts of ``config.json`` that every architecture shares: sizes, rotary embedding, routing bounds,
dtype.

``models/<model_type>.py`` reads what is its own and calls these for the rest. Bounds are stated here once.
"""

import math
from typing import Literal, cast

from moe_runtime.hf_config import Fields
from moe_runtime.model_config import (
    MAX_CONTEXT,
    MAX_DIMENSION,
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_TOP_K,
    MAX_VOCABULARY,
    AttentionConfig,
    Fp8Config,
    LatentAttentionConfig,
    ModelConfig,
    MoeConfig,
    RopeConfig,
)

GATED = "only SiLU-gated MLPs are implemented"


def hidden_size(fields: Fields) -> int:
    return fields.integer("hidden_size", 1, MAX_DIMENSION)


def num_layers(fields: Fields) -> int:
    return fields.integer("num_hidden_layers", 1, MAX_LAYERS)


def width(fields: Fields, keys: str, default: int | None = None) -> int:
    """A layer width, for example ``moe_intermediate_size``."""
    return fields.integer(keys, 1, MAX_DIMENSION, default)


def read_model(
    fields: Fields,
    *,
    model_type: str,
    rope: RopeConfig,
    attention: AttentionConfig | LatentAttentionConfig,
    moe: MoeConfig,
    moe_layers: tuple[bool, ...],
    intermediate_size: int,
    num_extra_layers: int = 0,
) -> ModelConfig:
    """What is left after the architecture's own fields; the last call of every ``read_config``.

    Raises CheckpointError for values out of range and for keys that nobody read.
    """
    vocab_size = fields.integer("vocab_size", 1, MAX_VOCABULARY)
    fields.expect("hidden_act", "silu", GATED)
    fields.expect("is_encoder_decoder", False, "only decoders are served")
    fields.expect("add_cross_attention", False, "only decoders are served")
    dtype = fields.choice("dtype|torch_dtype", ("bfloat16", "float16", "float32"))
    config = ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size(fields),
        intermediate_size=intermediate_size,
        num_layers=num_layers(fields),
        max_position_embeddings=_context(fields),
        rms_norm_eps=fields.number("rms_norm_eps", 0.0, 1.0, 1e-6),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        rope=rope,
        attention=attention,
        moe=moe,
        moe_layers=moe_layers,
        dtype=cast(Literal["bfloat16", "float16", "float32"], dtype),
        fp8=read_fp8(fields),
        num_extra_layers=num_extra_layers,
        bos_token_id=fields.optional_integer("bos_token_id", 0, vocab_size - 1),
        eos_token_ids=fields.integers("eos_token_id", 0, vocab_size - 1),
    )
    fields.finish()
    return config


def _context(fields: Fields) -> int:
    return fields.integer("max_position_embeddings", 1, MAX_CONTEXT)


def read_attention(
    fields: Fields,
    *,
    head_dim: int | None = None,
    qkv_bias: bool = False,
    output_bias: bool = False,
    qk_norm: Literal["none", "head", "full"] = "none",
    clip_qkv: float | None = None,
) -> AttentionConfig:
    """Heads and their size; ``head_dim`` when the architecture fixes it, else the config's or hidden / heads."""
    num_heads = fields.integer("num_attention_heads", 1, 65536)
    num_kv_heads = fields.integer("num_key_value_heads", 1, num_heads, num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"{num_kv_heads} does not divide {num_heads} heads")
    if head_dim is None:
        head_dim = fields.optional_integer("head_dim", 1, 65536)
    if head_dim is None:
        if hidden_size(fields) % num_heads:
            raise fields.error(
                "num_attention_heads", f"{num_heads} does not divide hidden_size and no head_dim"
            )
        head_dim = hidden_size(fields) // num_heads
    return AttentionConfig(num_heads, num_kv_heads, head_dim, qkv_bias, output_bias, qk_norm, clip_qkv)


def refuse_sliding_window(fields: Fields, enabled: bool) -> None:
    """Attention over a window is not implemented. A window at least as long as the context changes nothing."""
    window = fields.optional_integer("sliding_window", 0, MAX_CONTEXT)
    if enabled and window and window < _context(fields):
        raise fields.error(
            "sliding_window",
            f"attention over a window of {window} tokens is not implemented; a model trained with it would "
            f"answer wrongly beyond that. Set max_position_embeddings to {window} or less to serve it",
        )


def layer_pattern(fields: Fields, first_dense: int, frequency: int) -> tuple[bool, ...]:
    """Layer i routes when i >= first_dense and i is a multiple of frequency (DeepSeek's rule)."""
    return tuple(i >= first_dense and i % frequency == 0 for i in range(num_layers(fields)))


def check_moe(fields: Fields, moe: MoeConfig) -> MoeConfig:
    """``moe`` itself, when its numbers fit together."""
    per_group, rest = divmod(moe.num_experts, moe.num_groups)
    if rest:
        raise fields.error("n_group", f"{moe.num_groups} groups do not divide {moe.num_experts} experts")
    if moe.topk_groups > moe.num_groups:
        raise fields.error("topk_group", f"{moe.topk_groups} exceeds the {moe.num_groups} groups")
    if moe.group_score == "top2_sum" and moe.num_groups > 1 and per_group < 2:
        raise fields.error("n_group", f"{moe.num_groups} groups leave fewer than two experts in each")
    if moe.top_k > moe.topk_groups * per_group:
        raise fields.error(
            "num_experts_per_tok",
            f"{moe.top_k} experts per token exceed the {moe.topk_groups * per_group} that can be chosen",
        )
    return moe


def read_experts(fields: Fields, keys: str) -> tuple[int, int]:
    """(number of experts, experts per token)."""
    num_experts = fields.integer(keys, 1, MAX_EXPERTS)
    return num_experts, fields.integer("num_experts_per_tok", 1, min(MAX_TOP_K, num_experts))


def read_groups(fields: Fields) -> tuple[int, int]:
    """(number of groups, groups that stay in the race)."""
    return fields.integer("n_group", 1, MAX_EXPERTS, 1), fields.integer("topk_group", 1, MAX_EXPERTS, 1)


def read_fp8(fields: Fields) -> Fp8Config | None:
    """``quantization_config`` as DeepSeek and Qwen publish it: e4m3 weights, one scale per block."""
    section = fields.section("quantization_config")
    if section is None:
        return None
    section.choice("quant_method", ("fp8",))
    section.choice("fmt", ("e4m3",), "e4m3")
    section.choice("scale_fmt", ("ue8m0", "float"), "float")
    section.choice("activation_scheme", ("dynamic",), "dynamic")  # activations stay float32 here
    section.strings("modules_to_not_convert")  # their tensors are simply not float8
    section.flag("dequantize", False)
    block = section.integers("weight_block_size", 1, 65536)
    if len(block) != 2:
        raise section.error("weight_block_size", "expected two block sizes: only block-wise scales are read")
    section.finish()
    return Fp8Config(*block)


def read_rope(
    fields: Fields, dimensions: int, *, theta: float = 10_000.0, rotary_fraction: float = 1.0, **fixed: bool
) -> RopeConfig:
    """The rotary embedding of heads of ``dimensions``; in ``rope_parameters``, or spread over older keys.

    ``theta`` and ``rotary_fraction`` are the architecture's defaults; ``fixed`` passes on ``interleaved``.
    """
    section = fields.section("rope_parameters|rope_scaling") or Fields({})
    theta = fields.number("rope_theta", 1.0, 1e12, theta)
    theta = section.number("rope_theta", 1.0, 1e12, theta)
    fraction = fields.number("partial_rotary_factor", 0.0, 1.0, rotary_fraction)
    fraction = section.number("partial_rotary_factor", 0.0, 1.0, fraction)
    rotary_dim = int(dimensions * fraction)
    if rotary_dim < 2 or rotary_dim % 2:
        raise fields.error(
            "partial_rotary_factor", f"rotary dimension {rotary_dim} is not a positive even number"
        )
    kind = section.choice("rope_type|type", ("default", "linear", "yarn", "llama3"), "default")
    rope = RopeConfig(theta, rotary_dim, interleaved=fixed.get("interleaved", False))
    if kind != "default":
        rope = _scaled(fields, section, rope, kind)
    section.finish()
    return rope


def _scaled(fields: Fields, section: Fields, rope: RopeConfig, kind: str) -> RopeConfig:
    context = _context(fields)
    factor = section.number("factor", 1.0, 1e6)
    if kind == "linear":
        return RopeConfig(rope.theta, rope.rotary_dim, "linear", rope.interleaved, factor)
    original = section.integer("original_max_position_embeddings", 1, MAX_CONTEXT, context)
    if kind == "llama3":
        low = section.number("low_freq_factor", 1e-6, 1e6)
        high = section.number("high_freq_factor", 1e-6, 1e6)
        if high <= low:
            raise section.error("high_freq_factor", f"{high:g} is not above low_freq_factor {low:g}")
        return RopeConfig(
            rope.theta, rope.rotary_dim, "llama3", rope.interleaved, factor, original,
            low_freq_factor=low, high_freq_factor=high,
        )  # fmt: skip
    mscale = section.number("mscale", 0.0, 1e3, 0.0)
    mscale_all = section.number("mscale_all_dim", 0.0, 1e3, 0.0)
    if mscale and mscale_all:
        table_scale = yarn_scale(factor, mscale) / yarn_scale(factor, mscale_all)
    else:
        table_scale = yarn_scale(factor, 1.0)
    return RopeConfig(
        rope.theta, rope.rotary_dim, "yarn", rope.interleaved, factor, original,
        beta_fast=section.number("beta_fast", 0.0, 1e6, 0.0) or 32.0,
        beta_slow=section.number("beta_slow", 0.0, 1e6, 0.0) or 1.0,
        truncate=section.flag("truncate", True),
        table_scale=section.number("attention_factor", 0.0, 1e3, table_scale),
        softmax_scale=yarn_scale(factor, mscale_all) ** 2 if mscale_all else 1.0,
    )  # fmt: skip


def yarn_scale(factor: float, mscale: float) -> float:
    """How much longer contexts sharpen attention, from the YaRN paper."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0
