"""The scenarios of a model on disk: which there are, and whether each may be served.

    <scenarios>/<name>/plan.json           the experts it keeps (documents.py, kind "plan")
    <scenarios>/<name>/certificate.json    what that costs, for this plan and this model
    <scenarios>/<name>/policy.json         optional: {"threshold": 0.3, "action": "flag"}, see drift_policy.py
    <scenarios>/<name>/recovery.safetensors   optional: applied if the certificate's numbers hold with it

The folder's name is the scenario's. Nothing here touches a running engine.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from moe_runtime.drift_policy import DriftPolicy
from moe_runtime.errors import ConfigError, PlanError
from moe_runtime.experts.certificate import LIMITS, Certificate
from moe_runtime.experts.file_digests import DigestMemo
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.recovery_file import RecoveryFile
from moe_runtime.placement import Placement
from moe_runtime.plan import SCENARIO_NAME, ExpertMask
from moe_runtime.recovery import Recovery

FOLDER = "scenarios"  # in the model's folder
PLAN, CERTIFICATE, POLICY, RECOVERY = "plan.json", "certificate.json", "policy.json", "recovery.safetensors"
MAX_POLICY_BYTES = 4096


@dataclass(frozen=True)
class Scenario:
    """One that may be served.

    objections     why its certificate does not hold, where that was allowed
    recovery_file  what makes up for missing experts, if its certificate says so
    unused         why there is a file of that kind that is not applied; empty if there is none
    """

    name: str
    mask: ExpertMask
    plan_digest: str
    bytes_full: int
    bytes_kept: int
    policy: DriftPolicy | None
    certificate: Certificate | None
    objections: tuple[str, ...]
    recovery_file: RecoveryFile | None = None
    unused: str = ""

    @property
    def recovery(self) -> Recovery | None:
        """What the engine is to apply."""
        return None if self.recovery_file is None else self.recovery_file.recovery

    def summary(self) -> dict[str, Any]:
        """For a list of models: plain JSON."""
        found = self.certificate
        return {
            "experts_kept": self.mask.num_kept,
            "experts": sum(self.mask.num_experts.values()),
            "bytes": self.bytes_kept,
            "bytes_full": self.bytes_full,
            "plan": self.plan_digest,
            "policy": None if self.policy is None else asdict(self.policy),
            "recovery": self._recovery_summary(),
            "certificate": {
                "valid": not self.objections,
                "objections": list(self.objections),
                "measured": None if found is None else {name: found.measured[name] for name in LIMITS},
                "budget": None if found is None else {name: found.budget[name] for name in LIMITS},
            },
        }

    def _recovery_summary(self) -> dict[str, Any] | None:
        file = self.recovery_file
        if file is not None:
            return {"applied": True, "kind": file.kind, "bytes": file.num_bytes, "digest": file.digest}
        return {"applied": False, "reason": self.unused} if self.unused else None


class Registry:
    """The scenarios folder of one model."""

    def __init__(
        self,
        folder: Path,
        model_dir: Path,
        *,
        allow_uncertified: bool = False,
        memo: DigestMemo | None = None,
    ) -> None:
        """Raises ConfigError when there is no such folder. To know the model all its bytes are read, which
        may take long, but for what ``memo`` knows.
        """
        if not folder.is_dir():
            raise ConfigError(f"--scenario-dir {folder}: no such folder")
        self.folder = folder
        self._allow_uncertified = allow_uncertified
        self._model = ModelIdentity.of(model_dir, memo)

    def names(self) -> list[str]:
        """Of the folders in it, sorted; those that start with a dot are none. Raises PlanError when two names
        differ in upper and lower case alone.
        """
        found = sorted(
            path.name for path in self.folder.iterdir() if path.is_dir() and not path.name.startswith(".")
        )
        known: dict[str, str] = {}
        for name in found:
            other = known.setdefault(name.casefold(), name)
            if other != name:
                raise PlanError(
                    f"two scenarios of one name in {self.folder.name}: {other} and {name}; rename one"
                )
        return found

    def open(self, name: str) -> Scenario:
        """Read and check one. Raises PlanError that says what is wrong and what to do about it."""
        if not SCENARIO_NAME.fullmatch(name):
            raise PlanError(
                f"scenario {name[:80]!r}: a name has letters, digits, '_' and '-', starts with a letter or "
                "digit, and is 64 long at most"
            )
        folder = self.folder / name
        if not (folder / PLAN).is_file():
            raise PlanError(f"scenario {name!r}: no {PLAN} in its folder; `moe-experts plan` makes one")
        try:
            plan = PlanFile.load(folder / PLAN)
            _check_owner(name, plan.scenario)
            policy = read_policy(folder / POLICY)
            found = Certificate.load(folder / CERTIFICATE) if (folder / CERTIFICATE).exists() else None
        except PlanError as error:
            raise PlanError(f"scenario {name!r}: {error}") from error
        objections = self._objections(plan, found)
        recovery, unused = _read_recovery(folder / RECOVERY, plan, found)
        if recovery is None and found is not None and found.applied_recovery is not None:
            objections.append(f"its certificate holds with a recovery alone, and {unused}")
        if objections and not self._allow_uncertified:
            raise PlanError(
                f"scenario {name!r} is refused: {'; '.join(objections)}. Run `moe-experts evaluate` for this "
                "model and plan, or start with --allow-uncertified"
            )
        return Scenario(
            name,
            plan.mask,
            plan.digest,
            plan.num_bytes["full"],
            plan.num_bytes["kept"],
            policy,
            found,
            tuple(objections),
            recovery,
            unused,
        )

    def _objections(self, plan: PlanFile, certificate: Certificate | None) -> list[str]:
        reasons = []
        if other := self._model.difference(plan.model):
            reasons.append(f"its plan was made for another model, with other {other}")
        if certificate is None:
            return [*reasons, f"its certificate is missing ({CERTIFICATE})"]
        found = certificate.check(plan.digest, plan.mask.digest, self._model.to_json())
        return [*reasons, *(f"its certificate cannot be used: {reason}" for reason in found)]


def scenario_folder(model_dir: Path, given: Path | None) -> Path | None:
    """``given``, or the model's own folder of scenarios if there is one."""
    own = model_dir / FOLDER
    return given or (own if own.is_dir() else None)


