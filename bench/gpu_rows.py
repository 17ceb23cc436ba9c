"""Matrices and what goes row by row: linear layers, the router, norms, positions."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_clock import Call, Clock, sets_needed
from gpu_mixture import relative_error
from gpu_weights import numbers, random_linear
from gpu_work import Sizes, Work

from moe_runtime.kernels import reference
from moe_runtime.kernels.packed import RouterSpec
from moe_runtime.kernels.triton.linear import linear
from moe_runtime.kernels.triton.norm import add_rms_norm
from moe_runtime.kernels.triton.rope import rope_write_cache
from moe_runtime.kernels.triton.router import NUM_ARRIVALS, route_tokens


def matrix(n: int, k: int, weight_format: str, tokens: int) -> Callable[[Clock], Work]:
    def build(clock: Clock) -> Work:
        first = random_linear(n, k, weight_format, clock.device)
        count = sets_needed(clock, first.num_bytes)
        sets = [first] + [random_linear(n, k, weight_format, clock.device) for _ in range(count - 1)]
        x = torch.randn(tokens, k, device=clock.device)
        narrow = x.bfloat16()

        def ours(packed: Any) -> Call:
            return lambda: linear(x, packed)

        def torchs(packed: Any) -> Call:
            weight = packed.data[0, :, :k]
            return lambda: F.linear(narrow, weight)

        def error() -> float:
            expected = x[:4].double() @ numbers(first.matrix, 0).double().T
            return relative_error(linear(x, first)[:4], expected)

        peers = {"torch F.linear": [torchs(packed) for packed in sets]} if weight_format == "bf16" else {}
        moved = first.num_bytes + 4.0 * tokens * (n + k)
        return Work([ours(packed) for packed in sets], moved, 2.0 * tokens * n * k, peers, error)

    return build


def router(sizes: Sizes, tokens: int) -> Callable[[Clock], Work]:
    def build(clock: Clock) -> Work:
        spec = RouterSpec(sizes.top_k, norm_topk_prob=True)
        x = torch.randn(tokens, sizes.hidden, device=clock.device)
        num_bytes = 2.0 * sizes.experts * sizes.hidden
        count = sets_needed(clock, num_bytes)
        sets = [
            torch.randn(sizes.experts, sizes.hidden, device=clock.device).bfloat16() for _ in range(count)
        ]
        narrow = x.bfloat16()
        arrivals = torch.zeros(NUM_ARRIVALS, dtype=torch.int32, device=clock.device)

        def ours(weight: torch.Tensor) -> Call:
            return lambda: route_tokens(x, weight, spec, arrivals=arrivals)

        def torchs(weight: torch.Tensor) -> Call:
            def run() -> torch.Tensor:
                chosen = F.linear(narrow, weight).float().softmax(-1).topk(spec.top_k, dim=-1).values
                return chosen / chosen.sum(-1, keepdim=True)

            return run

        def error() -> float:
            """Of the weights; choices that differ make it large."""
            ids, weights, _ = route_tokens(x, sets[0], spec)
            wanted = reference.route(narrow.double() @ sets[0].double().T, spec)
            dense = torch.zeros(2, tokens, sizes.experts, dtype=torch.float64, device=clock.device)
            dense[0].scatter_(1, ids.long(), weights.double())
            dense[1].scatter_(1, wanted[0].long(), wanted[1])
            return relative_error(dense[0], dense[1])

        moved = num_bytes + 4.0 * tokens * (sizes.hidden + 2 * sizes.top_k)
        operations = 2.0 * tokens * sizes.experts * sizes.hidden
        peers = {"torch softmax, topk": [torchs(weight) for weight in sets]}
        return Work([ours(weight) for weight in sets], moved, operations, peers, error)

    return build


def norm(hidden: int, tokens: int) -> Callable[[Clock], Work]:
    def build(clock: Clock) -> Work:
        count = sets_needed(clock, 16.0 * tokens * hidden)
        rows = torch.randn(count, 2, tokens, hidden, device=clock.device)
        weight = torch.rand(hidden, device=clock.device) + 0.5

        def ours(x: torch.Tensor, residual: torch.Tensor) -> Call:
            return lambda: add_rms_norm(x, residual, weight, 1e-6)

        def torchs(x: torch.Tensor, residual: torch.Tensor) -> Call:
            return lambda: F.rms_norm(x + residual, (hidden,), weight, 1e-6)

        def error() -> float:
            x, residual = rows[0]
            expected = reference.add_rms_norm(x.double(), residual.double(), weight.double(), 1e-6)[0]
            return relative_error(add_rms_norm(x, residual, weight, 1e-6)[0], expected)

        peers = {"torch rms_norm": [torchs(*pair) for pair in rows]}
        return Work([ours(*pair) for pair in rows], 16.0 * tokens * hidden, 0.0, peers, error)

    return build


def positions(sizes: Sizes, tokens: int) -> Callable[[Clock], Work]:
    """Keys turned by their positions, and written to the cache."""

    def build(clock: Clock) -> Work:
        heads, dim, device = sizes.kv_heads, sizes.head_dim, clock.device
        num_bytes = 4.0 * tokens * heads * dim * 2.5  # float32 in and out, bfloat16 into the cache
        count = sets_needed(clock, num_bytes)
        keys = torch.randn(count, tokens, heads, dim, device=device)
        angles = torch.rand(tokens, dim // 2, device=device)
        cos, sin, at = angles.cos(), angles.sin(), torch.arange(tokens, dtype=torch.int32, device=device)
        blocks = -(-tokens // sizes.block_size)
        caches = torch.zeros(count, blocks, heads, sizes.block_size, dim, device=device).bfloat16()
        slots = torch.randperm(blocks * sizes.block_size, device=device)[:tokens]

        def ours(x: torch.Tensor, cache: torch.Tensor) -> Call:
            return lambda: rope_write_cache(x, cos, sin, at, False, cache, slots)

        def error() -> float:
            x = keys[0].clone()
            expected = reference.rope(x.double(), cos.double(), sin.double(), at, False)
            rope_write_cache(x, cos, sin, at, False, caches[0], slots)
            return relative_error(x.flatten(1), expected.flatten(1))

        calls = [ours(x, cache) for x, cache in zip(keys, caches, strict=True)]
        return Work(calls, num_bytes, 0.0, {}, error)

    return build
