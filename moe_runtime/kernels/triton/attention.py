"""Paged attention: decode and prefill in one kernel, one order of summation, no plan made on the host.

A sequence's positions are cut into splits of a fixed length. Each split is summed from a fresh state, and the
splits are merged in their order. That is the same arithmetic whether one program walks through all splits
(many tokens: it merges as it goes, its running sums wait in the output) or many programs share them (few
tokens and long texts: they leave each split's sums in memory, and a second kernel merges). So a token has the
same bits alone, in any chunk and in any company; which form runs depends on the sizes of tensors alone.

T tokens, Hq query heads, Hkv key heads, D widths. A token whose position is negative or whose sequence does
not exist sees nothing and gets zeros: padding of a captured graph has position -1. Positions beyond the block
table are cut, blocks that the cache does not have read as zeros. Where a value in the cache is NaN or
infinite, the tokens that see it get NaN or infinity, no other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton

from moe_runtime.kernels.cache_rows import row_size
from moe_runtime.kernels.checks import check_dims, failure
from moe_runtime.kernels.triton.aot_case import AotCase
from moe_runtime.kernels.triton.arguments import PLAIN_DTYPES, check
from moe_runtime.kernels.triton.attention_kernels import attention_kernel, merge_kernel
from moe_runtime.kernels.triton.tiles import (
    ATTENTION_SEQUENCES,
    AttentionTiles,
    attention_shares,
    attention_tiles,
    power_of_two,
    two_widths,
)

SPLITS = ("split_best", "split_total", "split_sums")
MERGE_WARPS = 4

# --- the operation ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Heads:
    """The sizes that a kernel is compiled for. ``latent``: the values are the first columns of the keys."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    block_size: int
    dtype: torch.dtype
    latent: bool

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads

    def tiles(self) -> AttentionTiles:
        return attention_tiles(self.dtype.itemsize, sum(two_widths(self.key_dim)), self._value_padded())

    def one_read(self) -> bool:
        """Whether the values are part of a tile of keys as it is."""
        return self.latent and self.value_dim <= two_widths(self.key_dim)[0]

    def _value_padded(self) -> int:
        return two_widths(self.key_dim)[0] if self.one_read() else max(power_of_two(self.value_dim), 32)

    def constants(self, one_token: bool, shared: bool) -> dict[str, Any]:
        tiles, (main, rest) = self.tiles(), two_widths(self.key_dim)
        group = min(power_of_two(self.group), tiles.block_rows)
        return {
            "HEADS": self.heads, "KV_HEADS": self.kv_heads, "KEY_DIM": self.key_dim, "KEY_HALF": main // 2,
            "KEY_REST": rest, "VALUE_DIM": self.value_dim,
            "VALUE_ROW": self.key_dim if self.latent else self.value_dim,
            "HALF": self._value_padded() // 2, "BLOCK_SIZE": self.block_size,
            "GROUP_PADDED": group, "TOKENS": 1 if one_token else tiles.block_rows // group,
            "BLOCK_M": tiles.block_rows, "BLOCK_N": tiles.block_positions, "SPLIT": tiles.split,
            "SHARED": shared,
        }  # fmt: skip

    def merge_constants(self) -> dict[str, Any]:
        padded = power_of_two(self.value_dim)
        return {
            "HEADS": self.heads, "VALUE_DIM": self.value_dim, "VALUE_PADDED": padded,
            "BLOCK_SIZE": self.block_size, "SPLIT": self.tiles().split,
            "BLOCK_HEADS": min(power_of_two(self.heads), max(2048 // padded, 1)),
        }  # fmt: skip


def attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor | None,
    positions: torch.Tensor,
    sequence_rows: torch.Tensor,
    block_tables: torch.Tensor,
    scale: float,
    v_dim: int | None = None,
) -> torch.Tensor:
    """As reference.attention; ``scale`` is above 0. Tokens of one sequence should be neighbours: fast."""
    heads = _check(q, k_cache, v_cache, positions, sequence_rows, block_tables, scale, v_dim)
    num_tokens, (num_sequences, max_blocks) = q.shape[0], block_tables.shape
    out = torch.empty(num_tokens, heads.heads, heads.value_dim, device=q.device)
    if not num_tokens:
        return out
    tiles = heads.tiles()
    num_splits = max(triton.cdiv(max_blocks * heads.block_size, tiles.split), 1)
    one_token = num_tokens <= num_sequences
    constants = heads.constants(one_token, False)
    head_programs = heads.kv_heads * triton.cdiv(heads.group, constants["GROUP_PADDED"])
    token_programs = triton.cdiv(num_tokens, constants["TOKENS"])
    rows = num_tokens * heads.heads
    shares = attention_shares(token_programs * head_programs, num_splits, rows * heads.value_dim * 4)
    splits: list[torch.Tensor | None] = [None] * 3
    if shares > 1:
        splits = [q.new_empty(num_splits * rows * width) for width in (1, 1, heads.value_dim)]
    else:
        shares = 1 if one_token else min(num_sequences, ATTENTION_SEQUENCES)
    constants["SHARED"] = splits[0] is not None
    log2_scale = scale * math.log2(math.e)
    values = None if heads.one_read() else k_cache if v_cache is None else v_cache
    caches = (k_cache, _scales(k_cache), values, _scales(values))
    attention_kernel[(token_programs, head_programs, shares)](
        q, *caches, positions, sequence_rows, block_tables, out, *splits, log2_scale,
        num_tokens, num_sequences, max_blocks, k_cache.shape[0], **constants,
        **tiles.launch_options(one_token),
    )  # fmt: skip
    if splits[0] is not None:
        merging = heads.merge_constants()
        merge_kernel[(num_tokens, triton.cdiv(heads.heads, merging["BLOCK_HEADS"]))](
            positions, sequence_rows, out, *splits, log2_scale, num_tokens, num_sequences, max_blocks,
            **merging, num_warps=MERGE_WARPS,
        )  # fmt: skip
    return out


def _scales(cache: torch.Tensor | None) -> torch.Tensor | None:
    """The memory of an int8 cache as the float32 that its scales are."""
    return cache.view(torch.float32) if cache is not None and cache.dtype is torch.int8 else None


def _check(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor | None, positions: torch.Tensor,
    sequence_rows: torch.Tensor, block_tables: torch.Tensor, scale: float, v_dim: int | None,
) -> Heads:  # fmt: skip
    for name, tensor, dims in (("q", q, 3), ("k_cache", k_cache, 4), ("block_tables", block_tables, 2)):
        check_dims("attention", name, tensor, dims)
    (num_tokens, num_heads, key_dim), (num_blocks, kv_heads, block_size, _) = q.shape, k_cache.shape
    if not kv_heads or num_heads % kv_heads or not num_heads or not key_dim or not block_size:
        raise failure("attention", "q", f"a multiple of {kv_heads} heads", list(q.shape))
    if not (scale > 0 and math.isfinite(scale)):
        raise failure("attention", "scale", "a finite number above 0", scale)
    is_int8 = k_cache.dtype is torch.int8
    value_dim = v_dim or (key_dim if v_cache is None or is_int8 else v_cache.shape[-1])
    if value_dim > key_dim and v_cache is None:
        raise failure("attention", "v_dim", f"at most {key_dim}", value_dim)
    rows = (num_blocks, kv_heads, block_size)
    check("attention", "q", q, q.shape, q.device)
    key_row, value_row = (row_size(dim, k_cache.dtype) for dim in (key_dim, value_dim))
    check("attention", "k_cache", k_cache, (*rows, key_row), q.device, (*PLAIN_DTYPES, torch.int8))
    if v_cache is not None:
        check("attention", "v_cache", v_cache, (*rows, value_row), q.device, (k_cache.dtype,))
    integers = (torch.int32,)
    check("attention", "positions", positions, (num_tokens,), q.device, integers)
    check("attention", "sequence_rows", sequence_rows, (num_tokens,), q.device, integers)
    check("attention", "block_tables", block_tables, block_tables.shape, q.device, integers)
    return Heads(num_heads, kv_heads, key_dim, value_dim, block_size, k_cache.dtype, v_cache is None)


# --- ahead of time ------------------------------------------------------------------------------------------
# What the ranks of a case's heads are: query heads, key heads, key width, value width, one tensor for both.
_MODELS = {
    "qwen3_30b_a3b": (32, 4, 128, 128, False),
    "olmoe": (16, 16, 128, 128, False),
    "mixtral": (32, 8, 128, 128, False),
    "deepseek_v2": (16, 1, 576, 512, True),
}
_FORMS = {
    "decode": (True, True),
    "decode_many": (True, False),
    "mixed": (False, True),
    "prefill": (False, False),
}
_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int8: "*i8"}


