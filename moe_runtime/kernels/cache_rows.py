"""Rows of a paged cache. A row holds ``dim`` numbers of one token and head, as float32, bfloat16 or int8.

An int8 row is dim codes, padded to a multiple of 4, then a float32 scale for every 64 of them
(csrc/cache_layout.h): value = scale * code. It is one run of bytes, so blocks are copied and freed like
any others.
"""

from __future__ import annotations

import torch

SCALE_GROUP = 64
CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
SMALLEST = 1e-30  # a group of 64 whose largest magnitude is below counts as zero


def row_size(dim: int, dtype: torch.dtype) -> int:
    """Elements of ``dtype`` in a row of ``dim`` numbers, the last dimension of a cache."""
    return _codes_size(dim) + 4 * -(-dim // SCALE_GROUP) if dtype is torch.int8 else dim


def quantize_rows(values: torch.Tensor) -> torch.Tensor:
    """values float32 [..., D] -> int8 rows [..., row_size(D)].

    Symmetric over groups of 64: code = round(x * (127 / max)), scale = max / 127. A group with a NaN or an
    infinity gets a NaN for its scale, so that it is not hidden.
    """
    dim = values.shape[-1]
    groups = -(-dim // SCALE_GROUP)
    padded = torch.nn.functional.pad(values, (0, groups * SCALE_GROUP - dim))
    grouped = padded.view(*values.shape[:-1], groups, SCALE_GROUP)
    largest = grouped.abs().amax(-1)
    counts = grouped.isfinite().all(-1) & (largest >= SMALLEST)
    inverse = torch.full_like(largest, 127.0) / torch.where(counts, largest, 1.0)
    scales = torch.where(counts, largest / 127.0, 0.0)
    scales = torch.where(grouped.isfinite().all(-1), scales, torch.nan)
    codes = torch.where(counts.unsqueeze(-1), grouped * inverse.unsqueeze(-1), 0.0).round().to(torch.int8)
    rows = values.new_zeros(*values.shape[:-1], row_size(dim, torch.int8), dtype=torch.int8)
    rows[..., :dim] = codes.flatten(-2)[..., :dim]
    rows[..., _codes_size(dim) :] = scales.contiguous().view(torch.int8)
    return rows


def dequantize_rows(rows: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """int8 rows [..., row_size(D)] -> values [..., D] in ``dtype``."""
    scales = rows[..., _codes_size(dim) :].contiguous().view(torch.float32)
    return rows[..., :dim].to(dtype) * scales.to(dtype).repeat_interleave(SCALE_GROUP, -1)[..., :dim]


def _codes_size(dim: int) -> int:
    return -(-dim // 4) * 4


def read_rows(
    cache: torch.Tensor, blocks: torch.Tensor, length: int, dim: int, dtype: torch.dtype
) -> torch.Tensor:
    """The first ``length`` rows that a sequence's blocks hold, [Hkv, length, dim]."""
    rows = cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length]
    return dequantize_rows(rows, dim, dtype) if cache.dtype is torch.int8 else rows.to(dtype)
