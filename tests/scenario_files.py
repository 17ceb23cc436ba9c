"""Folders of scenarios as `moe-experts plan` and `evaluate` leave them, for tests of who reads them."""

import json
from pathlib import Path
from typing import Any

import torch

from moe_runtime.experts.certificate import Certificate
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.recovery_file import RecoveryFile
from moe_runtime.hf_config import read_json
from moe_runtime.plan import ExpertMask, LayerMask
from moe_runtime.recovery import Kind, Recovery


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


def some_recovery(model_dir: Path, mask: ExpertMask, kind: Kind, seed: int = 0) -> Recovery:
    """Random numbers that an answer cannot miss."""
    hidden = read_json(model_dir / "config.json")["hidden_size"]
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for layer in mask.layers:
        size = (layer.num_experts - len(layer.kept), hidden) if kind == "constants" else (layer.num_experts,)
        layers[layer.layer] = 3 * torch.randn(size, generator=generator)
        if kind == "router":
            layers[layer.layer][[each not in layer.kept for each in range(layer.num_experts)]] = 0
    return Recovery(kind, layers)


def write_recovery(
    folder: Path, model_dir: Path, name: str, kind: Kind, *, applied: bool = True, seed: int = 0
) -> RecoveryFile:
    """``<folder>/<name>/recovery.safetensors`` for the plan that is there, and a certificate that applies it
    or says that it does not help.
    """
    plan = PlanFile.load(folder / name / "plan.json")
    numbers = some_recovery(model_dir, plan.mask, kind, seed)
    made = RecoveryFile(numbers, plan.digest, plan.mask.digest, plan.model, {})
    saved = made.save(folder / name / "recovery.safetensors")
    tried = {"kind": kind, "digest": saved.digest, "bytes": saved.num_bytes, "helps": applied, "change": {}}
    told = {"applied": kind if applied else None, "tried": [tried]}
    write_certificate(folder, model_dir, name, plan, recovery=told)
    return saved


def write_scenario(
    folder: Path, model_dir: Path, name: str, mask: ExpertMask, policy: dict[str, Any] | None = None
) -> None:
    """A whole one, certified."""
    plan = write_plan(folder, model_dir, name, mask)
    write_certificate(folder, model_dir, name, plan)
    if policy is not None:
        (folder / name / "policy.json").write_text(json.dumps(policy))