def _case(model: str, form: str, dtype: torch.dtype) -> AotCase:
    query_heads, kv_heads, key_dim, value_dim, latent = _MODELS[model]
    heads = Heads(query_heads, kv_heads, key_dim, value_dim, 16, dtype, latent)
    tiles, (one_token, shared) = heads.tiles(), _FORMS[form]
    floats = ("q", "out", *(SPLITS if shared else ()))
    integers = ("positions", "sequence_rows", "block_tables")
    caches = ("keys",) if heads.one_read() else ("keys", "values")
    scales = ("key_scales", "value_scales")[: len(caches) if dtype is torch.int8 else 0]
    sizes = ("num_tokens", "num_sequences", "max_blocks", "num_blocks")
    types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(integers, "*i32") | dict.fromkeys(sizes, "i32")
    types |= dict.fromkeys(caches, _TYPES[dtype]) | dict.fromkeys(scales, "*fp32") | {"scale": "fp32"}
    return AotCase(
        f"{model} {form} {dtype}".replace("torch.", ""),
        attention_kernel,
        {name: types.get(name, "constexpr") for name in attention_kernel.arg_names},
        {name: None for name in ("key_scales", "values", "value_scales", *SPLITS) if name not in types}
        | heads.constants(one_token, shared),
        tiles.num_warps,
        tiles.num_stages,
        aligned=(*floats, *integers, *caches, *scales),
        hip_warps=tiles.hip_warps,
        max_registers=tiles.registers(one_token),
    )


def _merge_case(model: str) -> AotCase:
    query_heads, kv_heads, key_dim, value_dim, latent = _MODELS[model]
    heads = Heads(query_heads, kv_heads, key_dim, value_dim, 16, torch.bfloat16, latent)
    floats, integers = ("out", *SPLITS), ("positions", "sequence_rows")
    sizes = ("num_tokens", "num_sequences", "max_blocks")
    types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(integers, "*i32") | dict.fromkeys(sizes, "i32")
    types["scale"] = "fp32"
    signature = {name: types.get(name, "constexpr") for name in merge_kernel.arg_names}
    constants = heads.merge_constants()
    return AotCase(model, merge_kernel, signature, constants, MERGE_WARPS, 2, aligned=(*floats, *integers))


AOT_CASES = (
    *(_case(model, form, torch.bfloat16) for model in _MODELS for form in _FORMS),
    *(_case(model, form, dtype) for dtype in (torch.int8, torch.float16, torch.float32)
      for model in ("qwen3_30b_a3b", "deepseek_v2") for form in ("decode", "prefill")),
    *(_merge_case(model) for model in _MODELS),
)  # fmt: skip
