"""Full against masked on held-out texts: in the scenario, outside it, and against other cuts of the size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from moe_runtime.engine import Engine
from moe_runtime.errors import PlanError
from moe_runtime.experts.corpus import Corpus, Text
from moe_runtime.experts.fingerprints import Hashes, shared, union
from moe_runtime.experts.forward import Runner
from moe_runtime.experts.generations import answer_pairs, summarise
from moe_runtime.experts.intervals import MIN_DOCUMENTS, divergence_intervals
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.score import SCORES, scores_of
from moe_runtime.experts.statistics import Statistics
from moe_runtime.plan import ExpertMask, LayerMask
from moe_runtime.recovery import Recovery

RANDOM_SEEDS = (1, 2, 3)
SAME_TEXT = 0.5  # of a document's fingerprints in the planning texts: then it was planned with
ROUNDING = 1e-9  # 1 - 0.99 is more than 0.01
MAX_OVERLAP = 0.01  # of the documents of a test set


@dataclass(frozen=True)
class Limits:
    """What a plan may cost in its own scenario, on held-out texts.

    kl_mean      nats; the upper end of the mean's 95 % interval must keep to it
    kl_p99       nats
    match_loss   of answers exactly right, from 0 to 1, where right answers are known
    loop_rise    of answers that loop, from 0 to 1
    """

    kl_mean: float = 0.05
    kl_p99: float = 1.0
    match_loss: float = 0.01
    loop_rise: float = 0.01


def planning_fingerprints(statistics: Statistics, plan: PlanFile) -> Hashes:
    """Of all texts that the plan was made from: those of its statistics and those its KL was measured on."""
    tuned = np.array(plan.text.get("fingerprints", []), dtype=np.int64)
    return union([tuned, *(statistics.of(scenario).fingerprints.numpy() for scenario in plan.scenarios)])


def require_enough(corpora: Sequence[Corpus]) -> None:
    """Raises PlanError for test texts that are too few to certify anything by: the intervals of a
    certificate are over documents.
    """
    for corpus in corpora:
        count = sum(len(text.token_ids) > 1 for text in corpus.texts)
        if count < MIN_DOCUMENTS:
            raise PlanError(
                f"scenario {corpus.scenario!r}: {count} test documents are too few for a certificate, at "
                f"least {MIN_DOCUMENTS} are needed; give more texts or a larger --max-tokens, or leave "
                "--certificate out"
            )


def require_apart(
    corpora: Sequence[Corpus], known: Hashes, whose: str = "the texts that the plan was made from"
) -> None:
    """Raises PlanError when a test set has texts with these fingerprints, which are of ``whose``."""
    for corpus in corpora:
        seen = [text.id for text in corpus.texts if _was_seen(text, known)]
        if len(seen) > MAX_OVERLAP * len(corpus.texts):
            raise PlanError(
                f"texts {corpus.scenario!r}: {len(seen)} of {len(corpus.texts)} documents are among {whose}, "
                f"for example {seen[0]}; take other documents"
            )


def _was_seen(text: Text, known: Hashes) -> bool:
    # Of a question the answer does not count: a bank's answers are the same sentences again and again.
    return shared(text.rendered.prompt_ids or text.token_ids, known) > SAME_TEXT


def same_counts(scores: torch.Tensor, mask: ExpertMask, num_groups: int) -> ExpertMask:
    """As many experts as ``mask`` in every layer, and in every routing group of it: those of highest score,
    float64 [L, E], of equals the lowest ids. So they have the same bytes, and only the choice differs.
    """
    layers = []
    for row, layer in zip(scores.tolist(), mask.layers, strict=True):
        size = layer.num_experts // num_groups
        kept: list[int] = []
        for start in range(0, layer.num_experts, size):
            ids = range(start, start + size)
            best_first = sorted((-row[expert], expert) for expert in ids)
            kept += [expert for _, expert in best_first[: sum(expert in ids for expert in layer.kept)]]
        layers.append(LayerMask(layer.layer, layer.num_experts, tuple(sorted(kept))))
    return ExpertMask(tuple(layers))


def baselines(statistics: Statistics, scenarios: Sequence[str], mask: ExpertMask) -> dict[str, ExpertMask]:
    """Masks of the same bytes by every score, and three at random."""
    groups = statistics.shape.num_groups
    masks = {
        f"random {seed}": same_counts(scores_of("random", statistics, scenarios, seed), mask, groups)
        for seed in RANDOM_SEEDS
    }
    for name in SCORES:
        if name != "random":
            masks[name] = same_counts(scores_of(name, statistics, scenarios), mask, groups)
    return masks


def measure_divergence(
    runner: Runner, corpus: Corpus, masks: Mapping[str, ExpertMask], seed: int, advance: Callable[[int], None]
) -> dict[str, dict[str, Any]]:
    """By mask: divergence_intervals on the texts of one set."""
    documents = [text.token_ids for text in corpus.texts if len(text.token_ids) > 1]
    found = runner.compare(documents, list(masks.values()), advance)
    return {name: divergence_intervals(each, seed) for name, each in zip(masks, found, strict=True)}


def measure_answers(
    engine: Engine,
    corpus: Corpus,
    mask: ExpertMask,
    most: int,
    max_tokens: int,
    advance: Callable[[int], None],
    recovery: Recovery | None = None,
) -> dict[str, Any] | None:
    """Of the first ``most`` texts that end with an answer; None when there is none."""
    texts = [text for text in corpus.texts if text.rendered.prompt_ids][:most]
    return summarise(answer_pairs(engine, texts, mask, max_tokens, advance, recovery)) if texts else None


def objections(sets: Sequence[Mapping[str, Any]], limits: Limits) -> list[str]:
    """Why the plan may not serve, by its own scenario's sets; empty if it may."""
    reasons = []
    for found in sets:
        name, divergence, answers = found["name"], found["divergence"], found["answers"]
        upper, p99 = divergence["kl_mean"]["high"], divergence["kl_p99"]["value"]
        if upper > limits.kl_mean:
            reasons.append(
                f"{name}: mean KL is {divergence['kl_mean']['value']:.4f} nats, up to {upper:.4f} (95 %); "
                f"the limit is {limits.kl_mean:g} (--max-kl)"
            )
        if p99 > limits.kl_p99:
            reasons.append(f"{name}: p99 KL is {p99:.3f} nats; the limit is {limits.kl_p99:g} (--max-kl-p99)")
        reasons += _answer_objections(name, answers, limits) if answers else []
    return reasons


def _answer_objections(name: str, answers: Mapping[str, Any], limits: Limits) -> list[str]:
    reasons = []
    loops, match = answers["loop_rate"], answers.get("exact_match")
    if loops["masked"] - loops["full"] > limits.loop_rise + ROUNDING:
        reasons.append(
            f"{name}: {loops['masked']:.1%} of the answers loop, {loops['full']:.1%} of the full model's; at "
            f"most {limits.loop_rise:.1%} more may (--max-loop-rise)"
        )
    if match and match["full"] - match["masked"] > limits.match_loss + ROUNDING:
        reasons.append(
            f"{name}: {match['masked']:.1%} of the answers are right, {match['full']:.1%} of the full "
            f"model's; at most {limits.match_loss:.1%} may be lost (--max-match-loss)"
        )
    return reasons
