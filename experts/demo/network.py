"""The demo network for training: a small qwen3_moe decoder in plain torch, float32, fast on few cores.

Tensor letters: B documents, L tokens per document, T = B*L, E experts, H hidden, I intermediate, V vocab.
Weights map one to one onto the Hugging Face layout (see checkpoint.py); transformers is the oracle in tests.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """Sizes of the network; the shipped demo uses the defaults."""

    vocab: int = 3072
    layers: int = 4
    hidden: int = 192
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    experts: int = 20
    top_k: int = 2
    intermediate: int = 80
    context: int = 2048
    rope_theta: float = 1e4
    norm_eps: float = 1e-6


class GroupedLinear(torch.autograd.Function):
    """``out[rows of e] = x[rows of e] @ weight[e].T`` for rows sorted by expert e; one matmul per expert."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: list[int]) -> Tensor:
        """x [R, K], weight [E, N, K], counts: rows per expert -> [R, N]."""
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        out = x.new_empty(x.shape[0], weight.shape[1])
        start = 0
        for expert, count in enumerate(counts):
            if count:
                torch.mm(x[start : start + count], weight[expert].t(), out=out[start : start + count])
            start += count
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad = grads[0].contiguous()
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        start = 0
        for expert, count in enumerate(ctx.counts):
            if count:
                rows = slice(start, start + count)
                torch.mm(grad[rows], weight[expert], out=grad_x[rows])
                torch.mm(grad[rows].t(), x[rows], out=grad_weight[expert])
            start += count
        return grad_x, grad_weight, None


class RmsNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, halves convention; x [B, heads, L, D], cos and sin [L, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention with per-head q and k norms."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        hidden, dim = shape.hidden, shape.head_dim
        self.query = nn.Linear(hidden, shape.heads * dim, bias=False)
        self.key = nn.Linear(hidden, shape.kv_heads * dim, bias=False)
        self.value = nn.Linear(hidden, shape.kv_heads * dim, bias=False)
        self.output = nn.Linear(shape.heads * dim, hidden, bias=False)
        self.query_norm, self.key_norm = RmsNorm(dim, shape.norm_eps), RmsNorm(dim, shape.norm_eps)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, past: list[Tensor] | None
    ) -> Tensor:
        """x [B, L, H], mask [.., L, keys] additive; ``past``: this layer's keys and values; it grows."""
        batch, length, _ = x.shape
        dim, groups = self.shape.head_dim, self.shape.heads // self.shape.kv_heads
        q = rotate(self.query_norm(self.query(x).view(batch, length, -1, dim)).transpose(1, 2), *rope)
        k = rotate(self.key_norm(self.key(x).view(batch, length, -1, dim)).transpose(1, 2), *rope)
        v = self.value(x).view(batch, length, -1, dim).transpose(1, 2)
        if past is not None:
            if past:
                k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
            past[:] = [k, v]
        q = q.reshape(batch, self.shape.kv_heads, groups * length, dim)
        scores = q @ k.transpose(2, 3) * dim**-0.5
        scores = scores.view(batch, self.shape.heads, length, -1) + mask
        out = scores.softmax(-1).view(batch, self.shape.kv_heads, groups * length, -1) @ v
        out = out.view(batch, self.shape.heads, length, dim).transpose(1, 2).reshape(batch, length, -1)
        return self.output(out)


@dataclass
class Routing:
    """What a forward pass needs from and reports to training: pools in, balance terms out."""

    real: Tensor | None = None  # [B, L] bool: not padding
    pool_sizes: Tensor | None = None  # [B]: experts a document may use
    keep: Tensor | None = None  # [layers, E] bool: a served mask, for evaluation
    balance: Tensor | float = 0.0
    z_loss: Tensor | float = 0.0
    gate_mass: list[Tensor] | None = None  # per layer [E], summed gate weights, when asked for


