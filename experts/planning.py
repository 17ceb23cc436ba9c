"""Statistics + wishes -> a plan: scores, constraints and budget put together, for one scenario or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from typing import Any, Literal

from moe_runtime.errors import PlanError
from moe_runtime.experts.budget import Limits, Measure, Point, Search
from moe_runtime.experts.corpus import Corpus
from moe_runtime.experts.fingerprints import fingerprints, union
from moe_runtime.experts.forward import Runner
from moe_runtime.experts.model_bytes import ModelBytes
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.profile import TOKENS_PER_EXPERT
from moe_runtime.experts.progress import Progress
from moe_runtime.experts.prune import Protected, Ranking, Rules, rank, super_experts
from moe_runtime.experts.score import DEFAULT, scores_of, unseen_by
from moe_runtime.experts.statistics import Statistics
from moe_runtime.plan import ExpertMask

Combine = Literal["one", "mix", "union", "intersection"]
PROBE_TOKENS = 2048  # of the text: what single moves of the greedy search are chosen on
MIN_TEXT_TOKENS = 1000  # of each scenario: a 99 % quantile of fewer says little


@dataclass(frozen=True)
class Wish:
    """What a plan is to be. ``scenarios``: at least one. ``combine``: what several become: the "mix" of their
    scores, or the "union" or "intersection" of a plan for each; "one" for one. ``asked``: the budget in the
    user's words, for the record.
    """

    scenarios: tuple[str, ...]
    combine: Combine = "one"
    score: str = DEFAULT
    seed: int = 0
    multiple_of: int = 1
    protected: Protected = field(default_factory=dict)
    asked: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises PlanError."""
        if not self.scenarios or len({*self.scenarios}) != len(self.scenarios):
            raise PlanError(f"a plan needs scenarios, each once; got {', '.join(self.scenarios) or 'none'}")
        if (self.combine == "one") != (len(self.scenarios) == 1):
            raise PlanError("several scenarios need --combine mix, union or intersection, a single one none")

    @property
    def parts(self) -> list[tuple[str, ...]]:
        """The groups of scenarios that are planned each by itself."""
        if self.combine in ("union", "intersection"):
            return [(name,) for name in self.scenarios]
        return [self.scenarios]


@dataclass(frozen=True)
class KlBudget:
    """Measure how few experts do. ``target``: experts per layer that must be reached; ``step``: experts per
    move of the greedy search.
    """

    limits: Limits
    uniform: bool = False
    target: int | None = None
    step: int = 1


@dataclass(frozen=True)
class Outcome:
    """A plan; or the ``refusal`` of a KL budget that cannot be met, with the curve that shows it."""

    plan: PlanFile | None
    refusal: str
    curve: tuple[Point, ...]


