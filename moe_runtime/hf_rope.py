"""The rotary embedding's part of ``config.json``, in its new form (``rope_parameters``) and its old ones.

Ways of scaling that are not implemented (``dynamic``, ``longrope``, sections for images) are refused.
"""

import math

from moe_runtime.hf_config import Fields
from moe_runtime.hf_shared import context_length
from moe_runtime.model_config import MAX_CONTEXT, RopeConfig


def read_rope(
    fields: Fields,
    dimensions: int,
    *,
    theta: float = 10_000.0,
    rotary_fraction: float | None = None,
    interleaved: bool = False,
) -> RopeConfig:
    """The rotary embedding of heads of ``dimensions``; in ``rope_parameters``, or spread over older keys.

    ``theta`` and ``rotary_fraction`` are the architecture's defaults; None: it rotates whole heads, always.
    """
    section = fields.section("rope_parameters|rope_scaling") or Fields({})
    theta = _either(fields, section, "rope_theta", 2.0, 1e12, theta)
    least = 1.0 if rotary_fraction is None else 0.0
    fraction = _either(fields, section, "partial_rotary_factor", least, 1.0, rotary_fraction or 1.0)
    rotary_dim = int(dimensions * fraction)
    if rotary_dim < 2 or rotary_dim % 2:
        raise fields.error(
            "partial_rotary_factor", f"rotary dimension {rotary_dim} is not a positive even number"
        )
    kind = section.choice("rope_type|type", ("default", "linear", "yarn", "llama3"), "default")
    rope = RopeConfig(theta, rotary_dim, interleaved=interleaved)
    if kind != "default":
        rope = _scaled(fields, section, rope, kind)
    section.finish()
    return rope


def _either(fields: Fields, section: Fields, key: str, low: float, high: float, default: float) -> float:
    """A number that old files have at the top and new ones in the section; refused where they disagree."""
    outer, inner = fields.optional_number(key, low, high), section.optional_number(key, low, high)
    if outer is not None and inner is not None and outer != inner:
        raise section.error(key, f"{inner:g}, but {outer:g} outside of the section")
    return next((value for value in (inner, outer) if value is not None), default)


def _scaled(fields: Fields, section: Fields, rope: RopeConfig, kind: str) -> RopeConfig:
    context = context_length(fields)
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
    fast = section.number("beta_fast", 0.0, 1e6, 0.0) or 32.0
    slow = section.number("beta_slow", 0.0, 1e6, 0.0) or 1.0
    if fast < slow:
        raise section.error("beta_fast", f"{fast:g} is below beta_slow {slow:g}")
    return RopeConfig(
        rope.theta, rope.rotary_dim, "yarn", rope.interleaved, factor, original,
        beta_fast=fast,
        beta_slow=slow,
        truncate=section.flag("truncate", True),
        table_scale=section.number("attention_factor", 0.0, 1e3, table_scale),
        softmax_scale=yarn_scale(factor, mscale_all) ** 2 if mscale_all else 1.0,
    )  # fmt: skip


def yarn_scale(factor: float, mscale: float) -> float:
    """How much longer contexts sharpen attention, from the YaRN paper."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0
