"""A plan on disk (documents.py, kind "plan"): which experts a scenario keeps, and what led to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from moe_runtime.errors import PlanError
from moe_runtime.experts import documents
from moe_runtime.experts.documents import Document
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.plan import ExpertMask

KIND = "plan"
ByLayer = Mapping[int, tuple[int, ...]]  # expert ids by decoder layer


@dataclass(frozen=True)
class PlanFile:
    """scenario     a name, or several whose needs were put together, as ``combine`` says
    mask         the experts that it keeps
    model        what it was made for
    statistics   digest of the statistics file
    score, seed  how experts were ranked; the seed matters to the random score alone
    budget       what was asked for, as flag -> value
    combine      "one", or how several scenarios became one plan: "mix", "union", "intersection"
    constraints  what rules changed or said, one sentence each
    unseen       experts that no token of the scenario chose
    protected    experts that were not to be cut, super-experts among them
    order        all experts, best first: keeping K is keeping the first K (of "mix" and "one")
    curve        plans measured on the way: kept, bytes, kl_mean, kl_p99, top1, within; empty without a text
    num_bytes    "full" and "kept", of the model's weights as published
    text         what KL was measured on: "corpora", by scenario their digests, and "fingerprints", so that
                 nothing is tested on it; empty without one
    digest       of the document, empty before it is one
    """

    scenario: str | tuple[str, ...]
    mask: ExpertMask
    model: ModelIdentity
    statistics: str
    score: str
    seed: int
    budget: Mapping[str, Any]
    combine: str
    constraints: tuple[str, ...]
    unseen: ByLayer
    protected: ByLayer
    order: ByLayer
    curve: tuple[Mapping[str, Any], ...]
    num_bytes: Mapping[str, int]
    text: Mapping[str, Any]
    digest: str = ""

    @property
    def scenarios(self) -> tuple[str, ...]:
        """The name, or the names."""
        return (self.scenario,) if isinstance(self.scenario, str) else self.scenario

    @property
    def name(self) -> str:
        return " + ".join(self.scenarios)

    def save(self, path: Path) -> Document:
        """Raises PlanError when it cannot be written."""
        return documents.save(path, KIND, self.to_json(), {"statistics": self.statistics})

    @classmethod
    def load(cls, path: Path) -> PlanFile:
        """Raises PlanError for a file that is missing, was changed, or is no plan."""
        document = documents.load(path, KIND)
        try:
            return cls.from_json(document.body, document.digest)
        except PlanError as error:
            raise PlanError(f"{path.name}: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """The document's body."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "digest"}
        return {
            **{name: value for name, value in given.items() if name != "num_bytes"},
            "scenario": self.scenario if isinstance(self.scenario, str) else list(self.scenario),
            "mask": self.mask.to_json(),
            "mask_digest": self.mask.digest,
            "model": self.model.to_json(),
            "constraints": list(self.constraints),
            "curve": [dict(point) for point in self.curve],
            "bytes": dict(self.num_bytes),
            **{name: _layers_to_json(given[name]) for name in ("unseen", "protected", "order")},
        }

    @classmethod
    def from_json(cls, body: Mapping[str, Any], digest: str = "") -> PlanFile:
        """Raises PlanError for anything but what ``to_json`` gives."""
        expected = {field.name for field in fields(cls)} - {"digest", "num_bytes"} | {"bytes", "mask_digest"}
        if body.keys() != expected:
            different = ", ".join(sorted(body.keys() ^ expected))
            raise PlanError(f"missing or unknown in a plan: {different}")
        mask = ExpertMask.from_json(body["mask"])
        if mask.digest != body["mask_digest"]:
            raise PlanError("the plan's mask is not the one that its digest says")
        scenario = body["scenario"]
        rest = {name: value for name, value in body.items() if name not in ("mask_digest", "bytes")}
        return cls(
            **{
                **rest,
                "scenario": tuple(scenario) if isinstance(scenario, list) else scenario,
                "mask": mask,
                "model": ModelIdentity.from_json(body["model"]),
                "constraints": tuple(body["constraints"]),
                "curve": tuple(body["curve"]),
                "num_bytes": body["bytes"],
                **{name: _layers_from_json(body[name]) for name in ("unseen", "protected", "order")},
            },
            digest=digest,
        )


def _layers_to_json(layers: ByLayer) -> dict[str, Sequence[int]]:
    return {str(layer): list(experts) for layer, experts in layers.items()}


def _layers_from_json(value: Any) -> dict[int, tuple[int, ...]]:
    try:
        return {
            int(layer): tuple(experts)
            for layer, experts in sorted(value.items(), key=lambda row: int(row[0]))
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise PlanError(f"expert ids by layer expected: {error}") from error
