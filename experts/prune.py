"""Scores + constraints -> the order in which experts go; order + budget -> an ExpertMask. Pure functions.

One order per layer serves every budget: keeping K experts keeps its first K, so a smaller plan is a subset of
a larger one, and the same scores give the same plans. Shared experts have no router, so no order holds them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch

from moe_runtime.errors import PlanError
from moe_runtime.experts.statistics import Shape
from moe_runtime.plan import ExpertMask, LayerMask

# An outlier's largest output is this many times the median expert's, and above a tenth of the largest of all.
SUPER_OVER_MEDIAN = 10.0
SUPER_OF_LARGEST = 0.1
SUPER_QUANTILE = 0.995

Protected = Mapping[int, Collection[int]]  # expert ids by decoder layer


@dataclass(frozen=True)
class Rules:
    """What every plan for a model obeys, whatever the scores say.

    num_groups, topk_groups  a router that first chooses groups: every group keeps as many experts, else the
                             exported model would count other experts to a group than this one does
    multiple_of              of every layer's kept experts, as some engines want them
    """

    num_experts: int
    top_k: int
    num_groups: int = 1
    topk_groups: int = 1
    multiple_of: int = 1

    def __post_init__(self) -> None:
        """Raises PlanError."""
        if not 1 <= self.multiple_of <= self.num_experts:
            raise PlanError(
                f"--multiple-of {self.multiple_of}: must be from 1 to the {self.num_experts} of a layer"
            )

    @classmethod
    def of(cls, shape: Shape, multiple_of: int = 1) -> Rules:
        """For the model of these statistics. Raises PlanError."""
        return cls(shape.num_experts, shape.top_k, shape.num_groups, shape.topk_groups, multiple_of)

    @property
    def step(self) -> int:
        """Kept experts of a layer come in multiples of this (or are all of them)."""
        return math.lcm(self.multiple_of, self.num_groups)

    @property
    def fewest(self) -> int:
        """The smallest count that leaves every token its top_k experts, in the groups it may choose."""
        needed = self.num_groups * -(-self.top_k // self.topk_groups) if self.num_groups > 1 else self.top_k
        return min(self.num_experts, -(-needed // self.step) * self.step)

    @property
    def counts(self) -> tuple[int, ...]:
        """Every count that a layer may keep, ascending; the last one is all experts."""
        steps = range(self.fewest, self.num_experts, self.step)
        return (*steps, self.num_experts)

    def at_least(self, count: int, asked: str) -> int:
        """The smallest allowed count of ``count`` experts or more; ``asked`` is for the message. Raises
        PlanError below the fewest and above what there is.
        """
        if count < self.fewest:
            raise PlanError(f"{asked}: keeps {count} of {self.num_experts} experts, {self._why_fewest()}")
        if count > self.num_experts:
            raise PlanError(f"{asked}: a layer has {self.num_experts} experts")
        return next(allowed for allowed in self.counts if allowed >= count)

    def _why_fewest(self) -> str:
        why = f"each token takes {self.top_k}"
        if self.num_groups > 1:
            why += f" from {self.topk_groups} of {self.num_groups} groups that keep equally many"
        if self.multiple_of > 1:
            why += f", in multiples of {self.multiple_of}"
        return f"and {why}: at least {self.fewest}"


@dataclass(frozen=True)
class Ranking:
    """For every decoder layer with a router: its experts, best first. ``unseen`` and ``protected`` by layer;
    ``log`` says in words what the constraints did.
    """

    rules: Rules
    order: Mapping[int, tuple[int, ...]]
    unseen: Mapping[int, tuple[int, ...]]
    protected: Mapping[int, tuple[int, ...]]
    log: tuple[str, ...] = field(default=())

    def mask(self, counts: Mapping[int, int] | int) -> ExpertMask:
        """Keep so many experts, in every layer or by layer. Raises PlanError when that breaks a rule."""
        by_layer = dict.fromkeys(self.order, counts) if isinstance(counts, int) else counts
        layers = []
        for layer, order in self.order.items():
            count = by_layer[layer]
            if count not in self.rules.counts:
                raise PlanError(f"layer {layer} cannot keep {count} experts, only {self.rules.counts}")
            kept = order[:count]
            lost = sorted({*self.protected[layer]} - {*kept})
            if lost:
                raise PlanError(
                    f"layer {layer}: keeping {count} experts would cut {_ids(lost)}, which are protected "
                    f"(there are {len(self.protected[layer])}); keep more, or protect fewer"
                )
            layers.append(LayerMask(layer, len(order), tuple(sorted(kept))))
        return ExpertMask(tuple(layers))

    def lowest(self, layer: int) -> int:
        """The fewest experts that ``mask`` lets this layer keep."""
        order, wanted = self.order[layer], {*self.protected[layer]}
        return next(count for count in self.rules.counts if wanted <= {*order[:count]})


def rank(
    scores: torch.Tensor,
    unseen: torch.Tensor,
    shape: Shape,
    rules: Rules,
    protected: Protected,
    super_experts: torch.Tensor | None = None,
) -> Ranking:
    """scores float64 [L, E], unseen and super_experts bool [L, E], of the layers of ``shape``.

    Protected experts and super-experts come first, then the others by score, equal scores by ascending id,
    and last those that no token chose: nothing is known of them, so they are listed and not ranked. Of a
    router with groups the best of every group come first, then the second best, and so on. Raises PlanError
    for scores that are not finite, and protected experts that do not exist.
    """
    if not bool(torch.isfinite(scores).all()):
        raise PlanError("scores must be finite; profile again")
    _check_protected(protected, shape)
    order, hidden, kept = {}, {}, {}
    for row, layer in enumerate(shape.layers):
        safe = {*protected.get(layer, ())}
        if super_experts is not None:
            safe |= {*_true(super_experts[row])}
        hidden[layer] = _true(unseen[row])
        kept[layer] = tuple(sorted(safe))
        order[layer] = _order(scores[row].tolist(), {*hidden[layer]}, safe, rules.num_groups)
    return Ranking(rules, order, hidden, kept, tuple(_log(rules, hidden, protected, super_experts, shape)))


def super_experts(peak: torch.Tensor) -> torch.Tensor:
    """bool [L, E]: experts whose outputs are outliers, which a model hardly survives losing.

    peak float64 [L, E] is the largest |number| of any output. The 99.5 % quantile and the tenth of the
    largest are the rule of "Super Experts" (arXiv 2507.23279) and of REAP's ``preserve_super_experts``; ten
    times the median is ours, so that a model without outliers has no super-experts.
    """
    seen = peak[peak > 0]
    if not len(seen):
        return torch.zeros_like(peak, dtype=torch.bool)
    ascending = seen.sort().values
    median, rank_ = ascending[len(ascending) // 2], math.ceil(SUPER_QUANTILE * len(ascending)) - 1
    limits = (ascending[rank_], ascending[-1] * SUPER_OF_LARGEST, median * SUPER_OVER_MEDIAN)
    return (peak >= limits[0]) & (peak > limits[1]) & (peak > limits[2])


def count_of_ratio(text: str, rules: Rules) -> int:
    """``0.6`` of the experts, rounded up to an allowed count. Raises PlanError."""
    asked = f"--keep-ratio {text}"
    try:
        ratio = Fraction(text)  # exact: 0.6 of 20 is 12, not 13
    except (ValueError, ZeroDivisionError):
        raise PlanError(f"{asked}: write a number such as 0.5 or 1/3") from None
    if not 0 < ratio < 1:
        raise PlanError(f"{asked}: must be above 0 and below 1")
    return rules.at_least(math.ceil(ratio * rules.num_experts), asked)


def count_of_bytes(limit: int, full: int, expert_bytes: Mapping[int, int], rules: Rules) -> int:
    """The largest allowed count of every layer with which a model of ``full`` bytes has ``limit`` or fewer;
    ``expert_bytes``: of one expert, by layer. Raises PlanError when there is none.
    """
    per_expert = sum(expert_bytes.values())
    for count in reversed(rules.counts):
        if full - (rules.num_experts - count) * per_expert <= limit:
            return count
    smallest = full - (rules.num_experts - rules.fewest) * per_expert
    raise PlanError(
        f"--bytes {limit}: with the fewest experts that routing allows ({rules.fewest} of "
        f"{rules.num_experts}) the model still has {smallest} bytes"
    )


def _order(
    scores: Sequence[float], unseen: Collection[int], safe: Collection[int], num_groups: int
) -> tuple[int, ...]:
    def place(expert: int) -> tuple[bool, bool, float, int]:
        return (expert not in safe, expert in unseen, -scores[expert], expert)

    size = len(scores) // num_groups
    groups = [sorted(range(start, start + size), key=place) for start in range(0, len(scores), size)]
    return tuple(expert for rank_ in zip(*groups, strict=True) for expert in sorted(rank_, key=place))


def _check_protected(protected: Protected, shape: Shape) -> None:
    for layer, experts in protected.items():
        if layer not in shape.layers:
            raise PlanError(f"--protect: layer {layer} has no router; those that have: {_ids(shape.layers)}")
        wrong = sorted(expert for expert in experts if not 0 <= expert < shape.num_experts)
        if wrong:
            raise PlanError(
                f"--protect: layer {layer} has no expert {wrong[0]}, there are {shape.num_experts}"
            )


def _log(
    rules: Rules,
    unseen: Mapping[int, tuple[int, ...]],
    protected: Protected,
    outliers: torch.Tensor | None,
    shape: Shape,
) -> list[str]:
    lines = [f"every token has its {rules.top_k} experts: a layer keeps at least {rules.fewest}"]
    if rules.num_groups > 1:
        lines.append(f"each of the {rules.num_groups} routing groups keeps equally many experts")
    if rules.multiple_of > 1:
        lines.append(f"a layer keeps a multiple of {rules.multiple_of} experts")
    for layer, experts in unseen.items():
        if experts:
            lines.append(f"layer {layer}: no token chose {_ids(experts)}; not ranked, the first to be cut")
    for layer, kept in sorted(protected.items()):
        if kept:
            lines.append(f"layer {layer}: protected {_ids(sorted(kept))}")
    if outliers is not None:
        for row, layer in enumerate(shape.layers):
            if experts := _true(outliers[row]):
                lines.append(f"layer {layer}: super-experts {_ids(experts)} are kept")
    return lines


def _true(row: torch.Tensor) -> tuple[int, ...]:
    return tuple(torch.nonzero(row)[:, 0].tolist())


def _ids(experts: Sequence[int]) -> str:
    return ", ".join(str(expert) for expert in experts)
