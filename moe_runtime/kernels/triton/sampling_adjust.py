# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""What changes a row of logits before the sampler draws: penalties, bias, forbidden ids, each a list of ids.

The arithmetic is numpy's in moe_runtime/sampling.py, to the bit: float32, but float64 for the penalties that
count. One program changes a row alone; a barrier belongs between two lists, which may name the same token.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_row(source, target, size, BLOCK: tl.constexpr):
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        tl.store(target + place, tl.load(source + place, mask=place < size), mask=place < size)


@triton.jit
def _ids(entries, start, count, size, LIST: tl.constexpr):
    """Entries start.. of a list of ``count``: their places in it, the tokens, and which are some."""
    place = start + tl.arange(0, LIST)
    token = tl.load(entries + place, mask=place < count, other=-1)
    return place, token, (token >= 0) & (token < size)


@triton.jit
def penalise_seen(logits, size, penalty, entries, count, LIST: tl.constexpr):
    """``count`` ids: positive logits are divided, others multiplied."""
    for start in range(0, count, LIST):
        _, token, known = _ids(entries, start, count, size, LIST)
        logit = tl.load(logits + token, mask=known, other=0.0)
        logit = tl.where(logit > 0.0, tl.div_rn(logit, penalty), logit * penalty)
        tl.store(logits + token, logit, mask=known)


@triton.jit
def penalise_counted(logits, size, presence, frequency, entries, count, LIST: tl.constexpr):
    """``count`` ids, then how often each came."""
    for start in range(0, count, LIST):
        place, token, known = _ids(entries, start, count, size, LIST)
        times = tl.load(entries + count + place, mask=known, other=0).to(tl.float64)
        logit = tl.load(logits + token, mask=known, other=0.0).to(tl.float64)
        logit = logit - (presence + frequency * times)
        tl.store(logits + token, logit.to(tl.float32), mask=known)


@triton.jit
def add_bias(logits, size, entries, count, LIST: tl.constexpr):
    """``count`` ids, then the bits of as many float32."""
    for start in range(0, count, LIST):
        place, token, known = _ids(entries, start, count, size, LIST)
        bias = tl.load(entries + count + place, mask=known, other=0).to(tl.float32, bitcast=True)
        tl.store(logits + token, tl.load(logits + token, mask=known, other=0.0) + bias, mask=known)


@triton.jit
def forbid(logits, size, entries, count, LIST: tl.constexpr):
    for start in range(0, count, LIST):
        _, token, known = _ids(entries, start, count, size, LIST)
        tl.store(logits + token, tl.full([LIST], float("-inf"), tl.float32), mask=known)
