# mypy: disable-error-code="no-untyped-def,no-untyped-call"
"""Passes of the sampler over one row in memory: its best token, its mass, a threshold, a draw.

Distances take the place of logits: d = (best - logit) / temperature is never negative, so the bits of a
float32, read as an integer, order like the number. A threshold is such an integer, its key, and is found by
halving the range of integers: every pass also finds the keys that occur next to its guess on both sides, so
that the search ends where the keys end, after some 20 passes instead of 31. Nothing is sorted; masses are
added in float64, always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEVER = tl.constexpr(0x7F800000)  # the key of an infinite distance: no mass
BEYOND = tl.constexpr(0x7FFFFFFF)


@triton.jit
def survey(source, size, INFINITE: tl.constexpr, BLOCK: tl.constexpr):
    """The best logit and its lowest id, the best of each lane, and how many logits are NaN or, unless
    ``INFINITE`` ones may be there, infinite.
    """
    lanes = tl.full([BLOCK], float("-inf"), tl.float32)
    at = tl.zeros([BLOCK], tl.int32)
    strange = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        logit = tl.load(source + place, mask=place < size, other=float("-inf"))
        at = tl.where(logit > lanes, place, at)
        lanes = tl.where(logit > lanes, logit, lanes)
        if INFINITE:
            usual = logit == logit
        else:
            usual = (tl.abs(logit) < float("inf")) | (place >= size)
        strange += tl.where(usual, 0, 1)
    best = tl.max(lanes)
    return best, tl.min(tl.where(lanes == best, at, BEYOND)), lanes, tl.sum(strange)


@triton.jit
def distance_to(logit, best, temperature):
    return tl.abs(tl.div_rn(best - logit, temperature))  # abs: 0.0 and -0.0 are one distance


@triton.jit
def mass_of(distance):
    """The mass of a token relative to the best one's."""
    return tl.exp(-distance).to(tl.float64)


@triton.jit
def key_of_lanes(keys, wanted):
    """A key that at least ``wanted`` of ``keys`` [BLOCK] reach, and few more unless they are equal."""
    low = tl.full([], 0, tl.int32)
    high = tl.full([], NEVER, tl.int32)
    while low < high:
        middle = low + (high - low) // 2
        if tl.sum((keys <= middle).to(tl.int32)) >= wanted:
            high = middle
        else:
            low = middle + 1
    return high


@triton.jit
def to_distances(
    source, target, best, temperature, size, limit, near, pitch, ids, NEAR: tl.constexpr, BLOCK: tl.constexpr
):
    """Logits -> distances in ``target``, which may be ``source``. Those whose keys are within ``near`` (-1:
    none) come again from ``pitch`` on, their places in ``ids``, as far as NEAR of them.

    Returns the mass of all within ``limit`` and how many are within ``near``.
    """
    mass = tl.zeros([BLOCK], tl.float64)
    aside = tl.full([], 0, tl.int32)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        logit = tl.load(source + place, mask=place < size, other=float("-inf"))
        distance = distance_to(logit, best, temperature)
        tl.store(target + place, distance, mask=place < size)
        key = distance.to(tl.int32, bitcast=True)
        mass += tl.where(key <= limit, mass_of(distance), 0.0)
        if near >= 0:
            close = (key <= near) & (place < size)
            here = tl.sum(close.to(tl.int32))
            if here > 0:
                slot = aside + tl.cumsum(close.to(tl.int32), 0) - 1
                tl.store(target + pitch + slot, distance, mask=close & (slot < NEAR))
                tl.store(ids + slot, place, mask=close & (slot < NEAR))
            aside += here
    return tl.sum(mass), aside


@triton.jit
def _read(base, start, size, BLOCK: tl.constexpr):
    """Places start.. of a row, their distances and keys; those past its end have the key BEYOND."""
    place = start + tl.arange(0, BLOCK)
    distance = tl.load(base + place, mask=place < size, other=float("inf"))
    return place, distance, tl.where(place < size, distance.to(tl.int32, bitcast=True), BEYOND)


