"""A KL budget -> how many experts each layer keeps.

The order inside each layer is given (prune.py); what is searched is how far along each layer to cut. All
searches walk a path of ever smaller plans that does not depend on the budget; the budget says how far. So
plans of different budgets are nested, and the same model, texts and scores give the same plan.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from moe_runtime.errors import PlanError
from moe_runtime.experts.divergence import Divergence
from moe_runtime.experts.model_bytes import ModelBytes
from moe_runtime.experts.prune import Ranking
from moe_runtime.plan import ExpertMask

Measure = Callable[[Sequence[ExpertMask]], Sequence[Divergence]]
Advance = Callable[[int], None]
Counts = Mapping[int, int]  # experts kept, by decoder layer

DEFAULT_KL_MEAN = 0.05  # nats; public cuts of 25 to 50 % have 0.36 to 0.51
DEFAULT_KL_P99 = 1.0
WORTH_MAKING = 0.1  # of all experts: a plan that cuts less is not worth its certificate
ROUNDS = 8  # in which the whole text is asked how far the greedy search may go
TOGETHER = 4  # uniform plans measured in one pass over the text


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest mean and the largest 99 % quantile of KL(full || masked), in nats."""

    kl_mean: float = DEFAULT_KL_MEAN
    kl_p99: float = DEFAULT_KL_P99

    def __post_init__(self) -> None:
        """Raises PlanError."""
        for flag, value in (("--max-kl", self.kl_mean), ("--max-kl-p99", self.kl_p99)):
            if not value > 0:
                raise PlanError(f"{flag} {value}: must be above 0")

    def allow(self, found: Divergence) -> bool:
        return found.kl_mean <= self.kl_mean and found.kl_p99 <= self.kl_p99


@dataclass(frozen=True, slots=True)
class Point:
    """One plan that was measured on the whole text: experts and bytes kept, KL in nats."""

    kept: int
    bytes: int
    kl_mean: float
    kl_p99: float
    top1: float
    within: bool


@dataclass(frozen=True)
class Found:
    """``counts`` of the smallest plan on the path that keeps to the limits, with every plan that was measured
    on the way, largest first; ``refusal`` says why there is no plan, empty if there is one.
    """

    counts: Counts
    curve: tuple[Point, ...]
    refusal: str = ""


