"""How unevenly a scenario needs its experts, as a report shows it: cumulated shares of a score, and Gini."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from moe_runtime.experts.score import DEFAULT, scores_of
from moe_runtime.experts.statistics import Statistics
from moe_runtime.plan import ExpertMask

DIGITS = 6  # of shares: what a picture shows, and half the file


def score_to_show(scores: Sequence[str]) -> str:
    """The score that all plans used; the default one if there is none such, or it is random."""
    same = len({*scores}) == 1 and scores[0] != "random"
    return scores[0] if same else DEFAULT


def importance(statistics: Statistics, score: str) -> dict[str, dict[str, Any]]:
    """By scenario: what was profiled, and of each layer the share of the score that the best 1, 2, ... of its
    experts hold together, and the Gini coefficient, 0 when all count alike and 1 - 1/E when only one does.
    """
    found = {}
    for name, sums in sorted(statistics.scenarios.items()):
        shares = _shares(scores_of(score, statistics, [name]))
        ordered = shares.sort(-1, descending=True).values
        found[name] = {
            "tokens": sums.num_tokens,
            "documents": sums.num_documents,
            "unseen": sums.unseen.sum(-1).tolist(),
            "cumulated": [[round(value, DIGITS) for value in row] for row in ordered.cumsum(-1).tolist()],
            "gini": [round(value, DIGITS) for value in gini(ordered).tolist()],
        }
    return found


def gini(descending: torch.Tensor) -> torch.Tensor:
    """float64 [L] of shares [L, E] that fall along E and sum to 1: 1 - (2 sum of cumulated shares, from the
    smallest on, - 1) / E, the trapezoid rule on the Lorenz curve (Gastwirth 1972). 0 for a row of zeros.
    """
    num_experts = descending.shape[-1]
    lorenz = descending.flip(-1).cumsum(-1).sum(-1)
    whole = descending.sum(-1)
    return torch.where(whole > 0, 1.0 - (2.0 * lorenz - whole) / num_experts, 0.0)


def share_kept(
    statistics: Statistics, score: str, scenarios: Sequence[str], mask: ExpertMask
) -> dict[str, list[float]]:
    """By scenario of a plan, the share of each layer's score that the kept experts hold."""
    found = {}
    for name in scenarios:
        shares = _shares(scores_of(score, statistics, [name]))
        rows = zip(shares, mask.layers, strict=True)
        found[name] = [round(float(row[list(layer.kept)].sum()), DIGITS) for row, layer in rows]
    return found


def _shares(scores: torch.Tensor) -> torch.Tensor:
    total = scores.sum(-1, keepdim=True)
    return scores / torch.where(total > 0, total, 1.0)
