"""How the bits of a weight matrix lie in device memory, so that the inner loop of products.py can widen them.

Integers and float8 are read as 32-bit words, which hold 8 int4, 4 int8 or 4 float8 of consecutive k. Within a
word they are interleaved: two operations on the whole word leave two neighbours in its two halves, each at
the place of a bfloat16's low bits, with no byte ever picked out. Knows only small pieces of matrices; their
homes are in weights.py.
"""

from __future__ import annotations

import torch

from moe_runtime.errors import KernelError

# Byte b of a word of int8 or float8 holds k = BYTE_ORDER[b].
BYTE_ORDER = (0, 2, 1, 3)
# Byte b of a word of int4 holds k = LOW_ORDER[b] in its low half, HIGH_ORDER[b] in its high half.
LOW_ORDER = (0, 4, 1, 5)
HIGH_ORDER = (2, 6, 3, 7)


def interleave_bytes(rows: torch.Tensor) -> torch.Tensor:
    """[R, K] of one-byte elements, K a multiple of 4; its own inverse."""
    return rows.view(len(rows), -1, 4)[..., list(BYTE_ORDER)].flatten(1)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [R, K] of 0 to 15, K a multiple of 8 -> uint8 [R, K / 2]."""
    words = codes.view(len(codes), -1, 8)
    return (words[..., list(LOW_ORDER)] | words[..., list(HIGH_ORDER)] << 4).flatten(1)


def unpack_nibbles(data: torch.Tensor) -> torch.Tensor:
    """uint8 [R, K / 2] -> uint8 [R, K]."""
    words = data.view(len(data), -1, 4)
    codes = torch.empty(*words.shape[:2], 8, dtype=torch.uint8, device=data.device)
    codes[..., list(LOW_ORDER)] = words & 15
    codes[..., list(HIGH_ORDER)] = words >> 4
    return codes.flatten(1)


def split_scales(scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [N, groups] -> float16 [N, groups] and the power of two [N] each row of it was divided by.

    KernelError for a scale that this would change: the same ones that csrc/pack_integer.cpp refuses.
    """
    exponent = torch.frexp(scales.abs().amax(1)).exponent.clamp_(-126, 127)
    unit = torch.ldexp(torch.ones(len(scales)), exponent)
    halves = (scales / unit[:, None]).half()
    changed = ((halves.float() * unit[:, None] != scales) | ~scales.isfinite()).any(1)
    if bool(changed.any()):
        row = int(changed.nonzero()[0])
        raise KernelError(
            f"pack: a scale of output row {row} is not a float16 times a power of two near the row's largest"
        )
    return halves, unit
