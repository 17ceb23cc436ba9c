"""Everything a report says, put together from files: one statistics file, plans, their evaluations.

Pictures, tables and sentences are made from this one JSON body and from nothing else, so what the page shows
is what report.json holds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moe_runtime.errors import PlanError
from moe_runtime.experts import documents
from moe_runtime.experts.documents import Document
from moe_runtime.experts.plan_file import KIND as PLAN_KIND
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.report_findings import findings, missing
from moe_runtime.experts.report_importance import importance, score_to_show, share_kept
from moe_runtime.experts.report_serving import read_serving
from moe_runtime.experts.statistics import Statistics
from moe_runtime.experts.statistics_file import load_statistics

KIND = "report"
EVALUATION_KIND = "evaluation"
NUMBERS = ("kl_mean", "kl_p99", "top1", "nll_change")  # of a divergence, each with its interval
NO_COMMAND = "moe-experts profile (writes no command line: the same texts are the same bytes)"


@dataclass(frozen=True)
class Inputs:
    """The files that a report is made from."""

    statistics: Path
    plans: Sequence[Path] = ()
    evaluations: Sequence[Path] = ()
    serving: Path | None = None


@dataclass(frozen=True)
class _Plan:
    label: str
    file: str
    document: Document
    plan: PlanFile


def gather(inputs: Inputs) -> dict[str, Any]:
    """The report's body, as plain JSON. Numbers are as the files have them; KL in nats, shares from 0 to 1.

    Raises PlanError for a file that cannot be read or was changed, that is of another model than the
    statistics, or that does not belong to the other files.
    """
    names = short_names([inputs.statistics, *inputs.plans, *inputs.evaluations, *_optional(inputs.serving)])
    statistics = load_statistics(inputs.statistics)
    plans = _plans(inputs.plans, names, statistics)
    evaluations, documents_read = _evaluations(inputs.evaluations, names, plans)
    serving = None if inputs.serving is None else read_serving(inputs.serving)
    score = score_to_show([each.plan.score for each in plans])
    sources = [_statistics_source(names[inputs.statistics], statistics)]
    sources += [_source(each.file, each.document) for each in plans]
    sources += [_source(name, document) for name, document in documents_read.items()]
    if serving is not None and inputs.serving is not None:
        about = {name: serving[name] for name in ("digest", "command")}
        sources.append({"file": names[inputs.serving], "kind": "measurements", **about, "inputs": {}})
    body = {
        "model": statistics.model.to_json(),
        "shape": {**asdict(statistics.shape), "layers": list(statistics.shape.layers)},
        "score": score,
        "scenarios": importance(statistics, score),
        "plans": [_plan_row(each, statistics, score, evaluations) for each in plans],
        "overlap": _overlap(plans),
        "evaluations": evaluations,
        "serving": serving,
        "sources": sources,
    }
    return {**body, "findings": findings(body), "missing": missing(body)}


def short_names(paths: Sequence[Path]) -> dict[Path, str]:
    """What a report calls its files: their names, with the folder's where names are equal. Raises PlanError
    for a file that is given twice, or two that even so have one name.
    """
    plain = [path.name for path in paths]
    names = [
        name if plain.count(name) == 1 else f"{path.absolute().parent.name}/{name}"
        for path, name in zip(paths, plain, strict=True)
    ]
    for name in names:
        if names.count(name) > 1:
            raise PlanError(f"{name}: given twice, or two files of one name in folders of one name")
    return dict(zip(paths, names, strict=True))


def _optional(path: Path | None) -> list[Path]:
    return [] if path is None else [path]


def _plans(paths: Sequence[Path], names: Mapping[Path, str], statistics: Statistics) -> list[_Plan]:
    found = [(names[path], documents.load(path, PLAN_KIND), PlanFile.load(path)) for path in paths]
    for file, document, plan in found:
        statistics.model.check(plan.model, file)
        if plan.statistics != statistics.digest:
            raise PlanError(
                f"{file}: made from other statistics ({plan.statistics[:12]}, given are "
                f"{statistics.digest[:12]}); plan again, or give --statistics its own"
            )
        twice = [other for other, known, _ in found if known.digest == document.digest and other != file]
        if twice:
            raise PlanError(f"{file} and {twice[0]} are the same plan")
    scenarios = [plan.name for _, _, plan in found]
    return [
        _Plan(plan.name if scenarios.count(plan.name) == 1 else f"{plan.name} ({file})", file, document, plan)
        for file, document, plan in found
    ]


def _evaluations(
    paths: Sequence[Path], names: Mapping[Path, str], plans: Sequence[_Plan]
) -> tuple[list[dict[str, Any]], dict[str, Document]]:
    by_digest = {each.document.digest: each for each in plans}
    rows, found = [], {}
    for path in paths:
        document = documents.load(path, EVALUATION_KIND)
        body, name = document.body, names[path]
        try:
            plan = by_digest.get(body["plan"])
            if plan is None:
                raise PlanError(f"{name}: evaluates the plan {body['plan'][:12]}, which is not among --plan")
            rows.append(_evaluation(body, plan, name))
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"{name}: not an evaluation of this version: {error!r}") from error
        found[name] = document
    plans_seen = [row["plan"] for row in rows]
    for row in rows:
        alone = plans_seen.count(row["plan"]) == 1
        row["label"] = row["plan"] if alone else f"{row['plan']} ({row['file']})"
    return rows, found


def _evaluation(body: Mapping[str, Any], plan: _Plan, file: str) -> dict[str, Any]:
    if body["mask_digest"] != plan.plan.mask.digest:
        raise PlanError(f"{file}: its mask is not the one of {plan.file}")
    sets = [
        {
            "name": found["name"],
            "in_scenario": bool(found["in_scenario"]),
            "digest": found["digest"],
            "divergence": _divergence(found["divergence"]),
            "answers": None if found["answers"] is None else dict(found["answers"]),
        }
        for found in body["sets"]
    ]
    return {
        "plan": plan.label,
        "file": file,
        "sets": sets,
        "baselines": {
            name: {mask: _divergence(found) for mask, found in masks.items()}
            for name, masks in body["baselines"].items()
        },
        "recovery": _recovery(body.get("recovery")),
        "limits": {name: float(value) for name, value in body["limits"].items()},
        "passed": bool(body["passed"]),
        "reasons": [str(reason) for reason in body["reasons"]],
    }


def _recovery(told: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What was tried to make up for missing experts; None where nothing was, as in older evaluations."""
    if told is None:
        return None
    sets = {
        name: {
            variant: {
                "divergence": _divergence(found["divergence"]),
                "change": None if "change" not in found else _interval(found["change"]),
                "answers": None if found["answers"] is None else dict(found["answers"]),
            }
            for variant, found in variants.items()
        }
        for name, variants in told["sets"].items()
    }
    tried = {
        each["kind"]: {"digest": each["digest"], "bytes": int(each["bytes"]), "helps": bool(each["helps"])}
        for each in told["tried"]
    }
    return {"applied": told["applied"], "tried": tried, "sets": sets}


