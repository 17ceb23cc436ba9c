"""The shape of a model as frozen data. Built by ``models/<model_type>.py``; knows no tensors and no files."""

from dataclasses import dataclass, replace
from typing import Literal

# Beyond anything published, so that a hostile config cannot make us allocate or loop without end.
MAX_LAYERS = 1024
MAX_EXPERTS = 8192
MAX_DIMENSION = 1 << 20
MAX_VOCABULARY = 1 << 22
MAX_CONTEXT = 1 << 24
MAX_TOP_K = 256


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding over ``rotary_dim`` dimensions of each head.

    ``kind`` names how the frequencies are scaled; ``factor``, ``original_context`` and the fields below
    serve the kinds that need them. ``table_scale`` multiplies cos and sin; ``softmax_scale`` multiplies
    the attention's scale (YaRN as DeepSeek uses it).
    """

    theta: float
    rotary_dim: int
    kind: Literal["default", "linear", "yarn", "llama3"] = "default"
    interleaved: bool = False
    factor: float = 1.0
    original_context: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    table_scale: float = 1.0
    softmax_scale: float = 1.0


@dataclass(frozen=True)
class AttentionConfig:
    """Attention with ``num_heads`` queries over ``num_kv_heads`` keys and values (equal: MHA; fewer: GQA).

    ``qk_norm``: RMS norm of queries and keys before the rotation, per ``head`` or over the ``full``
    projection.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    clip_qkv: float | None = None


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Multi-head latent attention: keys and values of a token are one vector of ``kv_lora_rank`` (expanded
    per head by a matrix) and one rotated key of ``qk_rope_head_dim`` shared by all heads.
    """

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    bias: bool = False
    latent_norm_eps: float = 1e-6


@dataclass(frozen=True)
class MoeConfig:
    """Routed experts of width ``intermediate_size`` and an always-on shared expert (width 0: none).

    ``selection_bias``: the router has a bias that takes part in the choice of experts but not in their
    weights.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int = 0
    shared_gate: bool = False
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    norm_topk_prob: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    group_score: Literal["max", "top2_sum"] = "max"
    routed_scaling: float = 1.0
    selection_bias: bool = False


@dataclass(frozen=True)
class Fp8Config:
    """Block-wise float8: weight[i, j] = stored[i, j] * scale[i // block_rows, j // block_columns]."""

    block_rows: int
    block_columns: int


@dataclass(frozen=True)
class Int4Config:
    """4-bit weights as AWQ or GPTQ publish them: weight[n, k] = scale[n, k // group] * (code[n, k] - zero).

    ``group`` 0 is one scale per output. ``zeros``: zero points differ from 8. ``zero_offset`` is what a
    stored zero point lacks (GPTQ's first version stores one less).
    """

    method: Literal["awq", "gptq"]
    group: int
    zeros: bool
    zero_offset: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """Everything the engine and the layers need to know about a model.

    ``moe_layers[i]`` says whether layer i routes; the others are dense MLPs of ``intermediate_size``.
    ``num_experts_per_layer`` is empty where all layers have ``moe.num_experts``; else it has a number for
    every layer (0 for dense ones), the largest of which is ``moe.num_experts``.
    ``dtype`` is the weights' own: bfloat16, float16 or float32 (float8 weights that are widened become it).
    ``fp8`` and ``int4`` say how the checkpoint holds its quantised matrices, if it has any.
    ``num_extra_layers`` counts layers for multi-token prediction that the checkpoint may hold after the last
    ordinary one; they are not used. ``weight_bytes`` is what the weights occupy, filled in by the loader.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    rope: RopeConfig
    attention: AttentionConfig | LatentAttentionConfig
    moe: MoeConfig
    moe_layers: tuple[bool, ...]
    dtype: Literal["bfloat16", "float16", "float32"]
    fp8: Fp8Config | None = None
    int4: Int4Config | None = None
    num_extra_layers: int = 0
    num_experts_per_layer: tuple[int, ...] = ()
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    weight_bytes: int = 0

    def moe_of(self, layer: int) -> MoeConfig:
        """The mixture of a layer that routes."""
        if not self.num_experts_per_layer:
            return self.moe
        return replace(self.moe, num_experts=self.num_experts_per_layer[layer])