@triton.jit
def _kept(place, key, limit, last):
    """Keys below ``limit``, and those equal to it up to the place ``last``."""
    return (key < limit) | ((key == limit) & (place <= last))


@triton.jit
def mass_within(base, size, limit, last, BLOCK: tl.constexpr):
    """The mass of what is kept."""
    mass = tl.zeros([BLOCK], tl.float64)
    for start in range(0, size, BLOCK):
        place, distance, key = _read(base, start, size, BLOCK)
        mass += tl.where(_kept(place, key, limit, last), mass_of(distance), 0.0)
    return tl.sum(mass)


@triton.jit
def reach(base, size, limit, wanted, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The smallest key such that the keys up to it have at least the mass, or number, ``wanted``; ``limit``
    if all up to ``limit`` have less.
    """
    low = tl.full([], 0, tl.int32)
    high = tl.full([], 0, tl.int32) + limit
    while low < high:
        middle = low + (high - low) // 2
        total = tl.zeros([BLOCK], tl.float64)
        below = tl.zeros([BLOCK], tl.int32)
        above = tl.full([BLOCK], BEYOND, tl.int32)
        for start in range(0, size, BLOCK):
            _, distance, key = _read(base, start, size, BLOCK)
            inside = key <= middle
            if BY_COUNT:
                total += inside.to(tl.float64)
            else:
                total += tl.where(inside, mass_of(distance), 0.0)
            below = tl.where(inside & (key > below), key, below)
            above = tl.where(inside | (key > above), above, key)
        if tl.sum(total) >= wanted:
            high = tl.max(below)
        else:
            low = tl.minimum(tl.min(above), high)
    return low


@triton.jit
def last_tie(base, size, limit, wanted, BLOCK: tl.constexpr):
    """The place of the last token at ``limit`` that the mass ``wanted`` needs, lowest places first."""
    below = mass_within(base, size, limit, -1, BLOCK)
    one = mass_of(limit.to(tl.float32, bitcast=True))
    needed = tl.full([], 1, tl.int32)
    if one > 0.0:
        needed = tl.ceil(tl.minimum(tl.maximum((wanted - below) / one, 1.0), 2147483647.0)).to(tl.int32)
    found = tl.full([], 0, tl.int32)
    last = tl.full([], 0, tl.int32)
    start = tl.full([], 0, tl.int32)
    while (start < size) & (found < needed):
        place, _, key = _read(base, start, size, BLOCK)
        tie = key == limit
        rank = found + tl.cumsum(tie.to(tl.int32), 0)
        last = tl.maximum(last, tl.max(tl.where(tie & (rank <= needed), place, 0)))
        found += tl.sum(tie.to(tl.int32))
        start += BLOCK
    return last


@triton.jit
def draw(base, size, limit, last, target, BLOCK: tl.constexpr):
    """The first place at which the running mass of what is kept exceeds ``target``. Rounding may carry that
    beyond all mass: then the last place with any.
    """
    mass = tl.full([], 0.0, tl.float64)
    chosen = tl.full([], -1, tl.int32)
    latest = tl.full([], 0, tl.int32)
    start = tl.full([], 0, tl.int32)
    while (start < size) & (chosen < 0):
        place, distance, key = _read(base, start, size, BLOCK)
        weight = tl.where(_kept(place, key, limit, last), mass_of(distance), 0.0)
        latest = tl.maximum(latest, tl.max(tl.where(weight > 0.0, place, 0)))
        here = tl.sum(weight)
        if mass + here > target:
            running = mass + tl.cumsum(weight, 0)
            first = tl.min(tl.where((running > target) & (weight > 0.0), place, BEYOND))
            chosen = tl.where(first == BEYOND, latest, first)
        mass += here
        start += BLOCK
    return tl.where(chosen < 0, latest, chosen)