def placement_of(scenarios: Iterable[Scenario]) -> Placement:
    """What any of them keeps, the rest absent. Raises PlanError for masks of different models."""
    return Placement.of(reduce(ExpertMask.union, (scenario.mask for scenario in scenarios)))


def _check_owner(name: str, scenario: Any) -> None:
    """A plan copied into the wrong folder would be a wrong fence under a right name."""
    if isinstance(scenario, str) and scenario != name:
        raise PlanError(f"its {PLAN} was made for scenario {scenario!r}; the folder must have that name")


def read_policy(path: Path) -> DriftPolicy | None:
    """None where there is no such file. Raises PlanError for one that says something else."""
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_bytes()[:MAX_POLICY_BYTES])
    except ValueError as error:
        raise PlanError(f"{POLICY} is no JSON: {error}") from error
    if not isinstance(value, Mapping) or value.keys() != {"threshold", "action"}:
        raise PlanError(f'{POLICY} must be {{"threshold": 0.3, "action": "flag"}} or the like')
    return DriftPolicy(value["threshold"], value["action"])


def _read_recovery(
    path: Path, plan: PlanFile, certificate: Certificate | None
) -> tuple[RecoveryFile | None, str]:
    """The file, if it is the one that the certificate's numbers hold with; else why it is not applied, empty
    where nobody expects one.
    """
    wanted = None if certificate is None else certificate.applied_recovery
    if wanted is None and not path.exists():
        return None, ""
    try:
        file = RecoveryFile.load(path, plan)
    except PlanError as error:
        return None, str(error)
    if file.digest == wanted:
        return file, ""
    if certificate is not None and certificate.tried_in_vain(file.digest):
        return None, f"{path.name}: its evaluation found that it does not help, or another one more"
    return None, f"{path.name} is not what was evaluated; run `moe-experts evaluate --recovery`"
