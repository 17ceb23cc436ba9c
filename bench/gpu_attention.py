"""Attention over a paged cache: decode and prefill, keys in groups or latent."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from gpu_clock import Call, Clock, sets_needed
from gpu_mixture import relative_error
from gpu_work import Sizes, Work

from moe_runtime.kernels import reference
from moe_runtime.kernels.triton.attention import attention


def _paged(
    sizes: Sizes, clock: Clock, sequences: int, length: int, new: int
) -> tuple[int, int, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Blocks in all, blocks per sequence; then for the last ``new`` tokens of each sequence positions and
    sequence rows, and block tables in random order.
    """
    per_sequence = -(-length // sizes.block_size)
    total = per_sequence * sequences
    tables = torch.randperm(total, device=clock.device).int().view(sequences, per_sequence)
    last = torch.arange(length - new, length, dtype=torch.int32, device=clock.device)
    rows = torch.arange(sequences, dtype=torch.int32, device=clock.device)
    return total, per_sequence, last.repeat(sequences), rows.repeat_interleave(new), tables


def _cached(caches: list[torch.Tensor], tables: torch.Tensor, length: int) -> list[torch.Tensor]:
    """The rows of paged caches one after the other, [sequences, heads, length, dim], as torch wants them."""
    return [
        cache[tables.long()].transpose(1, 2).flatten(2, 3)[:, :, :length].contiguous() for cache in caches
    ]


def grouped(sizes: Sizes, sequences: int, length: int, new: int) -> Callable[[Clock], Work]:
    def build(clock: Clock) -> Work:
        heads, kv_heads, dim, device = sizes.heads, sizes.kv_heads, sizes.head_dim, clock.device
        total, _, positions, rows, tables = _paged(sizes, clock, sequences, length, new)
        num_bytes = 2.0 * sequences * length * kv_heads * dim * 2
        shape = (total, kv_heads, sizes.block_size, dim)
        sets = [
            [torch.randn(shape, device=device).bfloat16() for _ in range(2)]
            for _ in range(sets_needed(clock, num_bytes))
        ]
        q = torch.randn(sequences * new, heads, dim, device=device)
        scale = dim**-0.5

        def ours(k: torch.Tensor, v: torch.Tensor) -> Call:
            return lambda: attention(q, k, v, positions, rows, tables, scale)

        def torchs(k: torch.Tensor, v: torch.Tensor) -> Call:
            keys, values = _cached([k, v], tables, length)
            queries = q.view(sequences, new, heads, dim).transpose(1, 2).bfloat16().contiguous()
            return lambda: F.scaled_dot_product_attention(
                queries, keys, values, is_causal=new > 1, enable_gqa=True, scale=scale
            )

        def error() -> float:
            few = torch.randperm(len(q), device=device)[:4]
            k, v = sets[0]
            expected = reference.attention(q[few].double(), k, v, positions[few], rows[few], tables, scale)
            return relative_error(ours(k, v)()[few].flatten(1), expected.flatten(1))

        pairs = sequences * (new * length - new * (new - 1) // 2)
        return Work(
            [ours(k, v) for k, v in sets],
            num_bytes + q.numel() * 8.0,
            4.0 * pairs * heads * dim,
            {"torch sdpa, not paged": [torchs(k, v) for k, v in sets]},
            error,
        )

    return build


def latent(sizes: Sizes, sequences: int, length: int) -> Callable[[Clock], Work]:
    def build(clock: Clock) -> Work:
        (heads, key_dim, value_dim), device = sizes.latent, clock.device
        total, _, positions, rows, tables = _paged(sizes, clock, sequences, length, 1)
        num_bytes = 2.0 * sequences * length * key_dim
        shape = (total, 1, sizes.block_size, key_dim)
        count = sets_needed(clock, num_bytes)
        sets = [torch.randn(shape, device=device).bfloat16() for _ in range(count)]
        q = torch.randn(sequences, heads, key_dim, device=device)
        scale = key_dim**-0.5

        def ours(cache: torch.Tensor) -> Call:
            return lambda: attention(q, cache, None, positions, rows, tables, scale, value_dim)

        def error() -> float:
            expected = reference.attention(
                q[:4].double(), sets[0], None, positions[:4], rows[:4], tables, scale, value_dim
            )
            return relative_error(ours(sets[0])()[:4].flatten(1), expected.flatten(1))

        operations = 2.0 * sequences * length * heads * (key_dim + value_dim)
        moved = num_bytes + 4.0 * sequences * heads * (key_dim + value_dim)
        return Work([ours(cache) for cache in sets], moved, operations, {}, error)

    return build
