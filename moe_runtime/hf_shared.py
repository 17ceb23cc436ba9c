"""The parts of ``config.json`` that every architecture shares: sizes, rotary embedding, routing bounds,
dtype.

``models/<model_type>.py`` reads what is its own and calls these for the rest. Bounds are stated here once.
"""

from dataclasses import replace
from typing import Literal, cast

from moe_runtime.hf_config import Fields
from moe_runtime.hf_quantization import read_quantization
from moe_runtime.model_config import (
    MAX_CONTEXT,
    MAX_DIMENSION,
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_TOP_K,
    MAX_VOCABULARY,
    AttentionConfig,
    LatentAttentionConfig,
    ModelConfig,
    MoeConfig,
    RopeConfig,
)

EXPERTS_PER_LAYER = "num_experts_per_layer"
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
    fp8, int4 = read_quantization(fields)
    config = ModelConfig(
        model_type=model_type,
        vocab_size=vocab_size,
        hidden_size=hidden_size(fields),
        intermediate_size=intermediate_size,
        num_layers=num_layers(fields),
        max_position_embeddings=context_length(fields),
        rms_norm_eps=fields.number("rms_norm_eps", 0.0, 1.0),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        rope=rope,
        attention=attention,
        moe=moe,
        moe_layers=moe_layers,
        dtype=cast(Literal["bfloat16", "float16", "float32"], dtype),
        fp8=fp8,
        int4=int4,
        num_extra_layers=num_extra_layers,
        num_experts_per_layer=read_experts_per_layer(fields, moe, moe_layers),
        bos_token_id=fields.optional_integer("bos_token_id", 0, vocab_size - 1),
        eos_token_ids=fields.integers("eos_token_id", 0, vocab_size - 1),
    )
    fields.finish()
    return config


def context_length(fields: Fields) -> int:
    return fields.integer("max_position_embeddings", 1, MAX_CONTEXT)


def read_attention(
    fields: Fields,
    *,
    qkv_bias: bool = False,
    output_bias: bool = False,
    qk_norm: Literal["none", "head", "full"] = "none",
    clip_qkv: float | None = None,
) -> AttentionConfig:
    """Heads and their size: ``head_dim``, or hidden_size / heads where the config has none."""
    num_heads = fields.integer("num_attention_heads", 1, 65536)
    num_kv_heads = fields.integer("num_key_value_heads", 1, num_heads, num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"{num_kv_heads} does not divide {num_heads} heads")
    head_dim = fields.optional_integer("head_dim", 1, 65536)
    if head_dim is None:
        if hidden_size(fields) % num_heads:
            raise fields.error(
                "num_attention_heads", f"{num_heads} does not divide hidden_size and no head_dim"
            )
        head_dim = hidden_size(fields) // num_heads
    return AttentionConfig(num_heads, num_kv_heads, head_dim, qkv_bias, output_bias, qk_norm, clip_qkv)


def read_latent_attention(fields: Fields) -> LatentAttentionConfig:
    """DeepSeek's latent attention."""
    num_heads = fields.integer("num_attention_heads", 1, 65536)
    if fields.integer("num_key_value_heads", 1, 65536, num_heads) != num_heads:
        raise fields.error("num_key_value_heads", f"latent attention has one per head, {num_heads}")
    config = LatentAttentionConfig(
        num_heads=num_heads,
        q_lora_rank=fields.optional_integer("q_lora_rank", 1, MAX_DIMENSION),
        kv_lora_rank=width(fields, "kv_lora_rank"),
        qk_nope_head_dim=width(fields, "qk_nope_head_dim"),
        qk_rope_head_dim=width(fields, "qk_rope_head_dim"),
        v_head_dim=width(fields, "v_head_dim"),
        bias=fields.flag("attention_bias", False),
    )
    head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
    fields.expect("qk_head_dim", head_dim, "it is the sum of the other two")
    fields.expect("head_dim", config.qk_rope_head_dim, "transformers writes the rotated part here")
    return config


