"""A mixture of experts on the device, several times over, and the calls of our kernels on it."""

from dataclasses import dataclass, field
from typing import Any

import torch
from gpu_clock import Call, Clock, sets_needed
from gpu_shapes import Layer
from gpu_weights import Experts, copy_of, random_experts, reference_rows

from moe_runtime.kernels import reference
from moe_runtime.kernels.triton.fused_moe import fused_moe


@dataclass(frozen=True)
class Tokens:
    """x float32 [T, H]; the experts of each token and their weights, as a router would choose them."""

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    distinct: int  # experts that any token chose

    def rows(self, chosen: slice | torch.Tensor) -> "Tokens":
        ids = self.ids[chosen]
        return Tokens(self.x[chosen], ids, self.weights[chosen], int(ids.unique().numel()))


def random_tokens(layer: Layer, tokens: int, device: torch.device, seed: int) -> Tokens:
    generator = torch.Generator(device).manual_seed(seed)
    x = torch.randn(tokens, layer.hidden, device=device, generator=generator)
    scores = torch.rand(tokens, layer.experts, device=device, generator=generator)
    weights, ids = scores.topk(layer.top_k, dim=1)
    weights = (weights / weights.sum(1, keepdim=True)).contiguous()
    return Tokens(x, ids.int().contiguous(), weights, int(ids.unique().numel()))


@dataclass(frozen=True)
class Mixture:
    """The same layer at several addresses: its experts and the shared one, which every token visits."""

    layer: Layer
    format: str
    sets: list[tuple[Experts, Experts | None]]
    _reference: list[Any] = field(default_factory=list)

    def call(self, which: int, tokens: Tokens) -> Call:
        """Our kernels on one set of weights."""
        experts, shared = self.sets[which % len(self.sets)]
        rows = tokens.x.shape[0]
        zeros = torch.zeros(rows, 1, dtype=torch.int32, device=tokens.x.device)
        ones = torch.ones(rows, 1, device=tokens.x.device)

        def run() -> torch.Tensor:
            out: torch.Tensor = fused_moe(tokens.x, tokens.ids, tokens.weights, experts)
            if shared is not None:
                out += fused_moe(tokens.x, zeros, ones, shared)
            return out

        return run

    def bytes_needed(self, tokens: Tokens) -> float:
        """Each chosen expert once, the shared one, the tokens in and out."""
        experts, shared = self.sets[0]
        weights = experts.num_bytes / self.layer.experts * tokens.distinct
        if shared is not None:
            weights += shared.num_bytes
        return weights + 2.0 * tokens.x.numel() * tokens.x.element_size()

    def truth(self, tokens: Tokens) -> torch.Tensor:
        """The reference in float64, on the numbers that the weights stand for."""
        if not self._reference:
            experts, shared = self.sets[0]
            self._reference.extend([reference_rows(experts), shared and reference_rows(shared)])
        experts_rows, shared_rows = self._reference
        x = tokens.x.double()
        out = reference.fused_moe(x, tokens.ids, tokens.weights.double(), experts_rows)
        if shared_rows is not None:
            ids = torch.zeros(len(x), 1, dtype=torch.int32, device=x.device)
            out += reference.fused_moe(x, ids, torch.ones_like(ids, dtype=x.dtype), shared_rows)
        return out


def build(layer: Layer, weight_format: str, clock: Clock, sets: int = 0) -> Mixture:
    """``sets`` of weights, or as many as the L2 cache asks for."""
    device = clock.device
    experts = random_experts(layer.experts, layer.hidden, layer.intermediate, weight_format, device)
    shared = random_experts(1, layer.hidden, layer.shared, weight_format, device) if layer.shared else None
    smallest = experts.num_bytes / layer.experts * layer.top_k  # what one token reads
    copies = [
        (copy_of(experts), None if shared is None else copy_of(shared))
        for _ in range((sets or sets_needed(clock, smallest)) - 1)
    ]
    return Mixture(layer, weight_format, [(experts, shared), *copies])


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the worst row, in the Euclidean norm; infinite where anything is not a number."""
    difference = (got.double() - expected).norm(dim=1) / expected.norm(dim=1)
    return float(difference.nan_to_num(nan=float("inf")).max())