class Search:
    """One scenario's search: ``measure`` asks the whole held-out text what masks do to it, ``probe`` a part
    of it (or all; then they are the same function).
    """

    def __init__(
        self, ranking: Ranking, size: ModelBytes, limits: Limits, measure: Measure, probe: Measure
    ) -> None:
        self._ranking = ranking
        self._size = size
        self._limits = limits
        self._measure = measure
        self._probe = probe
        self._curve: list[Point] = []
        self._all: Counts = {layer: len(order) for layer, order in ranking.order.items()}

    def uniform(self, target: int | None = None, advance: Advance = lambda moves: None) -> Found:
        """Every layer keeps as many. ``target``: no fewer than these are wanted, and no more are accepted.
        ``advance`` is told of cuts tried, as ``length`` counts them.
        """
        lowest = max(self._ranking.lowest(layer) for layer in self._all)
        counts = [count for count in reversed(self._ranking.rules.counts[:-1]) if count >= (target or lowest)]
        best = self._all
        for start in range(0, len(counts), TOGETHER):
            tried = [dict.fromkeys(self._all, count) for count in counts[start : start + TOGETHER]]
            verdicts = self._measured(tried)
            advance(len(tried) * len(self._all))
            for state, within in zip(tried, verdicts, strict=True):
                if not within:
                    return self._found(best, target)
                best = state
        return self._found(best, target)

    def greedy(
        self, step: int = 1, target: int | None = None, advance: Advance = lambda moves: None
    ) -> Found:
        """Each move cuts the next ``step`` experts (or what the rules make of it) where the KL grows least
        per byte. ``target``: as in ``uniform``, for the layers' mean.

        The moves are chosen on the probe; after each of ROUNDS equal parts of the path the whole text decides
        whether to go on. Inside the part where it refuses, the last allowed plan is found by bisection.
        """
        path = self.path(step, None if target is None else target * len(self._all))
        length = max(1, self.length(step) // ROUNDS)
        best = self._all
        while part := list(islice(path, length)):
            advance(len(part))
            if self._measured([part[-1]])[0]:
                best = part[-1]
                continue
            allowed, refused = -1, len(part) - 1
            while refused - allowed > 1:
                middle = (allowed + refused) // 2
                if self._measured([part[middle]])[0]:
                    allowed = middle
                else:
                    refused = middle
            return self._found(best if allowed < 0 else part[allowed], target)
        return self._found(best, target)

    def path(self, step: int = 1, fewest: int | None = None) -> Iterator[Counts]:
        """The counts after each move, until nothing may go any more, or ``fewest`` experts are kept.

        Lazy greedy: what a move costs is measured again only when it is the cheapest known and another move
        was made since. Costs grow along a path, roughly: the old value is then a lower bound.
        """
        counts, base, moves = dict(self._all), 0.0, 0
        first = [layer for layer in counts if self._next(layer, counts[layer], step) is not None]
        found = self._probe([self._mask(self._moved(counts, layer, step)) for layer in first])
        heap = []  # (cost, layer, KL after the move, moves made when that was measured)
        for layer, after in zip(first, found, strict=True):
            moved = self._moved(counts, layer, step)
            heap.append((self._cost(after.kl_mean - base, counts, moved), layer, after.kl_mean, 0))
        heapq.heapify(heap)
        while heap and (fewest is None or sum(counts.values()) > fewest):
            cost, layer, after_kl, measured_at = heapq.heappop(heap)
            moved = self._moved(counts, layer, step)
            if measured_at != moves:
                after_kl = self._probe([self._mask(moved)])[0].kl_mean
                cost = self._cost(after_kl - base, counts, moved)
                heapq.heappush(heap, (cost, layer, after_kl, moves))
                continue
            counts, base, moves = moved, after_kl, moves + 1
            yield counts
            if self._next(layer, counts[layer], step) is not None:
                heapq.heappush(heap, (cost, layer, after_kl, moves - 1))

    def _next(self, layer: int, count: int, step: int) -> int | None:
        """What the layer keeps after its next move: at least ``step`` fewer, as far as it may go."""
        lowest = self._ranking.lowest(layer)
        allowed = [each for each in self._ranking.rules.counts if lowest <= each < count]
        return max((each for each in allowed if each <= count - step), default=min(allowed, default=None))

    def _moved(self, counts: Counts, layer: int, step: int) -> dict[int, int]:
        after = self._next(layer, counts[layer], step)
        assert after is not None, "only layers with a next move are in the heap"
        return {**counts, layer: after}

    def length(self, step: int) -> int:
        """Moves of the whole path."""
        moves = 0
        for layer, count in self._all.items():
            left: int | None = count
            while left is not None and (left := self._next(layer, left, step)) is not None:
                moves += 1
        return moves

    def _cost(self, kl: float, counts: Counts, moved: Counts) -> float:
        cut = sum(
            (counts[layer] - moved[layer]) * num_bytes for layer, num_bytes in self._size.experts.items()
        )
        return kl / cut

    def _mask(self, counts: Counts) -> ExpertMask:
        return self._ranking.mask(counts)

    def _measured(self, states: Sequence[Counts]) -> list[bool]:
        """Whether each keeps to the limits, by the whole text; the curve has them all."""
        masks = [self._mask(counts) for counts in states]
        verdicts = []
        for mask, found in zip(masks, self._measure(masks), strict=True):
            verdicts.append(self._limits.allow(found))
            self._curve.append(
                Point(
                    mask.num_kept,
                    self._size.kept(mask),
                    found.kl_mean,
                    found.kl_p99,
                    found.top1,
                    verdicts[-1],
                )
            )
        return verdicts

    def _found(self, counts: Counts, target: int | None) -> Found:
        curve = tuple(sorted({*self._curve}, key=lambda point: (-point.kept, point.kl_mean)))
        return Found(counts, curve, self._refusal(counts, target, curve))

    def _refusal(self, counts: Counts, target: int | None, curve: Sequence[Point]) -> str:
        total, kept = sum(self._all.values()), sum(counts.values())
        wanted = int(total * (1 - WORTH_MAKING)) if target is None else target * len(counts)
        if kept <= wanted:
            return ""
        broken = [point for point in curve if not point.within]
        if not broken:
            raise PlanError(
                f"routing and protected experts allow no plan with {wanted} of {total} experts; "
                f"the smallest has {kept}"
            )
        least = broken[0]
        return (
            f"the budget of {self._limits.kl_mean:g} nats on average and {self._limits.kl_p99:g} at the 99 % "
            f"quantile cannot be met with {wanted} of {total} experts or fewer: with {least.kept} the KL is "
            f"{least.kl_mean:.4g} and {least.kl_p99:.4g}, and {kept} is the fewest that keeps to it. Every "
            "expert is kept; raise --max-kl or --max-kl-p99, or leave this model as it is"
        )