def rules_of(statistics: Statistics, wish: Wish) -> Rules:
    """Raises PlanError for scenarios with too few tokens to say anything of their experts."""
    shape = statistics.shape
    needed = -(-TOKENS_PER_EXPERT * shape.num_experts // shape.top_k)
    for name in wish.scenarios:
        found = statistics.of(name).num_tokens
        if found < needed:
            raise PlanError(
                f"scenario {name!r} was profiled on {found} tokens; {needed} are needed: {TOKENS_PER_EXPERT} "
                f"for each of {shape.num_experts} experts, {shape.top_k} to a token. Profile more text"
            )
    return Rules.of(shape, wish.multiple_of)


def ranking_of(statistics: Statistics, wish: Wish, scenarios: Sequence[str]) -> Ranking:
    """The order in which the experts of ``scenarios``, one or a mix, are kept."""
    peaks = reduce(lambda mine, theirs: mine.maximum(theirs), (statistics.of(s).peak for s in scenarios))
    return rank(
        scores_of(wish.score, statistics, scenarios, wish.seed),
        unseen_by(wish.score, statistics, scenarios),
        statistics.shape,
        rules_of(statistics, wish),
        wish.protected,
        super_experts(peaks),
    )


def plan_by_count(statistics: Statistics, wish: Wish, count: int, size: ModelBytes) -> PlanFile:
    """Every layer keeps ``count`` experts; from statistics alone."""
    rankings = [ranking_of(statistics, wish, part) for part in wish.parts]
    masks = [ranking.mask(count) for ranking in rankings]
    return _plan(statistics, wish, rankings, masks, size, (), {})


def plan_by_kl(
    statistics: Statistics,
    wish: Wish,
    budget: KlBudget,
    size: ModelBytes,
    runner: Runner,
    corpora: Mapping[str, Corpus],
) -> Outcome:
    """``corpora``: held-out text of each scenario, which decides how few experts are enough for it."""
    _check_texts(statistics, wish, corpora)
    rankings: list[Ranking] = []
    masks: list[ExpertMask] = []
    curve: list[Point] = []
    for part in wish.parts:
        ranking = ranking_of(statistics, wish, part)
        measure, probe = _measures(runner, [corpora[name] for name in part])
        search = Search(ranking, size, budget.limits, measure, probe)
        with Progress(
            f"search {' + '.join(part)}", search.length(1 if budget.uniform else budget.step), "cuts"
        ) as progress:
            if budget.uniform:
                found = search.uniform(budget.target, progress.advance)
            else:
                found = search.greedy(budget.step, budget.target, progress.advance)
        curve += found.curve
        if found.refusal:
            return Outcome(None, f"{' + '.join(part)}: {found.refusal}", tuple(curve))
        rankings.append(ranking)
        masks.append(ranking.mask(found.counts))
    text = {
        "corpora": {name: corpora[name].digest for name in wish.scenarios},
        "fingerprints": union(
            fingerprints(each.token_ids) for name in wish.scenarios for each in corpora[name].texts
        ).tolist(),
    }
    points = [asdict(point) for point in curve]
    return Outcome(_plan(statistics, wish, rankings, masks, size, points, text), "", tuple(curve))


def _plan(
    statistics: Statistics,
    wish: Wish,
    rankings: Sequence[Ranking],
    masks: Sequence[ExpertMask],
    size: ModelBytes,
    curve: Sequence[Mapping[str, Any]],
    text: Mapping[str, Any],
) -> PlanFile:
    mask = reduce(ExpertMask.intersection if wish.combine == "intersection" else ExpertMask.union, masks)
    _check_mask(mask, rankings[0].rules, wish)
    whole = rankings[0] if len(rankings) == 1 else ranking_of(statistics, wish, wish.scenarios)
    log = list(whole.log)
    if len(masks) > 1:
        kept = ", ".join(f"{name} {each.num_kept}" for name, each in zip(wish.scenarios, masks, strict=True))
        log.append(f"the {wish.combine} of a plan for each scenario, of so many experts: {kept}")
    if not mask.is_uniform:
        log.append("layers keep different numbers of experts: stock engines cannot load an export of it")
    return PlanFile(
        scenario=wish.scenarios[0] if wish.combine == "one" else wish.scenarios,
        mask=mask,
        model=statistics.model,
        statistics=statistics.digest,
        score=wish.score,
        seed=wish.seed,
        budget=wish.asked,
        combine=wish.combine,
        constraints=tuple(log),
        unseen=whole.unseen,
        protected=whole.protected,
        order=whole.order,
        curve=tuple(curve),
        num_bytes={"full": size.full, "kept": size.kept(mask)},
        text=text,
    )


def _check_mask(mask: ExpertMask, rules: Rules, wish: Wish) -> None:
    """What sets made of several plans may break, and a plan that would do nothing."""
    total = sum(mask.num_experts.values())
    if mask.num_kept == total:
        raise PlanError(f"the plan would keep all {total} experts; ask for fewer")
    for layer in mask.layers:
        if len(layer.kept) < rules.fewest:
            raise PlanError(
                f"the {wish.combine} of {', '.join(wish.scenarios)} keeps {len(layer.kept)} experts in layer "
                f"{layer.layer}; routing needs at least {rules.fewest}"
            )


def _check_texts(statistics: Statistics, wish: Wish, corpora: Mapping[str, Corpus]) -> None:
    for name in wish.scenarios:
        if name not in corpora:
            known = ", ".join(sorted(corpora)) or "none"
            raise PlanError(f"no text of scenario {name!r} to measure on; there are texts of: {known}")
        corpora[name].require(
            MIN_TEXT_TOKENS,
            "a 99 % quantile of fewer says little; give more --text, or a larger --max-tokens",
        )
        if corpora[name].digest in statistics.of(name).corpora:
            raise PlanError(
                f"scenario {name!r}: this very text was profiled; a KL budget needs text that was held out"
            )


def _measures(runner: Runner, corpora: Sequence[Corpus]) -> tuple[Measure, Measure]:
    """On all texts, and on their first PROBE_TOKENS; the same function when that is all."""

    def measure_on(documents: Sequence[Sequence[int]]) -> Measure:
        return lambda masks: [found.summary() for found in runner.compare(documents, masks)]

    whole = [text.token_ids for corpus in corpora for text in corpus.texts]
    share = PROBE_TOKENS // len(corpora)
    part = [text.token_ids for corpus in corpora for text in corpus.take(share).texts]
    measure = measure_on(whole)
    return measure, measure if len(part) == len(whole) else measure_on(part)
