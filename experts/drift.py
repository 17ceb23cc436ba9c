"""Drift: has the traffic of a scenario left what its mask was made for?

A CUSUM over the lost mass of prompts (moe_runtime/lost_mass.py), one prompt after the other. Each prompt is
first ranked among R reference prompts of the scenario's own traffic, which takes away the shape of the
distribution: with c of them at least as large, p = (1 + c) / (R + 1) is uniform as long as nothing changes.

Foreign prompts have small p. The bet is that a share e of the traffic is foreign and that its quantiles
q = Phi^-1(1 - p) of the normal distribution lie m higher, so that a prompt's evidence is the log likelihood
ratio

    z = log(1 - e + e * exp(m * q - m^2 / 2))        (its mean is below 0 in the scenario's own traffic)
    S = max(0, S + z),  alarm when S > h

h is such that in the scenario's own traffic the mean time between alarms is SAFETY times N, a day's requests,
by the Markov chain of S (Brook and Evans, "An approach to the probability distribution of CUSUM run length",
1972). The chain knows p to be uniform, and a finite reference makes it so on the average only: hence SAFETY,
and tests/experts/test_drift.py counts false alarms in simulated days.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import NormalDist

import numpy as np

from moe_runtime.errors import PlanError

SHARE = 0.1  # e, the foreign traffic to be found
SHIFT = 1.75  # m; on the demo foreign prompts lie 1.5 to 2.5 higher, and the choice matters little
REQUESTS_PER_DAY = 100_000  # N
SAFETY = 10  # days between false alarms if p were uniform
CHAIN_STATES = 300
MIN_REFERENCE = 500  # 2000 find more and are safer: below, hardly a prompt is rare enough to be noticed
MAX_LINE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Observation:
    """One prompt under a scenario; ``time`` in seconds since 1970."""

    time: float
    scenario: str
    lost_mass: float


@dataclass(frozen=True, slots=True)
class Alarm:
    """At observation ``index`` (from 0) the evidence passed its limit; it began to grow after ``since``."""

    index: int
    since: int
    time: float


class Detector:
    """Feed it observations of one scenario in order. After an alarm it starts from nothing."""

    def __init__(
        self,
        reference: Sequence[float],
        *,
        share: float = SHARE,
        requests_per_day: int = REQUESTS_PER_DAY,
    ) -> None:
        """``reference``: lost masses of the scenario's own traffic. Raises PlanError for too few of them."""
        if len(reference) < MIN_REFERENCE:
            raise PlanError(
                f"{len(reference)} reference prompts are too few to know what is unusual; at least "
                f"{MIN_REFERENCE} are needed"
            )
        if not 0 < share < 1:
            raise PlanError(f"a share of foreign traffic is between 0 and 1, not {share}")
        self._sorted = sorted(reference)
        self._scores = _scores(len(reference), share)
        self.limit = _limit(len(reference), share, SAFETY * requests_per_day)
        self.evidence = 0.0
        self.largest = 0.0
        self._num_seen = 0
        self._since = 0

    def add(self, observation: Observation) -> Alarm | None:
        """The alarm that it raises, if any."""
        at_least = len(self._sorted) - bisect_left(self._sorted, observation.lost_mass)
        self.evidence = max(0.0, self.evidence + self._scores[at_least])
        self.largest = max(self.largest, self.evidence)
        index = self._num_seen
        self._num_seen += 1
        if self.evidence == 0.0:
            self._since = self._num_seen
        if self.evidence <= self.limit:
            return None
        alarm = Alarm(index, self._since, observation.time)
        self.evidence, self._since = 0.0, self._num_seen
        return alarm


@dataclass(frozen=True)
class Finding:
    """What ``examine`` found for one scenario; means are of lost mass, evidence in nats."""

    scenario: str
    num_reference: int
    reference_mean: float
    num_requests: int
    mean: float
    evidence: float
    largest_evidence: float
    limit: float
    alarms: tuple[Alarm, ...]


