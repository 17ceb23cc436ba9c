# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""What both router kernels do with a row of logits: allowed experts, scores, groups, winners, weights.

NaN logits crash other engines because NaN compares false with everything, and one expert is found twice.
Here each expert gets one integer that orders by level (0 forbidden, 1 of another group, 2 in the race), then
by value, then by lowest id: the maximum of integers is always somebody, and who has won is struck off. Scores
are computed in float64 and compared in float32, as in reference.py and csrc/router.cpp, so that all choose
alike.

A tile is [ROWS, G, S]: tokens, groups of experts, experts of a group, each padded to a power of two.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from moe_runtime.kernels.checks import failure
from moe_runtime.kernels.packed import NOBODY, RouterSpec
from moe_runtime.kernels.triton.tiles import MAX_EXPERTS, power_of_two

FLOAT_MAX = tl.constexpr(3.4028234663852886e38)
EXP_MAX = tl.constexpr(709.78265380859375)  # the largest float32 whose exponential is a finite float64
NOBODY_ROW = tl.constexpr(NOBODY)


def model_rules(spec: RouterSpec, num_experts: int, has_bias: bool) -> dict[str, Any]:
    """The kernels' constants for one model."""
    spec.check(num_experts)
    if num_experts > MAX_EXPERTS:
        raise failure("route", "logits", f"at most {MAX_EXPERTS} experts", f"a row of {num_experts}")
    size = num_experts // spec.num_groups
    return {
        "NUM_EXPERTS": num_experts,
        "NUM_GROUPS": spec.num_groups,
        "GROUPS_PADDED": power_of_two(spec.num_groups),
        "SIZE_PADDED": power_of_two(size),
        "TOPK_GROUPS": spec.topk_groups,
        "TOP2": spec.group_score == "top2_sum" and size > 1,
        "TOP_K": spec.top_k,
        "SIGMOID": spec.scoring == "sigmoid",
        "BY_LOGIT": spec.chooses_by_logit(has_bias),
        "SOFTMAX_AFTER": spec.softmax_after_topk,
        "NORMALISE": spec.norm_topk_prob,
        "EPSILON": spec.norm_epsilon,
        "SCALING": spec.routed_scaling,
    }


@triton.jit
def expert_tile(
    ROWS: tl.constexpr, NUM_EXPERTS: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS_PADDED: tl.constexpr,
    SIZE_PADDED: tl.constexpr,
):  # fmt: skip
    """int32 [ROWS, G, S] expert ids, and which of them are no padding. Of full size, so that what is loaded
    by them, bias or logits, is spread over the threads in one way.
    """
    size: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    group = tl.arange(0, GROUPS_PADDED)[None, :, None]
    place = tl.arange(0, SIZE_PADDED)[None, None, :]
    index = tl.broadcast_to(group * size + place, [ROWS, GROUPS_PADDED, SIZE_PADDED])
    return index, tl.broadcast_to((group < NUM_GROUPS) & (place < size), [ROWS, GROUPS_PADDED, SIZE_PADDED])


@triton.jit
def _rank(level, value, index):
    """int64 that orders by level, then value (no NaN), then lowest index (below 2^16); never negative."""
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(value == 0.0, 0, bits)  # -0 and 0 are a tie
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 0x80000000
    return (level.to(tl.int64) << 48) | (ordered << 16) | (0xFFFF - index)


@triton.jit
def _value(rank):
    """The value that a rank was made of."""
    ordered = (((rank >> 16) & 0xFFFFFFFF) - 0x80000000).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _score(logit, top, total, SIGMOID: tl.constexpr):
    """float64 in and out: the sigmoid of a logit, or its part of the softmax."""
    if SIGMOID:
        score = tl.where(-logit > EXP_MAX, 0.0, 1.0 / (1.0 + tl.exp(tl.minimum(-logit, EXP_MAX))))
    else:
        score = tl.exp(tl.minimum(logit - top, 0.0)) / total
    return score


