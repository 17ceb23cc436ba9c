"""The threshold of a drift policy (drift_policy.py) from lost masses of the scenario's own prompts.

Nothing is assumed of how they are distributed, only that the prompts to come are like these, which the plan
has not seen. Of n own prompts j are left above the threshold, so it is the (n - j)-th smallest lost mass. As
more than the share a of all own prompts lies above it only if more than a of them lie above so many of n,

    P(share above the threshold > a) <= P(Y <= j),  Y binomial of n and a

(Wilks, "Determination of sample sizes for setting tolerance limits", 1941; for masses that can be equal it
holds all the more, since a policy acts above its threshold alone). j is the largest with P(Y <= j) of at most
1 - confidence. Not even j = 0 is allowed below n = log(1 - confidence) / log(1 - a): 299 prompts for one
false alarm in 100 requests at 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from moe_runtime.errors import PlanError

RATE, CONFIDENCE = 0.01, 0.95
DECIMALS = 4  # of a threshold, rounded up: a log has its masses to six


@dataclass(frozen=True, slots=True)
class Threshold:
    """threshold     a lost mass; a policy acts above it
    num_prompts   own ones that it was taken from, ``num_above`` of them above it
    rate          the share of own prompts that may be above it, at this ``confidence``
    expected_rate the share to be expected, (num_above + 1) / (num_prompts + 1) or less
    """

    threshold: float
    num_prompts: int
    num_above: int
    rate: float
    confidence: float
    expected_rate: float


@dataclass(frozen=True, slots=True)
class Detected:
    """``num_above`` of ``num_prompts`` foreign prompts are above a threshold: their share, and its 95 %
    interval (Wilson, "Probable inference", 1927).
    """

    num_prompts: int
    num_above: int
    share: float
    low: float
    high: float


def propose(own: Sequence[float], rate: float = RATE, confidence: float = CONFIDENCE) -> Threshold:
    """The lowest threshold that keeps to ``rate``, both of 0 to 1. Raises PlanError for too few prompts, and
    where own prompts lose all their mass.
    """
    for name, value in (("rate of false alarms", rate), ("confidence", confidence)):
        if not 0 < value < 1:
            raise PlanError(f"a {name} is between 0 and 1, not {value}")
    above = _most_above(len(own), rate, confidence)
    if above < 0:
        needed = math.ceil(math.log(1 - confidence) / math.log(1 - rate))
        raise PlanError(
            f"{len(own)} own prompts are too few to promise at most {rate:g} false alarms per request with "
            f"confidence {confidence:g}: {needed} are needed, or allow more (--false-alarms)"
        )
    mass = sorted(own)[len(own) - 1 - above]
    threshold = math.ceil(mass * 10**DECIMALS) / 10**DECIMALS
    if threshold >= 1:
        raise PlanError(
            "own prompts lose all their gate weight, so no threshold tells foreign ones; plan anew"
        )
    still = sum(value > threshold for value in own)
    return Threshold(threshold, len(own), still, rate, confidence, (above + 1) / (len(own) + 1))


def detect(foreign: Sequence[float], threshold: float) -> Detected:
    """Raises PlanError where there is no foreign prompt."""
    count = len(foreign)
    if not count:
        raise PlanError("there is no foreign prompt to detect")
    above = sum(mass > threshold for mass in foreign)
    share, z = above / count, NormalDist().inv_cdf(0.975)
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return Detected(count, above, share, max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale))


def _most_above(count: int, rate: float, confidence: float) -> int:
    """j of above; -1 if there is none."""
    total, above = 0.0, -1
    for number in range(count):
        logarithm = (
            math.lgamma(count + 1)
            - math.lgamma(number + 1)
            - math.lgamma(count - number + 1)
            + number * math.log(rate)
            + (count - number) * math.log1p(-rate)
        )
        total += math.exp(logarithm)
        if total > 1 - confidence:
            break
        above = number
    return above