def _divergence(found: Mapping[str, Any]) -> dict[str, Any]:
    intervals = {name: _interval(found[name]) for name in NUMBERS}
    return {**intervals, "tokens": int(found["tokens"]), "documents": int(found["documents"])}


def _interval(found: Mapping[str, Any]) -> dict[str, float]:
    return {part: float(found[part]) for part in ("value", "low", "high")}


def _plan_row(
    each: _Plan, statistics: Statistics, score: str, evaluations: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    plan = each.plan
    mine = [row for row in evaluations if row["plan"] == each.label]
    verdict = "not evaluated" if not mine else "passed" if all(row["passed"] for row in mine) else "refused"
    scenarios = list(plan.scenarios)
    return {
        "label": each.label,
        "file": each.file,
        "digest": each.document.digest,
        "mask_digest": plan.mask.digest,
        "scenarios": scenarios,
        "combine": plan.combine,
        "score": plan.score,
        "budget": dict(plan.budget),
        "experts": {"kept": plan.mask.num_kept, "all": sum(plan.mask.num_experts.values())},
        "kept": {str(layer): list(experts) for layer, experts in plan.mask.kept.items()},
        "bytes": dict(plan.num_bytes),
        "unseen": sum(map(len, plan.unseen.values())),
        "protected": sum(map(len, plan.protected.values())),
        "constraints": list(plan.constraints),
        "curve": [dict(point) for point in plan.curve],
        "share_kept": share_kept(statistics, score, scenarios, plan.mask),
        "verdict": verdict,
        "reasons": [reason for row in mine for reason in row["reasons"]],
    }


def _overlap(plans: Sequence[_Plan]) -> dict[str, Any]:
    """Jaccard: experts that both keep over experts that either keeps, over all layers."""
    masks = [each.plan.mask for each in plans]
    matrix = [
        [mine.intersection(theirs).num_kept / max(1, mine.union(theirs).num_kept) for theirs in masks]
        for mine in masks
    ]
    common = [[mine.intersection(theirs).num_kept for theirs in masks] for mine in masks]
    return {"plans": [each.label for each in plans], "jaccard": matrix, "common": common}


def _source(file: str, document: Document) -> dict[str, Any]:
    return {
        "file": file,
        "kind": document.kind,
        "digest": document.digest,
        "command": document.command,
        "inputs": dict(document.inputs),
    }


def _statistics_source(file: str, statistics: Statistics) -> dict[str, Any]:
    texts = {
        f"texts of {name}" + (f" {number}" if len(found.corpora) > 1 else ""): digest
        for name, found in sorted(statistics.scenarios.items())
        for number, digest in enumerate(found.corpora, start=1)
    }
    return {
        "file": file,
        "kind": "statistics",
        "digest": statistics.digest,
        "command": NO_COMMAND,
        "inputs": {"model weights": statistics.model.weights, **texts},
    }
