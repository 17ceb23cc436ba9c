"""How much a scenario needs each expert: one short formula per score over its statistics.

A score is float64 [L, E], higher is more needed, comparable within a layer. Nothing here runs the model, and
the arithmetic is torch's float64 without reductions over long axes whose order could differ between machines:
equal statistics give equal scores, and equal plans, everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import torch

from moe_runtime.errors import ConfigError
from moe_runtime.experts.fingerprints import mixed
from moe_runtime.experts.statistics import ScenarioStatistics, Statistics

Score = Callable[[ScenarioStatistics, int], torch.Tensor]  # the integer is the seed
DEFAULT = "easy_ep"


def frequency(sums: ScenarioStatistics, seed: int) -> torch.Tensor:
    """How many tokens chose it: SEER-MoE's hard count (arXiv 2404.05089)."""
    return sums.counts.double()


def gate_weight(sums: ScenarioStatistics, seed: int) -> torch.Tensor:
    """sum w: SEER-MoE's soft, "heavy-hitter" count (arXiv 2404.05089)."""
    return sums.gate


def ean(sums: ScenarioStatistics, seed: int) -> torch.Tensor:
    """sum |f|, the expert's activation norm: the EAN baseline of REAP (arXiv 2510.13999, ``ean_sum``)."""
    return sums.norm


def reap(sums: ScenarioStatistics, seed: int) -> torch.Tensor:
    """mean of w |f| over the tokens that chose it (arXiv 2510.13999); 0 where none did."""
    return sums.gate_norm / sums.counts.clamp(min=1)


def reap_sum(sums: ScenarioStatistics, seed: int) -> torch.Tensor:
    """sum of w |f|: REAP that does not forget how often (its code's ``weighted_ean_sum``)."""
    return sums.gate_norm


def easy_ep(sums: ScenarioStatistics, seed: int) -> torch.Tensor:
    """sum of w |f| max(0, 1 - cos(r, r + routed part)), r the residual stream: EASY-EP (arXiv 2504.06792)."""
    return sums.gate_norm_turn


def mone(sums: ScenarioStatistics, seed: int) -> torch.Tensor:
    """Access frequency times output variance, sum |f - mean f|^2: what a constant in the expert's place would
    miss (MoNE, arXiv 2507.00390; its published weighting of the two is not known to us).
    """
    mean = sums.outputs / sums.counts.clamp(min=1).unsqueeze(-1)
    return (sums.norm_squared - sums.counts * _squared_length(mean)).clamp(min=0.0)


def random(sums: ScenarioStatistics, seed: int) -> torch.Tensor:
    """Uniform in [0, 1) from ``seed`` alone: the baseline that every other score has to beat."""
    places = np.arange(sums.counts.numel(), dtype=np.uint64)
    bits = mixed(mixed(places + np.uint64(1)) ^ np.uint64(seed & (2**64 - 1)))
    return torch.from_numpy((bits >> np.uint64(11)).astype(np.float64) / 2.0**53).view(sums.counts.shape)


SCORES: Mapping[str, Score] = MappingProxyType(
    {score.__name__: score for score in (frequency, gate_weight, ean, reap, reap_sum, easy_ep, mone, random)}
)


def scores_of(name: str, statistics: Statistics, scenarios: Sequence[str], seed: int = 0) -> torch.Tensor:
    """float64 [L, E] of one scenario; of several, their scores divided by the layer's sum and added, so that
    none outvotes another by the length of its texts (EASY-EP's mix of domains, arXiv 2504.06792).

    Raises ConfigError for an unknown score, PlanError for an unknown scenario.
    """
    formula = SCORES.get(name)
    if formula is None:
        raise ConfigError(f"--score {name!r}: must be one of {', '.join(SCORES)}")
    found = [formula(statistics.of(scenario), seed) for scenario in scenarios]
    if len(found) == 1:
        return found[0]
    return sum((_shares(each) for each in found[1:]), start=_shares(found[0]))


def unseen_by(name: str, statistics: Statistics, scenarios: Sequence[str]) -> torch.Tensor:
    """bool [L, E]: experts that the score knows nothing of, as no token of any scenario chose them. The
    random score knows nothing of any and treats all alike, or it would be no baseline.
    """
    unseen = torch.stack([statistics.of(scenario).unseen for scenario in scenarios]).all(0)
    return torch.zeros_like(unseen) if name == "random" else unseen


def _shares(scores: torch.Tensor) -> torch.Tensor:
    total = _in_order(scores.T).unsqueeze(-1)
    return scores / torch.where(total > 0, total, 1.0)


def _squared_length(vectors: torch.Tensor) -> torch.Tensor:
    """float64 [L, E] of [L, E, H]."""
    return _in_order(vectors.double().square().movedim(-1, 0))


def _in_order(terms: torch.Tensor) -> torch.Tensor:
    """The sum over the first axis, term by term: the same bits whatever the instruction set."""
    return torch.from_numpy(terms.numpy().cumsum(0)[-1])
