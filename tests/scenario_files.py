"""Folders of scenarios as `moe-experts plan` and `evaluate` leave them, for tests of who reads them."""

import json
from pathlib import Path
from typing import Any

import torch

from moe_runtime.experts.certificate import Certificate
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.hf_config import read_json
from moe_runtime.plan import ExpertMask, LayerMask


def some_mask(model_dir: Path, kept: int, seed: int) -> ExpertMask:
    """``kept`` random experts of each layer of a qwen3_moe checkpoint."""
    config = read_json(model_dir / "config.json")
    generator = torch.Generator().manual_seed(seed)
    return ExpertMask(
        tuple(
            LayerMask(
                layer,
                config["num_experts"],
                tuple(sorted(torch.randperm(config["num_experts"], generator=generator)[:kept].tolist())),
            )
            for layer in range(config["num_hidden_layers"])
        )
    )


def write_plan(folder: Path, model_dir: Path, name: str, mask: ExpertMask) -> PlanFile:
    """``<folder>/<name>/plan.json``."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    plan = PlanFile(
        scenario=name,
        mask=mask,
        model=ModelIdentity.of(model_dir),
        statistics="0" * 64,
        score="easy_ep",
        seed=0,
        budget={"keep": 3},
        combine="one",
        constraints=(),
        unseen={},
        protected={},
        order={},
        curve=(),
        num_bytes={"full": 1000, "kept": 600},
        text={},
    )
    plan.save(folder / name / "plan.json")
    return PlanFile.load(folder / name / "plan.json")


def write_certificate(
    folder: Path, model_dir: Path, name: str, plan: PlanFile, **changes: Any
) -> Certificate:
    """``<folder>/<name>/certificate.json``, of a plan that passed unless ``changes`` say otherwise."""
    fields = {
        "scenario": name,
        "plan": plan.digest,
        "mask_digest": plan.mask.digest,
        "model": ModelIdentity.of(model_dir).to_json(),
        "budget": {"kl_mean": 0.05, "kl_p99": 0.5},
        "passed": True,
        "reasons": (),
        "measured": {"kl_mean": 0.02, "kl_p99": 0.3},
        "test": {"credit.jsonl": "0" * 64},
        **changes,
    }
    certificate = Certificate(**fields)
    certificate.save(folder / name / "certificate.json", {"plan": plan.digest})
    return certificate


def write_scenario(
    folder: Path, model_dir: Path, name: str, mask: ExpertMask, policy: dict[str, Any] | None = None
) -> None:
    """A whole one, certified."""
    plan = write_plan(folder, model_dir, name, mask)
    write_certificate(folder, model_dir, name, plan)
    if policy is not None:
        (folder / name / "policy.json").write_text(json.dumps(policy))
