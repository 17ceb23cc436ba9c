"""The mask table: which row of every layer's masks belongs to which scenario, and who still uses it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moe_runtime.absent_experts import AbsentExperts
from moe_runtime.drift_policy import Action, DriftPolicy
from moe_runtime.errors import ModelNotFound, PlanError
from moe_runtime.layers.moe import MAX_MASKS
from moe_runtime.plan import ExpertMask
from moe_runtime.recovery import Recovery
from moe_runtime.recovery_rows import RecoveryRows
from moe_runtime.sequence import Sequence

NO_MASK = -1


@dataclass(frozen=True, slots=True)
class Granted:
    """The row that a sequence obeys, and what keeps its cached prefixes apart from those of other masks."""

    row: int = NO_MASK
    salt: str = "all\n"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to happen to a sequence: ``message`` is for who is refused, ``salt`` for who falls back."""

    action: Action
    message: str
    salt: str


class MaskTable:
    """Belongs to the engine's thread. A row is written before its first token and never while one uses it."""

    def __init__(self, model: Any) -> None:
        """``model``: its ``mixtures()`` are the layers with routers, by decoder layer."""
        self._mixtures = dict(model.mixtures())
        self._is_measured = any(number < model.config.num_layers - 1 for number in self._mixtures)
        self.absent = AbsentExperts(model)
        self._masks: dict[str, tuple[Granted, ExpertMask]] = {}
        self._users: Counter[int] = Counter()
        self._policies: dict[int, tuple[str, DriftPolicy]] = {}  # by row; scenario and policy
        self._recoveries = RecoveryRows(model)
        self._free = list(reversed(range(MAX_MASKS)))
        self._leaving: set[int] = set()

    @property
    def scenarios(self) -> Mapping[str, ExpertMask]:
        return {name: mask for name, (_, mask) in self._masks.items()}

    def add(
        self,
        name: str,
        mask: ExpertMask,
        policy: DriftPolicy | None = None,
        recovery: Recovery | None = None,
    ) -> None:
        """Let requests name this scenario. Raises PlanError for a name in use, a mask of another model, one
        that keeps fewer experts than a token takes or some that are not in memory, a policy that could never
        act, a recovery of another mask or model, or when all rows are taken. What the scenario lacks is made
        up for as ``recovery`` says.
        """
        if name in self._masks:
            raise PlanError(f"two scenarios are called {name!r}; rename one")
        if not self._free:
            raise PlanError(
                f"scenario {name!r}: {MAX_MASKS} scenarios are served already, the most there can be"
            )
        expected = {number: layer.config.num_experts for number, layer in self._mixtures.items()}
        if mask.num_experts != expected:
            raise PlanError(
                f"scenario {name!r}: its mask has layers and experts {_brief(mask.num_experts)}, "
                f"the model {_brief(expected)}; it was made for another model"
            )
        for layer in mask.layers:
            top_k = self._mixtures[layer.layer].config.top_k
            if len(layer.kept) < top_k:
                raise PlanError(
                    f"scenario {name!r}: layer {layer.layer} keeps {len(layer.kept)} experts, "
                    f"each token takes {top_k}"
                )
        self.absent.check_mask(name, mask)
        if policy is not None:
            self._check_policy(name, policy)
        salt = mask.digest
        if recovery is not None:
            self._recoveries.check(name, mask, recovery)
            salt = f"{salt} {recovery.digest}"
        row = self._write(name, mask, recovery)
        self._masks[name] = (Granted(row, f"{salt}\n"), mask)
        if policy is not None:
            self._policies[row] = (name, policy)

    def remove(self, name: str) -> None:
        """No new request may name it; those that run go on to their end. Raises ModelNotFound."""
        row = self._find(name).row
        del self._masks[name]
        self._leaving.add(row)
        self._recycle(row)

    def grant(self, name: str | None) -> Granted:
        """What a sequence of this scenario carries; None: all experts. Raises ModelNotFound, and
        RequestError for all experts of a model that lacks some.
        """
        if name is None:
            self.absent.check_unmasked()
            return Granted()
        return self._find(name)

    def judge(self, sequence: Sequence) -> Verdict | None:
        """What its scenario's policy says of a sequence whose prompt is read and that has no token yet; None
        for nothing. It depends on the request alone, not on what is cached or runs beside it.
        """
        name, policy = self._policies.get(sequence.mask_row, ("", None))
        lost = sequence.lost_mass
        if policy is None or lost is None or sequence.num_total > sequence.num_prompt:
            return None
        if lost <= policy.threshold:
            return None
        message = (
            f"the prompt's lost mass is {lost:.4f} and scenario {name!r} takes at most "
            f"{policy.threshold:.4f}: it is not the kind of text that the scenario was made for; ask another "
            "scenario or the full model"
        )
        return Verdict(policy.action, message, Granted().salt + sequence.salt.partition("\n")[2])

    def use(self, row: int) -> None:
        """One more sequence obeys this row, until ``release``."""
        if row != NO_MASK:
            self._users[row] += 1

    def release(self, row: int) -> None:
        if row == NO_MASK:
            return
        self._users[row] -= 1
        self._recycle(row)

    def users(self, name: str) -> int:
        """Sequences that use a scenario now. Raises ModelNotFound."""
        return self._users[self._find(name).row]

    def _write(self, name: str, mask: ExpertMask, recovery: Recovery | None) -> int:
        """A free row with what a scenario has. Where that fails it is free again, and without a recovery; if
        even clearing fails, it is nobody's.
        """
        row = self._free.pop()
        try:
            if recovery is not None:
                self._recoveries.write(name, row, mask, recovery)
            for layer in mask.layers:  # all layers, so that nothing of the last mask stays
                allowed = torch.zeros(layer.num_experts, dtype=torch.uint8)
                allowed[list(layer.kept)] = 1
                self._mixtures[layer.layer].masks[row].copy_(allowed)
        except BaseException:
            self._recoveries.clear(row)
            self._free.append(row)
            raise
        return row

    def _check_policy(self, name: str, policy: DriftPolicy) -> None:
        if not self._is_measured:
            raise PlanError(
                f"scenario {name!r}: lost mass is measured before the last layer, which alone has experts"
            )
        if policy.action == "fallback" and not self.absent.is_empty:
            raise PlanError(
                f"scenario {name!r}: its policy falls back to the full model, of which this server holds a "
                "part; use reject or flag, or start without --scenarios"
            )

    def _find(self, name: str) -> Granted:
        found = self._masks.get(name)
        if found is None:
            known = ", ".join(sorted(self._masks)) or "none"
            raise ModelNotFound(f"there is no scenario {name!r}; there are: {known}")
        return found[0]

    def _recycle(self, row: int) -> None:
        if row in self._leaving and not self._users[row]:
            self._leaving.discard(row)
            self._policies.pop(row, None)
            self._recoveries.clear(row)
            self._free.append(row)


def _brief(num_experts: Mapping[int, int]) -> str:
    counts = sorted(set(num_experts.values()))
    return f"{len(num_experts)} layers of {counts[0] if len(counts) == 1 else counts} experts"
