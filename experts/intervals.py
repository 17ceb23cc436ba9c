"""Numbers over documents with their 95 % intervals, by a seeded bootstrap that draws whole documents.

Tokens of one document are not independent of each other, so drawing tokens would make the intervals too
narrow (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 8).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from moe_runtime.experts.divergence import TokenDivergences

DRAWS = 500
CONFIDENCE = 0.95
MIN_DOCUMENTS = 10  # of fewer an interval says next to nothing: of one it has no width at all
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A number and where it may as well lie: ``low`` to ``high``, 95 % of the draws."""

    value: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


class Bootstrap:
    """``DRAWS`` times as many documents as there are, with replacement; the same for the same seed."""

    def __init__(self, num_documents: int, seed: int) -> None:
        generator = np.random.Generator(np.random.PCG64(seed))
        drawn = generator.integers(0, num_documents, size=(DRAWS, num_documents))
        self._times = np.stack([np.bincount(row, minlength=num_documents) for row in drawn]).astype(float)

    def mean(self, sums: Floats, counts: Floats) -> Interval:
        """Of sum / count over documents, each [D]."""
        totals = self._times @ counts
        return _interval(sums.sum() / counts.sum(), self._times @ sums / np.maximum(totals, 1e-300), totals)

    def quantile(self, values: Floats, owners: npt.NDArray[np.int64], share: float) -> Interval:
        """Of the values [T] of all documents; ``owners`` [T] says whose each is. A value that occurs."""
        order = np.argsort(values, kind="stable")
        ordered, owned = values[order], owners[order]
        draws = np.empty(len(self._times))
        for row, times in enumerate(self._times):
            reached = np.cumsum(times[owned])
            place = np.searchsorted(reached, share * reached[-1]) if reached[-1] else 0
            draws[row] = ordered[min(int(place), len(ordered) - 1)]
        return _interval(float(np.quantile(values, share, method="higher")), draws, np.ones(len(draws)))


def _interval(value: float, draws: Floats, weights: Floats) -> Interval:
    known = draws[weights > 0]
    edge = (1 - CONFIDENCE) / 2
    low, high = np.quantile(known, [edge, 1 - edge]) if len(known) else (value, value)
    return Interval(float(value), float(low), float(high))


def paired_change(before: TokenDivergences, after: TokenDivergences, seed: int) -> Interval:
    """The change of mean KL, nats, of the same tokens in both: what documents have in common cancels out, so
    it is told far more sharply than by two intervals.
    """
    owners, num_documents = _owners(before)
    counts = np.bincount(owners, minlength=num_documents).astype(float)
    sums = np.bincount(owners, (after.kl - before.kl).numpy(), num_documents).astype(np.float64)
    return Bootstrap(num_documents, seed).mean(sums, counts)


def divergence_intervals(found: TokenDivergences, seed: int) -> dict[str, Any]:
    """What a mask changes, as JSON: KL in nats (mean, p95, p99), the share of equal likeliest tokens, and the
    change of the negative log likelihood of the text, in nats per token; tokens and documents counted.
    """
    owners, num_documents = _owners(found)
    bootstrap = Bootstrap(num_documents, seed)
    counts = np.bincount(owners, minlength=num_documents).astype(float)
    kl = found.kl.numpy()

    def mean(values: Floats) -> dict[str, float]:
        return bootstrap.mean(np.bincount(owners, values, num_documents).astype(np.float64), counts).to_json()

    return {
        "kl_mean": mean(kl),
        "kl_p95": bootstrap.quantile(kl, owners, 0.95).to_json(),
        "kl_p99": bootstrap.quantile(kl, owners, 0.99).to_json(),
        "top1": mean(found.same_top1.numpy().astype(float)),
        "nll_change": mean((found.nll_masked - found.nll_full).numpy()),
        "tokens": len(kl),
        "documents": num_documents,
    }


def _owners(found: TokenDivergences) -> tuple[npt.NDArray[np.int64], int]:
    """Of every token its document, counted from 0; and how many there are."""
    owners = np.unique(found.documents.numpy(), return_inverse=True)[1].astype(np.int64)
    return owners, int(owners.max()) + 1