class Experts(nn.Module):
    """Router and experts of one layer: softmax, top-k, renormalised; dropless."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.router = nn.Linear(shape.hidden, shape.experts, bias=False)
        self.gate_up = nn.Parameter(torch.empty(shape.experts, 2 * shape.intermediate, shape.hidden))
        self.down = nn.Parameter(torch.empty(shape.experts, shape.hidden, shape.intermediate))

    def forward(self, x: Tensor, routing: Routing, layer: int) -> Tensor:
        """x [B, L, H] -> [B, L, H]."""
        batch, length, hidden = x.shape
        shape, flat = self.shape, x.reshape(batch * length, hidden)
        logits = self.router(flat)
        if routing.pool_sizes is not None and routing.real is not None:
            logits = logits + self._pool_mask(logits.view(batch, length, -1), routing).reshape(logits.shape)
        if routing.keep is not None:
            logits = logits.masked_fill(~routing.keep[layer], float("-inf"))
        probabilities = logits.softmax(-1)
        weights, ids = probabilities.topk(shape.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        if self.training and routing.real is not None:
            self._balance(logits, probabilities, ids, routing)
        if routing.gate_mass is not None and routing.real is not None:
            mass = torch.zeros_like(probabilities).scatter_(1, ids, weights)
            routing.gate_mass[layer] += mass[routing.real.reshape(-1)].sum(0)
        order = ids.reshape(-1).argsort(stable=True)
        rows = order // shape.top_k
        counts: list[int] = torch.bincount(ids.reshape(-1), minlength=shape.experts).tolist()
        both = GroupedLinear.apply(flat.index_select(0, rows), self.gate_up, counts)
        gate, up = both.chunk(2, dim=-1)
        done = GroupedLinear.apply(nn.functional.silu(gate) * up, self.down, counts)
        done = done * weights.reshape(-1).index_select(0, order).unsqueeze(-1)
        return torch.zeros_like(flat).index_add(0, rows, done).view(batch, length, hidden)

    @staticmethod
    def _pool_mask(logits: Tensor, routing: Routing) -> Tensor:
        """0 inside and -inf outside each document's pool: its P experts of highest mean probability."""
        with torch.no_grad():
            mean = (logits.softmax(-1) * routing.real.unsqueeze(-1)).sum(1)  # type: ignore[union-attr]
            rank = mean.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            inside = rank < routing.pool_sizes.unsqueeze(-1)  # type: ignore[union-attr]
            mask = torch.zeros_like(mean).masked_fill(~inside, float("-inf"))
        return mask.unsqueeze(1).expand_as(logits)

    @staticmethod
    def _balance(logits: Tensor, probabilities: Tensor, ids: Tensor, routing: Routing) -> None:
        real = routing.real.reshape(-1).to(probabilities.dtype)  # type: ignore[union-attr]
        total = real.sum()
        chosen = torch.zeros_like(probabilities).scatter_(1, ids, 1.0)
        share = (chosen * real.unsqueeze(-1)).sum(0) / (total * ids.shape[1])
        mean = (probabilities * real.unsqueeze(-1)).sum(0) / total
        routing.balance = routing.balance + logits.shape[1] * (share * mean).sum()
        routing.z_loss = routing.z_loss + (logits.logsumexp(-1).square() * real).sum() / total


class Block(nn.Module):
    """Pre-norm attention and experts."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm, self.experts_norm = (RmsNorm(shape.hidden, shape.norm_eps) for _ in range(2))
        self.attention, self.experts = Attention(shape), Experts(shape)


class Network(nn.Module):
    """The whole decoder with tied embeddings."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(shape.vocab, shape.hidden)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = RmsNorm(shape.hidden, shape.norm_eps)
        angles = torch.outer(
            torch.arange(shape.context, dtype=torch.float32),
            shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim),
        )
        angles = torch.cat((angles, angles), dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                scale = 0.02 if "embedding" in name or "router" in name else 0.8 * parameter.shape[-1] ** -0.5
                if "down" in name or "output" in name:
                    scale *= (2 * shape.layers) ** -0.5
                with torch.no_grad():
                    parameter.normal_(0.0, scale, generator=generator)

    def forward(
        self,
        ids: Tensor,
        routing: Routing,
        mask: Tensor | None = None,
        past: list[list[Tensor]] | None = None,
    ) -> Tensor:
        """Hidden states [B, L, H] of ``ids`` [B, L]; logits are ``logits(hidden)``, where they are wanted."""
        length = ids.shape[1]
        start = past[0][0].shape[2] if past and past[0] else 0
        rope = (self.cos[start : start + length], self.sin[start : start + length])
        if mask is None:
            mask = torch.full((length, length), float("-inf")).triu(1)
        x = self.embedding(ids)
        for index, block in enumerate(self.blocks):
            x = x + block.attention(block.attention_norm(x), rope, mask, past[index] if past else None)
            x = x + block.experts(block.experts_norm(x), routing, index)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] -> [..., V]."""
        return nn.functional.linear(hidden, self.embedding.weight)