@triton.jit
def _chosen_groups(
    choice, allowed, index, NUM_GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr, TOP2: tl.constexpr
):
    """int32 [ROWS, G, 1]: 1 for the groups that stay in the race. Only allowed experts count."""
    ranks = tl.where(allowed, _rank(allowed, choice, index), -1)
    best = tl.max(ranks, 2)
    score = _value(best)
    if TOP2:
        second = tl.max(tl.where(ranks == best[:, :, None], -1, ranks), 2)
        score = tl.where(second >= 0, score + _value(second), score)
    group = tl.arange(0, choice.shape[1])[None, :]
    ranks = _rank(best >= 0, tl.where(best >= 0, score, 0.0), group)
    ranks = tl.where(group < NUM_GROUPS, ranks, -1)
    chosen = tl.zeros_like(ranks).to(tl.int32)
    for _ in range(TOPK_GROUPS):
        hit = ranks == tl.max(ranks, 1)[:, None]
        chosen = tl.where(hit, 1, chosen)
        ranks = tl.where(hit, -1, ranks)
    return chosen[:, :, None]


@triton.jit
def _by_row(table, row, index, inside, num_masks, other, NUM_EXPERTS: tl.constexpr):
    """[ROWS, G, S]: what row ``row`` [ROWS, 1, 1] of ``table`` [M, E] says of each expert, else ``other``."""
    inside = inside & (row >= 0) & (row < num_masks)
    return tl.load(table + row.to(tl.int64) * NUM_EXPERTS + index, mask=inside, other=other)