def refuse_sliding_window(fields: Fields, enabled: bool) -> None:
    """A window shorter than the context is not implemented; a longer one changes nothing."""
    fields.optional_integer("max_window_layers", 0, MAX_LAYERS)  # says nothing without a window
    for kind in fields.strings("layer_types"):
        if kind != "full_attention":
            raise fields.error("layer_types", f"{kind[:40]!r} is not implemented")
    window = fields.optional_integer("sliding_window", 0, MAX_CONTEXT)
    if enabled and window and window < context_length(fields):
        raise fields.error(
            "sliding_window",
            f"attention over a window of {window} tokens is not implemented; a model trained with it would "
            f"answer wrongly beyond that. Set max_position_embeddings to {window} or less to serve it",
        )


def layer_pattern(fields: Fields) -> tuple[bool, ...]:
    """DeepSeek's rule: the first layers are dense, then layers whose number the frequency divides route."""
    first_dense = fields.integer("first_k_dense_replace", 0, MAX_LAYERS)
    frequency = fields.integer("moe_layer_freq", 1, MAX_LAYERS, 1)
    return tuple(i >= first_dense and i % frequency == 0 for i in range(num_layers(fields)))


def sparse_pattern(fields: Fields) -> tuple[bool, ...]:
    """Qwen's rule: every ``decoder_sparse_step``-th layer routes, except those listed as dense."""
    step = fields.integer("decoder_sparse_step", 1, MAX_LAYERS, 1)
    dense = fields.integers("mlp_only_layers", 0, MAX_LAYERS)
    return tuple(i not in dense and (i + 1) % step == 0 for i in range(num_layers(fields)))


def read_extra_layers(fields: Fields) -> int:
    """How many layers for multi-token prediction the checkpoint may hold after the last ordinary one."""
    return fields.integer("num_nextn_predict_layers|num_mtp_layers", 0, MAX_LAYERS, 0)


def read_sigmoid_moe(fields: Fields, experts: str, shared: str, scaling: float) -> MoeConfig:
    """DeepSeek V3's routing, which later families took over; ``scaling`` is the family's default."""
    num_experts, top_k = read_experts(fields, experts)
    num_groups, topk_groups = read_groups(fields)
    intermediate_size = width(fields, "moe_intermediate_size")
    moe = MoeConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=intermediate_size,
        shared_intermediate_size=intermediate_size * fields.integer(shared, 0, 1024),
        scoring="sigmoid",
        norm_topk_prob=fields.flag("norm_topk_prob", True),
        num_groups=num_groups,
        topk_groups=topk_groups,
        group_score="top2_sum",
        routed_scaling=fields.number("routed_scaling_factor", 0.0, 1e3, scaling),
        selection_bias=True,
    )
    return check_moe(fields, moe)


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


def read_experts_per_layer(fields: Fields, moe: MoeConfig, moe_layers: tuple[bool, ...]) -> tuple[int, ...]:
    """What ``moe-experts export`` writes for layers of unequal size; other programs do not know the field."""
    counts = fields.integers(EXPERTS_PER_LAYER, 0, MAX_EXPERTS)
    if not counts:
        return ()
    if tuple(count > 0 for count in counts) != moe_layers:
        raise fields.error(EXPERTS_PER_LAYER, "expected a number for each layer, 0 for the dense ones alone")
    if max(counts) != moe.num_experts:
        raise fields.error(
            EXPERTS_PER_LAYER, f"its largest number must be the number of experts, {moe.num_experts}"
        )
    for count in sorted({*counts} - {0}):
        check_moe(fields, replace(moe, num_experts=count))
    return counts


def read_groups(fields: Fields, default: int | None = None) -> tuple[int, int]:
    """(number of groups, groups that stay in the race)."""
    num_groups = fields.integer("n_group", 1, MAX_EXPERTS, default)
    return num_groups, fields.integer("topk_group", 1, MAX_EXPERTS, default)
