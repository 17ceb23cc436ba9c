# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""The choice of one token per row of logits on the device: the host never waits to see a logit.

Means what moe_runtime/sampling.py means: penalties, bias and forbidden ids, then greedy, or temperature,
min-p, top-k (equals of the k-th stay), top-p (of equals the low ids stay) and the token at FRACTION of the
mass that is left, ids ascending. The random number itself is the host's: it is a function of seed, choice
and position alone. Exponentials differ from numpy's in the last bits, so a fraction that falls within some
1e-6 of a boundary between two tokens may find the other one.

One program per row: its own values alone decide its token, and NaN in one is no concern of the others. A
vocabulary is 600 KB, so every pass over it counts. Greedy rows need one; a draw needs two more, and half of
one to find its token. Top-k and top-p search among the some thousand nearest tokens that the second pass has
set aside. Which those are, the best of each lane tell: the k-th best of them is no better than the k-th best
token. Where the tokens set aside do not decide (a flat distribution), the search walks the whole row, with
the same result.

R rows, V tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_runtime.kernels.checks import check_dims, failure
from moe_runtime.kernels.draws import Draws, Number, Status
from moe_runtime.kernels.triton.aot_case import AotCase
from moe_runtime.kernels.triton.arguments import check
from moe_runtime.kernels.triton.logprobs import write_logprobs
from moe_runtime.kernels.triton.sampling_adjust import (
    add_bias,
    copy_row,
    forbid,
    penalise_counted,
    penalise_seen,
)
from moe_runtime.kernels.triton.sampling_rows import (
    BEYOND,
    distance_to,
    draw,
    key_of_lanes,
    last_tie,
    mass_within,
    reach,
    survey,
    to_distances,
)
from moe_runtime.kernels.triton.tiles import (
    SAMPLING_LIST,
    SAMPLING_NEAR,
    SAMPLING_VOCABULARIES,
    SAMPLING_WARPS,
    sampling_block,
)

NUMBERS = tl.constexpr(len(Number))
TEMPERATURE, FARTHEST, TOP_K, TOP_P, FRACTION = map(tl.constexpr, range(5))  # as in Number
REPETITION, PRESENCE, FREQUENCY = map(tl.constexpr, range(5, 8))
FIRST, SEEN, OUTPUT, BIAS, FORBIDDEN = map(tl.constexpr, range(9, 14))
OK, NOT_FINITE, NOTHING_LEFT = (tl.constexpr(int(status)) for status in Status)


@triton.jit
def _adjust(work, size, numbers, entries, LIST: tl.constexpr):
    """The row's lists, each after the stores of the one before are seen by all threads."""
    seen, output = tl.load(numbers + SEEN).to(tl.int32), tl.load(numbers + OUTPUT).to(tl.int32)
    bias, forbidden = tl.load(numbers + BIAS).to(tl.int32), tl.load(numbers + FORBIDDEN).to(tl.int32)
    tl.debug_barrier()
    penalise_seen(work, size, tl.load(numbers + REPETITION).to(tl.float32), entries, seen, LIST)
    tl.debug_barrier()
    presence, frequency = tl.load(numbers + PRESENCE), tl.load(numbers + FREQUENCY)
    penalise_counted(work, size, presence, frequency, entries + seen, output, LIST)
    tl.debug_barrier()
    add_bias(work, size, entries + seen + 2 * output, bias, LIST)
    tl.debug_barrier()
    forbid(work, size, entries + seen + 2 * output + 2 * bias, forbidden, LIST)
    tl.debug_barrier()


