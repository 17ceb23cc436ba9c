"""A model run layer by layer while somebody watches what its mixtures do. For offline work: serving never
comes here.

T tokens, H hidden, E experts, top_k of them per token.
"""

from dataclasses import dataclass
from typing import Protocol

import torch

from moe_runtime.batch import Batch
from moe_runtime.errors import ConfigError
from moe_runtime.layers.cache import Cache
from moe_runtime.layers.decoder import Decoder
from moe_runtime.layers.experts import ExpertWeights
from moe_runtime.layers.moe import Fence, MoeMlp
from moe_runtime.layers.norm import RmsNorm


@dataclass(frozen=True, eq=False)
class Mixing:
    """What a mixture did with T tokens; f is what an expert made of a token, before its weight.

    layer      the decoder layer's number
    residual   float32 [T, H]: the residual stream that the result is added to
    inputs     [T, H]: what router and experts see of it
    ids        int32 [T, top_k]: the experts chosen
    weights    float32 [T, top_k]: their weights as applied
    squares    float64 [T, top_k]: sum f^2
    peaks      float32 [T, top_k]: max |f|
    mixed      float32 [T, H]: the weighted sum of all f, without the shared expert
    """

    layer: int
    residual: torch.Tensor
    inputs: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    squares: torch.Tensor
    peaks: torch.Tensor
    mixed: torch.Tensor


class Watcher(Protocol):
    """``observe`` is told of every mixture in turn. All tensors are where the model computes."""

    @property
    def counted(self) -> torch.Tensor:
        """uint8 [T]: 1 for the tokens whose outputs go into the sums."""

    def output_sums(self, layer: int) -> torch.Tensor:
        """float64 [E, H]: where the layer's outputs are added, by expert."""

    def observe(self, mixing: Mixing) -> None: ...


@torch.inference_mode()
def trace(model: Decoder, batch: Batch, cache: Cache, watcher: Watcher) -> torch.Tensor:
    """Run ``batch`` through all layers, all tokens through the last one too; fills the cache.

    The result, float32 [T, H], is what the head would see: bit for bit that of ``Decoder.forward`` with the
    kernels of one CPU backend. Raises ConfigError for a model whose experts are not all where it computes.
    """
    batch = batch.to(model.device)
    fence = Fence(batch.mask_rows)
    residual = model.embedding(batch.token_ids)
    normed = model.blocks[0].attention_norm(residual)
    next_norms = (*(block.attention_norm for block in model.blocks[1:]), model.norm)
    for number, block in enumerate(model.blocks):
        layer_cache, next_norm = cache.layers[number], next_norms[number]
        update = block.attention(normed, batch, layer_cache, cache.rotation)
        normed, residual = block.mlp_norm.add(update, residual)
        if isinstance(block.mlp, MoeMlp):
            normed, residual = _mixture(number, block.mlp, normed, residual, next_norm, fence, watcher)
        else:
            normed, residual = block.mlp.add_norm(normed, residual, next_norm, fence)
    return normed


def _mixture(
    number: int,
    mlp: MoeMlp,
    x: torch.Tensor,
    residual: torch.Tensor,
    next_norm: RmsNorm,
    fence: Fence,
    watcher: Watcher,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``mlp.add_norm`` in single steps."""
    if not isinstance(mlp.experts, ExpertWeights) or mlp.experts.residence is not None:
        raise ConfigError(
            f"layer {number}: some experts are elsewhere or absent, so what they do cannot be seen; use "
            "--device cpu, and a model with all its experts"
        )
    ids, weights = mlp.route(x, fence)
    shared = None if mlp.shared is None else mlp.shared(x)
    mixed, squares, peaks = mlp.experts.moments(x, ids, weights, watcher.counted, watcher.output_sums(number))
    watcher.observe(Mixing(number, residual, x, ids, weights, squares, peaks, mixed))
    return next_norm.add(mixed if shared is None else mixed + shared, residual)
