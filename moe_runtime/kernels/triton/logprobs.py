# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Log-probabilities of the chosen and of the likeliest tokens, for the rows that want them.

Of the logits as the model left them, as ``log_softmax`` and ``best_tokens`` in moe_runtime/sampling.py:
likeliest first, of equals the lower id. Two passes over the row: its best, then its mass (in float64), while
the few tokens that can be among the likeliest are set aside. Which those are, the best of each lane tell: at
least N tokens reach the N-th largest of them. If they are too many to be set aside (a row of equals), the
row itself is searched N times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.draws import Draws, Number
from moe_runtime.kernels.triton.aot_case import AotCase
from moe_runtime.kernels.triton.sampling_rows import BEYOND, mass_of, survey
from moe_runtime.kernels.triton.tiles import (
    SAMPLING_NEAR,
    SAMPLING_VOCABULARIES,
    SAMPLING_WARPS,
    sampling_block,
)

NUMBERS, LOGPROBS = tl.constexpr(len(Number)), tl.constexpr(int(Number.LOGPROBS))


@triton.jit
def _set_aside(source, size, best, threshold, candidates, ids, NEAR: tl.constexpr, BLOCK: tl.constexpr):
    """The row's mass relative to its best, and how many logits reach ``threshold``: they and their ids, in
    ascending order, as far as NEAR of them.
    """
    mass = tl.zeros([BLOCK], tl.float64)
    aside = tl.full([], 0, tl.int32)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        logit = tl.load(source + place, mask=place < size, other=float("-inf"))
        mass += mass_of(best - logit)
        close = (logit >= threshold) & (place < size)
        here = tl.sum(close.to(tl.int32))
        if here > 0:
            slot = aside + tl.cumsum(close.to(tl.int32), 0) - 1
            tl.store(candidates + slot, logit, mask=close & (slot < NEAR))
            tl.store(ids + slot, place, mask=close & (slot < NEAR))
        aside += here
    return tl.sum(mass), aside


@triton.jit
def _next_best(row, size, logit, place, BLOCK: tl.constexpr):
    """The best logit, and the first place that has it, after the one of ``logit`` at ``place``."""
    best = tl.full([], float("-inf"), tl.float32)
    first = tl.full([], BEYOND, tl.int32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(row + at, mask=at < size, other=float("-inf"))
        left = (value < logit) | ((value == logit) & (at > place))
        here = tl.max(tl.where(left, value, float("-inf")))
        if here > best:
            best = here
            first = tl.min(tl.where(left & (value == here), at, BEYOND))
    return best, first


@triton.jit
def _bits(logit, best, log_mass):
    """Of the log-probability as a float32."""
    logprob = logit.to(tl.float64) - best.to(tl.float64) - log_mass
    return logprob.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["width", "most"])
def _logprobs_kernel(
    logits, numbers, found, candidates, near_ids, size, pitch, width, most,
    NEAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(numbers + row * NUMBERS + LOGPROBS).to(tl.int32)
    found += row * width
    if (wanted >= 0) & (tl.load(found + 1) == 0):
        # 1. Which logits may be among the likeliest.
        source, candidates, ids = logits + row * size, candidates + row * pitch, near_ids + row * NEAR
        best, _, lanes, _ = survey(source, size, False, BLOCK)
        threshold = tl.where(wanted > 0, best, float("inf"))
        for _ in range(1, wanted):
            threshold = tl.max(tl.where(lanes < threshold, lanes, float("-inf")))
        mass, aside = _set_aside(source, size, best, threshold, candidates, ids, NEAR, BLOCK)
        tl.debug_barrier()  # other threads will read what this one has written

        # 2. The chosen token's.
        log_mass = tl.log(mass)
        chosen = tl.load(source + tl.load(found))
        tl.store(found + 2, _bits(chosen, best, log_mass))

        # 3. The likeliest, one after the other.
        searched, among_all = aside, aside > NEAR
        if among_all:
            searched = tl.full([], 0, tl.int32) + size
            candidates = source
        logit = tl.full([], float("inf"), tl.float32)
        place = tl.full([], -1, tl.int32)
        for number in range(tl.minimum(wanted, size)):
            logit, place = _next_best(candidates, searched, logit, place, BLOCK)
            token = place
            if among_all == 0:
                token = tl.load(ids + place)
            tl.store(found + 3 + number, token)
            tl.store(found + 3 + most + number, _bits(logit, best, log_mass))


def write_logprobs(
    logits: torch.Tensor, draws: Draws, found: torch.Tensor, scratch: torch.Tensor, near_ids: torch.Tensor
) -> None:
    """What rows want beside their tokens, which are in ``found`` already; all as in ``sample_rows``, which
    has checked them. ``scratch`` float32 [R, at least SAMPLING_NEAR], ``near_ids`` int32 [R, SAMPLING_NEAR].
    """
    num_rows, size = logits.shape
    _logprobs_kernel[(num_rows,)](
        logits, draws.numbers, found, scratch, near_ids, size, scratch.shape[1], draws.width,
        draws.most_logprobs, NEAR=SAMPLING_NEAR, BLOCK=sampling_block(size), num_warps=SAMPLING_WARPS,
        num_stages=1,
    )  # fmt: skip


# --- ahead of time ------------------------------------------------------------------------------------------

_POINTERS = {
    "logits": "*fp32", "numbers": "*fp64", "found": "*i32", "candidates": "*fp32", "near_ids": "*i32",
}  # fmt: skip


def _case(vocabulary: int) -> AotCase:
    constants = {"NEAR": SAMPLING_NEAR, "BLOCK": sampling_block(vocabulary)}
    signature = _POINTERS | dict.fromkeys(("size", "pitch", "width", "most"), "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = (*_POINTERS, "pitch", *(("size",) if vocabulary % 16 == 0 else ()))
    return AotCase(
        f"vocabulary {vocabulary}", _logprobs_kernel, signature, constants, SAMPLING_WARPS, 1, aligned
    )


AOT_CASES = tuple(_case(vocabulary) for vocabulary in SAMPLING_VOCABULARIES)
