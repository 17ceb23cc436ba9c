"""``moe-experts export``: a plan -> a smaller checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from moe_runtime.errors import PlanError
from moe_runtime.experts import documents
from moe_runtime.experts.certificate import Certificate
from moe_runtime.experts.export import Provenance, export
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.statistics_file import load_statistics

TOLD_OF_PLAN = ("scenario", "combine", "score", "budget", "seed", "constraints", "curve", "text")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write the model that a plan leaves as a checkpoint of its own: experts that stay are copied byte "
        "for byte and renumbered, routers and biases lose the rows of the others, config.json says the new "
        "number. It appears complete or not at all, and nothing is written over. pruning_manifest.json in "
        "it says what was kept and why."
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the full model's folder")
    parser.add_argument("--plan", type=Path, required=True, metavar="FILE", help="of `moe-experts plan`")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new folder")
    parser.add_argument(
        "--certificate", type=Path, metavar="FILE", help="of this plan; its numbers go into the manifest"
    )
    parser.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="which the plan was made from; digests of its texts go into the manifest",
    )
    parser.add_argument(
        "--allow-non-uniform",
        action="store_true",
        help="export layers of unequal size, too, which moe_runtime alone can load",
    )
    parser.add_argument(
        "--ghost-router",
        action="store_true",
        help="keep the full routers beside the cut ones, to measure lost mass of the exported model",
    )


def run(arguments: argparse.Namespace) -> int:
    plan = PlanFile.load(arguments.plan)
    plan.model.check(ModelIdentity.of(arguments.model), f"the plan {arguments.plan.name}")
    mask = plan.mask
    provenance = _provenance(plan, arguments.statistics, arguments.certificate)
    done = export(
        arguments.model,
        mask,
        arguments.out,
        provenance,
        allow_non_uniform=arguments.allow_non_uniform,
        ghost_router=arguments.ghost_router,
    )
    body = done.manifest.body
    num_experts = sum(mask.num_experts.values())
    if arguments.json:
        found = {
            name: body[name] for name in ("bytes", "config", "files", "left_out", "notes", "mask_digest")
        }
        told = {"experts": num_experts, "experts_kept": mask.num_kept, "manifest": done.manifest.digest}
        print(json.dumps({"folder": arguments.out.name, **told, **found}))
        return 0
    size = body["bytes"]
    print(
        f"{arguments.out}: {mask.num_kept} of {num_experts} experts, {size['kept'] / 1e6:.1f} of "
        f"{size['full'] / 1e6:.1f} MB of weights"
    )
    for note in done.notes:
        print(note)
    if body["left_out"]:
        print(f"not copied: {', '.join(body['left_out'])}")
    return 0


def _provenance(plan: PlanFile, statistics: Path | None, certificate: Path | None) -> Provenance:
    """Raises PlanError for statistics of another plan and a certificate that does not hold."""
    body: dict[str, Any] = {
        "model": plan.model.to_json(),
        **{name: plan.to_json()[name] for name in TOLD_OF_PLAN},
        "plan": plan.digest,
        "calibration": None,
        "certificate": None,
    }
    inputs = {"plan": plan.digest, "statistics": plan.statistics, "weights": plan.model.weights}
    if statistics is not None:
        found = load_statistics(statistics)
        if found.digest != plan.statistics:
            raise PlanError(f"the plan was made from other statistics than {statistics.name}")
        body["calibration"] = {name: list(each.corpora) for name, each in found.scenarios.items()}
    if certificate is not None:
        inputs["certificate"] = documents.load(certificate, "certificate").digest
        body["certificate"] = _measured(Certificate.load(certificate), certificate.name, plan)
    return Provenance(body, inputs)


def _measured(certificate: Certificate, name: str, plan: PlanFile) -> dict[str, Any]:
    reasons = certificate.check(plan.digest, plan.mask.digest, plan.model.to_json())
    if reasons:
        raise PlanError(
            f"the certificate {name} does not hold: {'; '.join(reasons)}. Run `moe-experts evaluate` again, "
            "or export without --certificate"
        )
    if certificate.applied_recovery is not None:
        raise PlanError(
            f"the certificate {name} holds with a recovery alone, which no export carries. Run `moe-experts "
            "evaluate` without --recovery, or export without --certificate"
        )
    return {part: dict(getattr(certificate, part)) for part in ("budget", "measured", "test")}
