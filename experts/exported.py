"""An exported checkpoint that kept its full router (`moe-experts export --ghost-router`), served as the one
scenario that it is.

    <export>/pruning_manifest.json                 what it was cut from and what was kept (export.py)
    <export>/pruning/ghost_router.safetensors      the routers' rows of all experts
    <export>/pruning/policy.json                   optional: as a scenario's, see registry.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.errors import PlanError
from moe_runtime.experts import documents
from moe_runtime.experts.export import GHOST_ROUTER, MANIFEST, MANIFEST_KIND
from moe_runtime.experts.file_digests import file_digests
from moe_runtime.experts.registry import POLICY, Scenario, read_policy
from moe_runtime.ghost_router import GhostRouter
from moe_runtime.plan import ExpertMask

UNNAMED = "exported"


@dataclass(frozen=True)
class Exported:
    """``scenario``: its mask is of the uncut model, as which ``ghosts`` let the checkpoint be read."""

    scenario: Scenario
    ghosts: GhostRouter


def open_exported(model_dir: Path) -> Exported | None:
    """None for a folder that is no export, or one without its full router. Raises PlanError for a manifest or
    a policy that cannot be used, and for a router that is not what was exported.
    """
    path = model_dir / GHOST_ROUTER
    if not path.exists():
        return None
    manifest = documents.load(model_dir / MANIFEST, MANIFEST_KIND)
    body = manifest.body
    try:
        if file_digests([path])[0] != body["files"][GHOST_ROUTER]:
            raise PlanError(f"{GHOST_ROUTER} is not the file that {MANIFEST} lists; export again")
        mask = ExpertMask.from_json(body["mask"])
        ghosts = GhostRouter(mask, {name: old for name, (old, _) in body["config"].items()}, path)
        scenario = Scenario(
            name=_name(body.get("scenario")),
            mask=mask,
            plan_digest=body.get("plan", ""),
            bytes_full=body["bytes"]["full"],
            bytes_kept=body["bytes"]["kept"],
            policy=read_policy(path.parent / POLICY),
            certificate=None,
            objections=() if body.get("certificate") else ("it was exported without a certificate",),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"{MANIFEST}: not a manifest of `moe-experts export`: {error!r}") from error
    return Exported(scenario, ghosts)


def _name(scenario: Any) -> str:
    names = [scenario] if isinstance(scenario, str) else list(scenario or [UNNAMED])
    return " + ".join(map(str, names))