@triton.jit
def _weights(
    logits, top, total, counts, SIGMOID: tl.constexpr, SOFTMAX_AFTER: tl.constexpr, NORMALISE: tl.constexpr,
    EPSILON: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    """float32 [ROWS, G, S]: the weight of the experts that count, 0 elsewhere. ``logits`` are float64."""
    if SOFTMAX_AFTER:
        top = tl.max(tl.max(tl.where(counts, logits, -FLOAT_MAX), 2), 1)[:, None, None]
        scores = tl.where(counts, tl.exp(tl.minimum(logits - top, 0.0)), 0.0)
    else:
        scores = tl.where(counts, _score(logits, top, total, SIGMOID), 0.0)
    if SOFTMAX_AFTER or NORMALISE:
        divisor = tl.sum(tl.sum(scores, 2), 1)[:, None, None]
        if not SOFTMAX_AFTER:
            divisor += EPSILON
        scores = scores / tl.where(divisor > 0.0, divisor, 1.0)
    return (scores * SCALING).to(tl.float32)


@triton.jit
def _choose(
    logits, allowed, real, known, index, bias,
    NUM_GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr, TOP2: tl.constexpr, TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr, BY_LOGIT: tl.constexpr, SOFTMAX_AFTER: tl.constexpr, NORMALISE: tl.constexpr,
    EPSILON: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    """[ROWS, G, S]: each expert's slot among the winners or -1, and its weight, 0 for all but allowed
    winners; finite ``logits``, the race among the ``allowed``.
    """
    wide = logits.to(tl.float64)
    top = tl.max(tl.max(tl.where(allowed, logits, -FLOAT_MAX), 2), 1)[:, None, None].to(tl.float64)
    parts = tl.where(allowed, tl.exp(tl.minimum(wide - top, 0.0)), 0.0)
    total = tl.sum(tl.sum(parts, 2), 1)[:, None, None]
    total = tl.where(total > 0.0, total, 1.0)

    # 1. What the choice is made by, in float32.
    if BY_LOGIT:
        choice = logits
    else:
        choice = _score(wide, top, total, SIGMOID).to(tl.float32)
    if bias is not None:
        choice = choice + tl.load(bias + index, mask=real, other=0.0)
        choice = tl.where(choice > -FLOAT_MAX, tl.minimum(choice, FLOAT_MAX), -FLOAT_MAX)
    level = allowed.to(tl.int32)
    if NUM_GROUPS > 1:
        level = level * (1 + _chosen_groups(choice, allowed, index, NUM_GROUPS, TOPK_GROUPS, TOP2))
    ranks = _rank(level, tl.where(allowed, choice, 0.0), index)
    ranks = tl.where(real, ranks, -1)

    # 2. The winners, one after the other. Their places are noted where they stand: rows of places would be
    # held by every thread of a row as a whole.
    place = tl.where(real, -1, -1)
    for slot in range(TOP_K):
        hit = ranks == tl.max(tl.max(ranks, 2), 1)[:, None, None]
        place = tl.where(hit, slot, place)
        ranks = tl.where(hit, -1, ranks)
    place = tl.where(known, place, -1)

    # 3. Their weights; a forbidden expert has none.
    counts = (place >= 0) & allowed
    return place, _weights(wide, top, total, counts, SIGMOID, SOFTMAX_AFTER, NORMALISE, EPSILON, SCALING)


@triton.jit
def _add_lost(lost, tokens, obeys, allowed, weight, num_tokens):
    """RouteMeter's ``lost`` of these rows; ``weight``: what the choice without masks gives each expert."""
    weight = tl.where(obeys, weight, 0.0)
    total = tl.sum(tl.sum(weight, 2), 1)
    gone = tl.sum(tl.sum(tl.where(allowed, 0.0, weight), 2), 1)
    share = tl.where(total > 0.0, gone / tl.where(total > 0.0, total, 1.0), 0.0)
    inside = tokens < num_tokens
    before = tl.load(lost + tokens, mask=inside, other=0.0)
    tl.store(lost + tokens, before + share, mask=inside)


@triton.jit
def route_rows(
    logits, tokens, index, real, bias, masks, mask_rows, offsets, stand_ins, ids, weights, histogram, lost,
    outside, num_tokens, num_masks,
    NUM_EXPERTS: tl.constexpr, NUM_GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr, TOP2: tl.constexpr,
    TOP_K: tl.constexpr, SIGMOID: tl.constexpr, BY_LOGIT: tl.constexpr,
    SOFTMAX_AFTER: tl.constexpr, NORMALISE: tl.constexpr, EPSILON: tl.constexpr, SCALING: tl.constexpr,
):  # fmt: skip
    """logits [ROWS, G, S] of ``tokens`` [ROWS] -> ids and weights in memory; expert ``index`` is ``real``.
    ``lost`` and ``outside`` are a RouteMeter's, ``offsets`` and ``stand_ins`` a RouteRecovery's; with masks
    only.
    """
    # 1. Finite logits; the race is among the allowed.
    known = tokens[:, None, None] < num_tokens
    inside = real & known
    allowed = inside
    if masks is not None:
        row = tl.load(mask_rows + tokens, mask=tokens < num_tokens, other=-1)[:, None, None]
        may = _by_row(masks, row, index, inside, num_masks, 0, NUM_EXPERTS)
        allowed = inside & ((row == -1) | (may != 0))
    given = logits
    logits = tl.where(logits > -FLOAT_MAX, tl.minimum(logits, FLOAT_MAX), -FLOAT_MAX)

    # 2. The choice without masks, for what they take away. First, so that nothing waits for it in registers.
    if lost is not None:
        free_place, free_weight = _choose(
            logits, inside, real, known, index, bias, NUM_GROUPS, TOPK_GROUPS, TOP2, TOP_K, SIGMOID, BY_LOGIT,
            SOFTMAX_AFTER, NORMALISE, EPSILON, SCALING,
        )  # fmt: skip
        _add_lost(lost, tokens, row != NOBODY_ROW, allowed, free_weight, num_tokens)

    # 3. The choice. A row that pads the batch gets ids of -1, who stands in for an expert its own.
    names, racing = index, allowed
    if masks is not None:
        names = tl.where(row == NOBODY_ROW, -1, index)
    if stand_ins is not None:
        logits = given + _by_row(offsets, row, index, inside, num_masks, 0.0, NUM_EXPERTS)
        logits = tl.where(logits > -FLOAT_MAX, tl.minimum(logits, FLOAT_MAX), -FLOAT_MAX)
        stand_in = _by_row(stand_ins, row, index, inside, num_masks, -1, NUM_EXPERTS)
        is_constant = (allowed == 0) & (stand_in >= 0)
        names = tl.where(is_constant, NUM_EXPERTS + stand_in, names)
        racing = allowed | is_constant
    place, weight = _choose(
        logits, racing, real, known, index, bias, NUM_GROUPS, TOPK_GROUPS, TOP2, TOP_K, SIGMOID, BY_LOGIT,
        SOFTMAX_AFTER, NORMALISE, EPSILON, SCALING,
    )  # fmt: skip
    won = place >= 0
    dispatched = won & (names >= 0) & (names < NUM_EXPERTS)
    at = tokens[:, None, None].to(tl.int64) * TOP_K + place
    tl.store(ids + at, names, mask=won)
    tl.store(weights + at, weight, mask=won)
    if histogram is not None:
        tl.atomic_add(histogram + index, 1, mask=dispatched, sem="relaxed")
    if outside is not None:
        strays = dispatched & (allowed == 0)
        count = tl.sum(tl.sum(tl.sum(strays.to(tl.int32), 2), 1), 0)
        if count > 0:
            tl.atomic_add(outside, count.to(tl.int64), sem="relaxed")
