"""The skeleton all architectures share: embedding, layers of attention and MLP on a residual stream, head.

What differs (which attention, which MLP, what the tensors are called) comes in as arguments from
``models/<model_type>.py``.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from moe_runtime.batch import Batch
from moe_runtime.kernels import Kernels, RouteMeter
from moe_runtime.layers.cache import Cache, LayerCache
from moe_runtime.layers.linear import Embedding, Linear, Rows, TiedHead
from moe_runtime.layers.moe import Fence, MoeMlp
from moe_runtime.layers.norm import RmsNorm
from moe_runtime.layers.program import build_program
from moe_runtime.layers.rope import Rotation, build_rotation
from moe_runtime.layers.slots import Slot
from moe_runtime.model_config import ModelConfig


class AttentionLayer(Protocol):
    def __call__(
        self, x: torch.Tensor, batch: Batch, cache: LayerCache, rotation: Rotation
    ) -> torch.Tensor: ...
    def slots(self) -> Iterator[Slot]: ...
    def new_cache(self, num_blocks: int, block_size: int, dtype: torch.dtype) -> LayerCache: ...
    def cache_bytes_per_token(self, dtype: torch.dtype) -> int: ...


class MlpLayer(Protocol):
    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, norm: RmsNorm, fence: Fence | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]: ...
    def slots(self) -> Iterator[Slot]: ...


@dataclass(frozen=True)
class Block:
    """One layer: residual += attention(norm(residual)); residual += mlp(norm(residual))."""

    attention_norm: RmsNorm
    attention: AttentionLayer
    mlp_norm: RmsNorm
    mlp: MlpLayer

    def slots(self) -> Iterator[Slot]:
        for part in (self.attention_norm, self.attention, self.mlp_norm, self.mlp):
            yield from part.slots()


@dataclass(frozen=True)
class DecoderNames:
    """Checkpoint names outside the layers; ``layer`` is the prefix of layer i."""

    embedding: str = "model.embed_tokens"
    layer: str = "model.layers.{}"
    norm: str = "model.norm"
    head: str = "lm_head"


class Decoder:
    """A whole model. ``config`` says its shape; ``forward`` maps a batch of tokens to logits."""

    def __init__(
        self,
        kernels: Kernels,
        config: ModelConfig,
        blocks: Sequence[Block],
        names: DecoderNames = DecoderNames(),  # noqa: B008 (frozen)
    ) -> None:
        self._kernels = kernels
        self.config = config
        self.blocks = tuple(blocks)
        self._names = names
        self.moves = 0  # how often tensors that programs and graphs point to became others
        self.embedding = Embedding(kernels, names.embedding, config.vocab_size, config.hidden_size)
        self.norm = RmsNorm(kernels, names.norm, config.hidden_size, config.rms_norm_eps)
        self.head: TiedHead | Linear
        if config.tie_word_embeddings:
            self.head = TiedHead(kernels, self.embedding)
        else:
            self.head = Linear(
                kernels, config.hidden_size, [Rows(names.head, config.vocab_size)], part="lm_head"
            )

    def forward(self, batch: Batch, cache: Cache, meter: RouteMeter | None = None) -> torch.Tensor:
        """Logits float32 [R, V] of the R rows in ``batch.logit_rows``; fills the cache for all T tokens.

        ``meter``, on the kernels' device, is told what masks did: ``lost`` by all layers but the last one,
        which sees the rows with logits alone.

        A row's logits do not depend on the other rows. T = 0 is not a batch. The batch may be on the CPU; the
        logits are on the kernels' device.
        """
        if cache.program is None:
            return self._forward(batch, cache, meter)
        if cache.moves != self.moves:
            cache.program, cache.moves = build_program(self, cache.layers, cache.rotation), self.moves
        return cache.program.run(
            batch.token_ids,
            batch.positions,
            batch.slots,
            batch.sequence_rows,
            batch.block_tables,
            batch.logit_rows,
            batch.mask_rows,
            meter,
        )

    @torch.inference_mode()
    def _forward(self, batch: Batch, cache: Cache, meter: RouteMeter | None = None) -> torch.Tensor:
        """What ``cache.program`` computes, layer by layer: to be read, and for other kernels."""
        batch = batch.to(self._kernels.device)
        rows = batch.logit_rows
        fence = Fence(batch.mask_rows, meter)
        # 1. Tokens to vectors; the residual stream is float32 from here on.
        residual = self.embedding(batch.token_ids)
        normed = self.blocks[0].attention_norm(residual)
        next_norms = (*(block.attention_norm for block in self.blocks[1:]), self.norm)
        for block, layer_cache, next_norm in zip(self.blocks, cache.layers, next_norms, strict=True):
            # 2. Each token gathers from its past.
            update = block.attention(normed, batch, layer_cache, cache.rotation)
            # 3. After the last layer's attention only the rows we want logits for still matter.
            if block is self.blocks[-1]:
                fence = fence.select(rows)
                if len(rows) < len(residual):  # they are ascending: else all are wanted
                    update, residual = update.index_select(0, rows), residual.index_select(0, rows)
                if not len(rows):
                    return update.new_empty(0, self.config.vocab_size)
            # 4. Each token on its own passes through its experts.
            normed, residual = block.mlp_norm.add(update, residual)
            normed, residual = block.mlp.add_norm(normed, residual, next_norm, fence)
        # 5. Vectors to logits.
        return self.head(normed)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._kernels.device

    def mixtures(self) -> Iterator[tuple[int, MoeMlp]]:
        """The layers that have a router, with their numbers."""
        for number, block in enumerate(self.blocks):
            if isinstance(block.mlp, MoeMlp):
                yield number, block.mlp

    def slots(self) -> Iterator[Slot]:
        """Every tensor the checkpoint must hold, each once."""
        if isinstance(self.head, Linear):
            yield from self.embedding.slots()
        yield from self.head.slots()
        for block in self.blocks:
            yield from block.slots()
        yield from self.norm.slots()

    def ignores(self, name: str) -> bool:
        """Whether a tensor without a slot may be there: the layers after the last one, which predict further
        tokens, and the rotary frequencies that old files carry (they follow from the config)."""
        if name.endswith(".rotary_emb.inv_freq"):
            return True
        match = re.match(re.escape(self._names.layer).replace(r"\{\}", r"(\d{1,6})") + r"\.", name)
        extra = range(self.config.num_layers, self.config.num_layers + self.config.num_extra_layers)
        return match is not None and int(match[1]) in extra

    def new_cache(self, num_blocks: int, block_size: int, kv_dtype: str = "auto") -> Cache:
        """A zeroed cache of ``num_blocks`` blocks of ``block_size`` tokens. ``kv_dtype`` is EngineConfig's:
        "auto" is bfloat16 for bfloat16 weights, else float32. The weights must be there: with the C++ kernels
        the cache brings its program.
        """
        dtype = self._cache_dtype(kv_dtype)
        layers = tuple(block.attention.new_cache(num_blocks, block_size, dtype) for block in self.blocks)
        positions = min(num_blocks * block_size, self.config.max_position_embeddings)
        rotation = build_rotation(self.config.rope, positions, self._kernels.device)
        program = build_program(self, layers, rotation) if self._kernels.all_from("cpu") else None
        return Cache(layers, rotation, program, self.moves)

    def cache_bytes_per_block(self, block_size: int, kv_dtype: str = "auto") -> int:
        dtype = self._cache_dtype(kv_dtype)
        return block_size * sum(block.attention.cache_bytes_per_token(dtype) for block in self.blocks)

    def _cache_dtype(self, kv_dtype: str) -> torch.dtype:
        if kv_dtype == "auto":
            return torch.bfloat16 if self.config.dtype == "bfloat16" else torch.float32
        return {"bfloat16": torch.bfloat16, "float32": torch.float32, "int8": torch.int8}[kv_dtype]