@triton.jit
def _draw_token(
    source, work, ids, size, pitch, numbers, best, lanes, temperature, NEAR: tl.constexpr, BLOCK: tl.constexpr
):
    # 1. Distances; the near ones aside, if a filter will search among them.
    top_k, top_p = tl.load(numbers + TOP_K).to(tl.int32), tl.load(numbers + TOP_P)
    by_count, by_mass = top_k > 0, top_p < 1.0
    limit = tl.load(numbers + FARTHEST).to(tl.float32).to(tl.int32, bitcast=True)
    wanted = tl.where(by_count, top_k, NEAR // 4)
    near = tl.full([], -1, tl.int32)
    if (by_count | by_mass) & (size > NEAR) & (wanted <= NEAR // 2):
        near = key_of_lanes(distance_to(lanes, best, temperature).to(tl.int32, bitcast=True), wanted)
    mass, aside = to_distances(source, work, best, temperature, size, limit, near, pitch, ids, NEAR, BLOCK)
    tl.debug_barrier()  # other threads will read what this one has written

    # 2. Where to search. Aside lie all of the top_k best, all up to ``near``, perhaps enough mass.
    searched = tl.full([], 0, tl.int32) + size
    at = tl.full([], 0, tl.int32)
    if (near >= 0) & (aside <= NEAR):
        enough = by_count | (limit <= near)
        if enough == 0:
            enough = mass_within(work + pitch, aside, limit, BEYOND, BLOCK) >= top_p * mass
        if enough:
            searched = aside
            at += pitch

    # 3. The filters, and the draw.
    row = work + at
    last = tl.full([], BEYOND, tl.int32)
    if by_count:
        limit = reach(row, searched, limit, top_k.to(tl.float64), True, BLOCK)
        mass = mass_within(row, searched, limit, last, BLOCK)
    if by_mass:
        limit = reach(row, searched, limit, top_p * mass, False, BLOCK)
        last = last_tie(row, searched, limit, top_p * mass, BLOCK)
        mass = mass_within(row, searched, limit, last, BLOCK)
    place = draw(row, searched, limit, last, tl.load(numbers + FRACTION) * mass, BLOCK)
    if at > 0:
        place = tl.load(ids + place)
    return place


@triton.jit(do_not_specialize=["width"])
def _sample_kernel(
    logits, numbers, entries, found, scratch, near_ids, size, pitch, width,
    NEAR: tl.constexpr, BLOCK: tl.constexpr, LIST: tl.constexpr,
):  # fmt: skip
    # 1. The row as the model left it; with NaN or infinity it goes no further.
    row = tl.program_id(0).to(tl.int64)
    numbers += row * NUMBERS
    source, work = logits + row * size, scratch + row * (pitch + NEAR)
    best, best_id, lanes, strange = survey(source, size, False, BLOCK)
    token = tl.full([], 0, tl.int32)
    status = tl.full([], NOT_FINITE, tl.int32)
    if strange == 0:
        # 2. Adjustments, on a copy.
        status = tl.full([], OK, tl.int32)
        lists = tl.load(numbers + SEEN) + tl.load(numbers + OUTPUT)
        if lists + tl.load(numbers + BIAS) + tl.load(numbers + FORBIDDEN) > 0:
            copy_row(source, work, size, BLOCK)
            _adjust(work, size, numbers, entries + tl.load(numbers + FIRST).to(tl.int64), LIST)
            source = work
            best, best_id, lanes, strange = survey(source, size, True, BLOCK)
            if (strange > 0) | (tl.abs(best) == float("inf")):
                status = tl.full([], NOTHING_LEFT, tl.int32)

        # 3. The choice.
        if status == OK:
            token = best_id
            temperature = tl.load(numbers + TEMPERATURE).to(tl.float32)
            if temperature > 0.0:
                token = _draw_token(
                    source, work, near_ids + row * NEAR, size, pitch, numbers, best, lanes, temperature,
                    NEAR, BLOCK,
                )  # fmt: skip
    tl.store(found + row * width, token)
    tl.store(found + row * width + 1, status)


def sample_rows(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """logits float32 [R, V], left unchanged -> int32 [R, draws.width], see Draws. The token of a row whose
    Status is not OK is 0, and what else a row did not ask for or cannot have is undefined.
    """
    check_dims("sample_rows", "logits", logits, 2)
    num_rows, size = logits.shape
    device = logits.device
    if not size:
        raise failure("sample_rows", "logits", "at least one token", list(logits.shape))
    check("sample_rows", "logits", logits, (num_rows, size), device)
    check("sample_rows", "numbers", draws.numbers, (num_rows, len(Number)), device, (torch.float64,))
    check("sample_rows", "entries", draws.entries, (draws.entries.numel(),), device, (torch.int32,))
    found = torch.empty(num_rows, draws.width, dtype=torch.int32, device=device)
    if num_rows:
        pitch = triton.cdiv(size, 16) * 16
        scratch = torch.empty(num_rows, pitch + SAMPLING_NEAR, device=device)
        near_ids = torch.empty(num_rows, SAMPLING_NEAR, dtype=torch.int32, device=device)
        _sample_kernel[(num_rows,)](
            logits, draws.numbers, draws.entries, found, scratch, near_ids, size, pitch, draws.width,
            NEAR=SAMPLING_NEAR, BLOCK=sampling_block(size), LIST=SAMPLING_LIST,
            num_warps=SAMPLING_WARPS, num_stages=1,
        )  # fmt: skip
        if draws.most_logprobs >= 0:
            write_logprobs(logits, draws, found, scratch, near_ids)
    return found


# --- ahead of time ------------------------------------------------------------------------------------------

_POINTERS = {
    "logits": "*fp32", "numbers": "*fp64", "entries": "*i32", "found": "*i32", "scratch": "*fp32",
    "near_ids": "*i32",
}  # fmt: skip


def _case(vocabulary: int) -> AotCase:
    constants = {"NEAR": SAMPLING_NEAR, "BLOCK": sampling_block(vocabulary), "LIST": SAMPLING_LIST}
    signature = _POINTERS | dict.fromkeys(("size", "pitch", "width"), "i32")
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = (*_POINTERS, "pitch", *(("size",) if vocabulary % 16 == 0 else ()))
    return AotCase(
        f"vocabulary {vocabulary}", _sample_kernel, signature, constants, SAMPLING_WARPS, 1, aligned
    )


AOT_CASES = tuple(_case(vocabulary) for vocabulary in SAMPLING_VOCABULARIES)