def examine(
    reference: Iterable[Observation],
    traffic: Iterable[Observation],
    *,
    share: float = SHARE,
    requests_per_day: int = REQUESTS_PER_DAY,
) -> list[Finding]:
    """One finding per scenario of ``traffic``, by name. Raises PlanError where there is no traffic, or too
    little reference for some of it.
    """
    known = _by_scenario(reference)
    seen = _by_scenario(traffic)
    if not seen:
        raise PlanError("the log holds no request of such a scenario; there is nothing to examine")
    findings = []
    for name in sorted(seen):
        masses = [item.lost_mass for item in known.get(name, [])]
        try:
            detector = Detector(masses, share=share, requests_per_day=requests_per_day)
        except PlanError as error:
            raise PlanError(f"scenario {name!r}: {error}") from error
        alarms = [alarm for item in seen[name] if (alarm := detector.add(item)) is not None]
        findings.append(
            Finding(
                scenario=name,
                num_reference=len(masses),
                reference_mean=math.fsum(masses) / len(masses),
                num_requests=len(seen[name]),
                mean=math.fsum(item.lost_mass for item in seen[name]) / len(seen[name]),
                evidence=detector.evidence,
                largest_evidence=detector.largest,
                limit=detector.limit,
                alarms=tuple(alarms),
            )
        )
    return findings


def read_log(path: Path, scenario: str | None = None) -> Iterator[Observation]:
    """The prompts of a --drift-log, of one scenario or of all. A last line that is still being written is
    left out. Raises PlanError with file and line for anything else that is no such log.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), start=1):
                if not line.endswith(b"\n"):
                    if len(line) == MAX_LINE_BYTES:
                        raise PlanError(f"{path.name}, line {number}: too long for a drift log")
                    return
                found = _observation(line, f"{path.name}, line {number}")
                if scenario in (None, found.scenario):
                    yield found
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}") from error


@lru_cache(maxsize=64)
def _scores(num_reference: int, share: float) -> tuple[float, ...]:
    """z, by the number of reference prompts that are at least as large."""
    ranks = [(1 + count) / (num_reference + 1) for count in range(num_reference + 1)]
    return tuple(math.log(1 - share + share * _foreign_density(p)) for p in ranks)


@lru_cache(maxsize=64)
def _limit(num_reference: int, share: float, requests: int) -> float:
    """h with a mean of ``requests`` requests between alarms; the likelihood ratio's log(requests) is more
    than enough (Lorden, "Procedures for reacting to a change in distribution", 1971).
    """
    scores = _scores(num_reference, share)
    low, high = 0.0, math.log(requests)
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (middle, high) if run_length(scores, middle) < requests else (low, middle)
    return high


def run_length(scores: Sequence[float], limit: float) -> float:
    """Mean number of requests until S passes ``limit``, from 0, where every score is equally likely."""
    width = limit / (CHAIN_STATES - 0.5)  # state 0 is S = 0, state n the interval of this width around n
    states = np.arange(CHAIN_STATES) * width
    ordered = np.sort(np.asarray(scores))
    reached = np.searchsorted(ordered, states[None, :] + width / 2 - states[:, None], side="right")
    moves = np.diff(reached / len(ordered), axis=1, prepend=0.0)
    return float(np.linalg.solve(np.eye(CHAIN_STATES) - moves, np.ones(CHAIN_STATES))[0])


def _foreign_density(p: float) -> float:
    """Of a foreign prompt's p, relative to one of the scenario's own."""
    if p >= 1:
        return 0.0
    return math.exp(SHIFT * NormalDist().inv_cdf(1 - p) - SHIFT**2 / 2)


def _observation(line: bytes, where: str) -> Observation:
    try:
        value = json.loads(line)
        found = Observation(float(value["time"]), str(value["scenario"]), float(value["lost_mass"]))
    except (ValueError, KeyError, TypeError) as error:
        raise PlanError(f"{where}: not a line of a drift log ({error})") from error
    if not 0 <= found.lost_mass <= 1:
        raise PlanError(f"{where}: a lost mass is from 0 to 1, not {found.lost_mass}")
    return found


def _by_scenario(observations: Iterable[Observation]) -> dict[str, list[Observation]]:
    groups: dict[str, list[Observation]] = {}
    for item in observations:
        groups.setdefault(item.scenario, []).append(item)
    return groups
