"""The certificate: what an evaluation found a plan to cost, and for which plan and model that holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_runtime.errors import PlanError
from moe_runtime.experts import documents

KIND = "certificate"
LIMITS = ("kl_mean", "kl_p99")  # in nats; what a budget limits and a measurement must hold
IDENTITY = ("weights", "config", "tokenizer")  # whose digests say which model it was


@dataclass(frozen=True)
class Certificate:
    """scenario     of the plan: a name, or several for a union
    plan         digest of the plan's document
    mask_digest  of the plan's mask (ExpertMask.digest)
    model        the digests of IDENTITY
    budget       the largest ``kl_mean`` and ``kl_p99`` that were allowed, in nats
    passed       whether the evaluation kept to it, and to whatever else it looks at; ``reasons`` if not
    measured     the same numbers as found on the scenario's test text, and whatever else was measured
    test         digests of the texts it was measured on
    recovery     recoveries (recovery_trial.py) that were tried: "applied", the kind of the one that the
                 numbers hold with or None, and "tried", of each its kind, digest, bytes, whether it helps and
                 the change of KL; None when there was none, as in certificates of earlier versions
    """

    scenario: str | tuple[str, ...]
    plan: str
    mask_digest: str
    model: Mapping[str, str]
    budget: Mapping[str, float]
    passed: bool
    reasons: tuple[str, ...]
    measured: Mapping[str, Any]
    test: Mapping[str, str]
    recovery: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        """Raises PlanError for a certificate that says too little, or passes what is over budget."""
        for part, names in (("model", IDENTITY), ("budget", LIMITS), ("measured", LIMITS)):
            missing = [name for name in names if name not in getattr(self, part)]
            if missing:
                raise PlanError(f"a certificate's {part!r} must say {', '.join(missing)}")
        for part in ("budget", "measured"):
            for name in LIMITS:
                value = getattr(self, part)[name]
                if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                    raise PlanError(f"a certificate's {part}.{name} must be a finite number, not {value!r}")
        if self.recovery is not None:
            _check_recovery(self.recovery)

    @classmethod
    def load(cls, path: Path) -> Certificate:
        """Raises PlanError for a file that is missing, was changed, or is no certificate."""
        body = {"recovery": None, **documents.load(path, KIND).body}
        fields = cls.__dataclass_fields__
        if body.keys() != fields.keys():
            different = sorted(body.keys() ^ fields.keys())
            raise PlanError(f"{path.name}: missing or unknown in a certificate: {', '.join(different)}")
        if type(body["passed"]) is not bool:
            raise PlanError(f"{path.name}: 'passed' must be true or false, not {body['passed']!r}")
        scenario = body["scenario"]
        given = {
            "scenario": tuple(scenario) if isinstance(scenario, list) else scenario,
            "reasons": tuple(body["reasons"]),
        }
        return cls(**{**body, **given})

    def save(self, path: Path, inputs: Mapping[str, str]) -> None:
        """``inputs``: digests by name of what it was made from."""
        documents.save(path, KIND, asdict(self), inputs)

    def check(self, plan: str, mask_digest: str, model: Mapping[str, str]) -> list[str]:
        """Why it does not hold for the plan of digest ``plan`` and the model of these digests; empty if it
        does.
        """
        reasons = []
        if (self.plan, self.mask_digest) != (plan, mask_digest):
            reasons.append("it is stale: it was made for another plan")
        different = [name for name in IDENTITY if self.model[name] != model[name]]
        if different:
            reasons.append(f"it is stale: it was measured with other {' and '.join(different)}")
        reasons += [
            f"it is over budget: {name} is {self.measured[name]:.4g} nats, the limit {self.budget[name]:.4g}"
            for name in LIMITS
            if self.measured[name] > self.budget[name]
        ]
        if not self.passed:
            reasons.append(f"its evaluation failed: {'; '.join(self.reasons) or 'no reason given'}")
        return reasons

    @property
    def applied_recovery(self) -> str | None:
        """Digest of the recovery file without which the numbers do not hold; None for the plan alone."""
        if self.recovery is None or self.recovery["applied"] is None:
            return None
        digests = {tried["kind"]: tried["digest"] for tried in self.recovery["tried"]}
        return str(digests[self.recovery["applied"]])

    def tried_in_vain(self, digest: str) -> bool:
        """Whether this recovery file was measured and does not help, or less than another one."""
        tried = [] if self.recovery is None else self.recovery["tried"]
        return digest in {each["digest"] for each in tried} and digest != self.applied_recovery


def _check_recovery(value: Any) -> None:
    try:
        kinds = [tried["kind"] for tried in value["tried"]]
        complete = all(
            type(tried["digest"]) is str and type(tried["helps"]) is bool for tried in value["tried"]
        )
        applied = value["applied"]
    except (KeyError, TypeError) as error:
        raise PlanError(f"a certificate's 'recovery' must say what was applied and tried: {error}") from error
    if not complete or (applied is not None and applied not in kinds):
        raise PlanError(
            f"a certificate's 'recovery' applies {applied!r}, which is not among those tried: {kinds}"
        )
