"""Attention over the paged cache, with as many or fewer key heads than query heads (MHA, GQA).

T tokens, Hq query heads, Hkv key and value heads, D head_dim.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moe_runtime.batch import Batch
from moe_runtime.kernels import Kernels
from moe_runtime.kernels.cache_rows import row_size
from moe_runtime.layers.cache import LayerCache, new_rows
from moe_runtime.layers.linear import Linear, Rows
from moe_runtime.layers.norm import RmsNorm
from moe_runtime.layers.rope import Rotation
from moe_runtime.layers.slots import Slot
from moe_runtime.model_config import AttentionConfig


@dataclass(frozen=True)
class AttentionNames:
    """Checkpoint names below the layer's prefix; one name in ``inputs`` means one fused tensor."""

    inputs: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    output: str = "self_attn.o_proj"
    query_norm: str = "self_attn.q_norm"
    key_norm: str = "self_attn.k_norm"


class Attention:
    """x [T, H] -> [T, H]; writes the T tokens' keys and values, then lets each attend to its own past."""

    def __init__(
        self,
        kernels: Kernels,
        config: AttentionConfig,
        hidden: int,
        eps: float,
        prefix: str,
        names: AttentionNames = AttentionNames(),  # noqa: B008 (frozen)
    ) -> None:
        self._kernels = kernels
        self.config = config
        self.scale = config.head_dim**-0.5
        widths = [
            heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        ]
        self._split = widths
        rows = widths if len(names.inputs) == 3 else [sum(widths)]
        self.inputs = Linear(
            kernels,
            hidden,
            [
                Rows(f"{prefix}.{name}", count, config.qkv_bias)
                for name, count in zip(names.inputs, rows, strict=True)
            ],
            part="attention",
        )
        self.output = Linear(
            kernels,
            widths[0],
            [Rows(f"{prefix}.{names.output}", hidden, config.output_bias)],
            part="attention",
        )
        self.query_norm: RmsNorm | None = None
        self.key_norm: RmsNorm | None = None
        if config.qk_norm != "none":
            sizes = widths[:2] if config.qk_norm == "full" else [config.head_dim] * 2
            self.query_norm = RmsNorm(kernels, f"{prefix}.{names.query_norm}", sizes[0], eps)
            self.key_norm = RmsNorm(kernels, f"{prefix}.{names.key_norm}", sizes[1], eps)

    def __call__(self, x: torch.Tensor, batch: Batch, cache: LayerCache, rotation: Rotation) -> torch.Tensor:
        kernels, config = self._kernels, self.config
        # 1. Queries, keys and values of these tokens.
        query, key, value = (part.contiguous() for part in self.inputs(x).split_with_sizes(self._split, 1))
        if config.qk_norm == "full":
            query, key = self._normed(query, key)
        if config.clip_qkv is not None:
            for part in (query, key, value):
                part.clamp_(-config.clip_qkv, config.clip_qkv)
        query = query.view(-1, config.num_heads, config.head_dim)
        key = key.view(-1, config.num_kv_heads, config.head_dim)
        value = value.view(-1, config.num_kv_heads, config.head_dim)
        if config.qk_norm == "head":
            query, key = self._normed(query, key)
        # 2. Queries and keys turned by their positions; keys and values into the cache.
        turn = (rotation.cos, rotation.sin, batch.positions, rotation.interleaved)
        query = kernels.rope(query, *turn)
        kernels.rope_write_cache(key, *turn, cache.keys, batch.slots)
        kernels.write_cache(cache.values, value, batch.slots)
        # 3. Attention over it: a token sees itself and everything before it.
        mixed = kernels.attention(
            query,
            cache.keys,
            cache.values,
            batch.positions,
            batch.sequence_rows,
            batch.block_tables,
            self.scale,
        )
        return self.output(mixed.view(x.shape[0], self._split[0]))

    def _normed(self, query: torch.Tensor, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.query_norm is None or self.key_norm is None:
            return query, key
        return self.query_norm(query), self.key_norm(key)

    def slots(self) -> Iterator[Slot]:
        yield from self.inputs.slots()
        yield from self.output.slots()
        if self.query_norm is not None and self.key_norm is not None:
            yield from self.query_norm.slots()
            yield from self.key_norm.slots()

    def new_cache(self, num_blocks: int, block_size: int, dtype: torch.dtype) -> LayerCache:
        shape = (num_blocks, self.config.num_kv_heads, block_size, self.config.head_dim)
        device = self._kernels.device
        return LayerCache(new_rows(*shape, dtype, device), new_rows(*shape, dtype, device))

    def cache_bytes_per_token(self, dtype: torch.dtype) -> int:
        return 2 * self.config.num_kv_heads * row_size(self.config.head_dim, dtype) * dtype.itemsize
