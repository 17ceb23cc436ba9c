"""Multi-head latent attention (MLA) over a cache of latents, with the expanding matrices absorbed.

Published as: a token's latent c [R] is expanded per head h to a key Kh c and a value Vh c. As scores are
linear in the key, q . (Kh c) = (Kh^T q) . c: the query moves into latent space instead, attention runs
there as if all heads shared one key of R + rope columns whose first R are the value, and Vh expands the
result. So the cache holds R + rope numbers per token, whatever the number of heads.
"""

from collections.abc import Iterator, Sequence

import torch

from moe_runtime.batch import Batch
from moe_runtime.kernels import Kernels, Weight
from moe_runtime.kernels.cache_rows import row_size
from moe_runtime.layers.cache import LayerCache, new_rows
from moe_runtime.layers.linear import HeadLinear, Linear, Rows
from moe_runtime.layers.norm import RmsNorm
from moe_runtime.layers.rope import Rotation
from moe_runtime.layers.slots import Place, Slot
from moe_runtime.model_config import LatentAttentionConfig


class LatentAttention:
    """x [T, H] -> [T, H]. ``softmax_scale`` is YaRN's factor on the attention's scale."""

    def __init__(
        self,
        kernels: Kernels,
        config: LatentAttentionConfig,
        hidden: int,
        prefix: str,
        softmax_scale: float = 1.0,
    ) -> None:
        self._kernels = kernels
        self.config = config
        head_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        self.scale = head_dim**-0.5 * softmax_scale
        self._latent_dim = config.kv_lora_rank + config.qk_rope_head_dim
        query_dim = config.num_heads * head_dim
        latent = Rows(f"{prefix}.kv_a_proj_with_mqa", self._latent_dim, config.bias)
        self.query_norm: RmsNorm | None = None
        self.query_expand: Linear | None = None
        if config.q_lora_rank is None:
            query = Rows(f"{prefix}.q_proj", query_dim)
        else:
            rank, eps = config.q_lora_rank, config.latent_norm_eps
            query = Rows(f"{prefix}.q_a_proj", rank, config.bias)
            self.query_norm = RmsNorm(kernels, f"{prefix}.q_a_layernorm", rank, eps)
            self.query_expand = Linear(
                kernels, rank, [Rows(f"{prefix}.q_b_proj", query_dim)], part="attention"
            )
        self._split = [query.count, config.kv_lora_rank, config.qk_rope_head_dim]
        self.inputs = Linear(kernels, hidden, [query, latent], part="attention")
        self.latent_norm = RmsNorm(
            kernels, f"{prefix}.kv_a_layernorm", config.kv_lora_rank, config.latent_norm_eps
        )
        self._expand_name = f"{prefix}.kv_b_proj.weight"
        self.absorb = HeadLinear(kernels)  # queries into latent space
        self.expand = HeadLinear(kernels)  # attended latents to values
        value_dim = config.num_heads * config.v_head_dim
        output = Rows(f"{prefix}.o_proj", hidden, config.bias)
        self.output = Linear(kernels, value_dim, [output], part="attention")

    def __call__(self, x: torch.Tensor, batch: Batch, cache: LayerCache, rotation: Rotation) -> torch.Tensor:
        kernels, config = self._kernels, self.config
        rank, heads = config.kv_lora_rank, config.num_heads
        # 1. Queries, and the one latent that stands for all heads' keys and values.
        query, latent, shared_key = self.inputs(x).split_with_sizes(self._split, 1)
        if self.query_norm is not None and self.query_expand is not None:
            query = self.query_expand(self.query_norm(query.contiguous()))
        query = query.reshape(x.shape[0], heads, -1)
        key = torch.cat((self.latent_norm(latent.contiguous()), shared_key), dim=1).unsqueeze(1)
        # 2. The query in latent space; its last columns, like the key's, carry the position.
        plain, turned = query.split_with_sizes([config.qk_nope_head_dim, config.qk_rope_head_dim], 2)
        query = torch.cat((self.absorb(plain.contiguous()), turned), dim=2)
        turn = (rotation.cos, rotation.sin, batch.positions, rotation.interleaved)
        query = kernels.rope(query, *turn, offset=rank)
        kernels.rope_write_cache(key, *turn, cache.keys, batch.slots, offset=rank)
        # 3. Attention over the cache, and back to each head's values.
        mixed = kernels.attention(
            query,
            cache.keys,
            None,
            batch.positions,
            batch.sequence_rows,
            batch.block_tables,
            self.scale,
            v_dim=rank,
        )
        return self.output(self.expand(mixed).reshape(x.shape[0], -1))

    def slots(self) -> Iterator[Slot]:
        config = self.config
        yield from self.inputs.slots()
        if self.query_norm is not None and self.query_expand is not None:
            yield from self.query_norm.slots()
            yield from self.query_expand.slots()
        yield from self.latent_norm.slots()
        rows = config.num_heads * (config.qk_nope_head_dim + config.v_head_dim)
        yield Slot(
            self._expand_name,
            (rows, config.kv_lora_rank),
            self._write_heads,
            part="attention",
            matrices=self._matrices,
            places=(Place(self.absorb, "packed"), Place(self.expand, "packed")),
        )
        yield from self.output.slots()

    def _matrices(self, weight: torch.Tensor) -> list[torch.Tensor]:
        """Per head, the first rows of kv_b_proj make keys, the rest values: all heads' keys, then values."""
        per_head = weight.view(self.config.num_heads, -1, self.config.kv_lora_rank)
        keys, values = per_head.split([self.config.qk_nope_head_dim, self.config.v_head_dim], dim=1)
        return [*keys.transpose(1, 2), *values]

    def _write_heads(self, matrices: Sequence[Weight]) -> None:
        self.absorb.write(matrices[: self.config.num_heads])
        self.expand.write(matrices[self.config.num_heads :])

    def new_cache(self, num_blocks: int, block_size: int, dtype: torch.dtype) -> LayerCache:
        device = self._kernels.device
        return LayerCache(new_rows(num_blocks, 1, block_size, self._latent_dim, dtype, device), None)

    def cache_bytes_per_token(self, dtype: torch.dtype) -> int:
        return row_size(self._latent_dim, dtype) * dtype.itemsize
