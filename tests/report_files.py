"""Statistics, plans and evaluations of an invented model, as files, and the report of them: for its tests."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from moe_runtime.experts import commands_report, documents
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.statistics import NUM_BUCKETS, ScenarioStatistics, Shape, Statistics
from moe_runtime.experts.statistics_file import save_statistics
from moe_runtime.plan import ExpertMask, LayerMask

LAYERS, EXPERTS, HIDDEN = (1, 2), 6, 3
MODEL = ModelIdentity("a" * 64, "b" * 64, "c" * 64)
HOSTILE = "<script>alert('x')</script>|`$\\frac$ & 理财"
KEPT = {"credit": ((0, 1, 2), (0, 2, 4)), "wealth": ((2, 3, 4), (0, 2, 5))}


def sums(seed: int) -> ScenarioStatistics:
    generator = torch.Generator().manual_seed(seed)
    plain = (len(LAYERS), EXPERTS)

    def real(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    counts = torch.full(plain, 10)
    counts[0, 5] = 0
    return ScenarioStatistics(
        counts=counts,
        answer_counts=counts.clone(),
        documents_seen=counts.clone(),
        gate=real(*plain),
        norm=real(*plain),
        norm_squared=real(*plain),
        gate_norm=real(*plain),
        gate_norm_turn=real(*plain),
        peak=real(*plain),
        outputs=real(*plain, HIDDEN),
        pairs=torch.zeros(*plain, EXPERTS, dtype=torch.int64),
        tail=torch.zeros(*plain, NUM_BUCKETS, dtype=torch.int64),
        sample_keys=torch.zeros(0, dtype=torch.int64),
        sample_experts=torch.zeros(0, len(LAYERS), 2, dtype=torch.int32),
        sample_weights=torch.zeros(0, len(LAYERS), 2),
        fingerprints=torch.zeros(0, dtype=torch.int64),
        num_documents=7,
        num_tokens=321,
        corpora=(f"{seed}" * 64,),
    )


def statistics_file(folder: Path, names: list[str], model: ModelIdentity = MODEL) -> Statistics:
    shape = Shape(LAYERS, EXPERTS, 2, 1, 1, HIDDEN, "plain")
    scenarios = {name: sums(seed) for seed, name in enumerate(names, start=1)}
    return save_statistics(folder / "all.stats.safetensors", Statistics(model, shape, scenarios))


def plan_file(path: Path, statistics: Statistics, name: str, kept: Any, **changes: Any) -> PlanFile:
    layers = [LayerMask(layer, EXPERTS, ids) for layer, ids in zip(LAYERS, kept, strict=True)]
    curve = [
        {"kept": 6, "bytes": 600, "kl_mean": 0.0312, "kl_p99": 0.4, "top1": 0.97, "within": True},
        {"kept": 4, "bytes": 450, "kl_mean": 0.0911, "kl_p99": 1.4, "top1": 0.90, "within": False},
    ]
    plan = PlanFile(
        scenario=name,
        mask=ExpertMask(tuple(layers)),
        model=statistics.model,
        statistics=statistics.digest,
        score="easy_ep",
        seed=0,
        budget={"keep": 3, "max_kl": 0.05},
        combine="one",
        constraints=(),
        unseen={1: (5,)},
        protected={},
        order={},
        curve=tuple(curve),
        num_bytes={"full": 1000, "kept": 600},
        text={},
    )
    path.parent.mkdir(exist_ok=True)
    replace(plan, **changes).save(path)
    return PlanFile.load(path)


def divergence(kl: float) -> dict[str, Any]:
    around = {"low": kl * 0.875, "high": kl * 1.125}
    return {
        "kl_mean": {"value": kl, **around},
        "kl_p95": {"value": 4 * kl, "low": kl, "high": 5 * kl},
        "kl_p99": {"value": 8 * kl, "low": kl, "high": 9 * kl},
        "top1": {"value": 0.96875, "low": 0.9, "high": 1.0},
        "nll_change": {"value": kl / 2, "low": 0.0, "high": kl},
        "tokens": 4321,
        "documents": 17,
    }


def answers(full: float, masked: float) -> dict[str, Any]:
    pair = {"full": 0.0, "masked": 0.125}
    match = {"questions": 16, "full": full, "masked": masked, "right_to_wrong": 3, "wrong_to_right": 1}
    return {
        "answers": 16, "loop_rate": pair, "natural_end": pair, "length_ratio": 1.25, "same_text": 0.5,
        "failed": 0, "exact_match": match,
    }  # fmt: skip


def evaluation_file(path: Path, plan: PlanFile, passed: bool = True, **changes: Any) -> None:
    others = [name for name in KEPT if name != plan.name]
    sets = [
        {"name": name, "in_scenario": name == plan.name, "digest": "9" * 64, "divergence": divergence(kl),
         "answers": answers(0.9375, masked)}
        for name, kl, masked in ((plan.name, 0.0314159, 0.875), (others[0], 1.2345, 0.0625))
    ]  # fmt: skip
    body = {
        "scenario": plan.name,
        "plan": plan.digest,
        "mask_digest": plan.mask.digest,
        "experts": {"kept": 6, "all": 12},
        "bytes": dict(plan.num_bytes),
        "sets": sets,
        "baselines": {plan.name: {"random 1": divergence(0.777), "frequency": divergence(0.0271828)}},
        "limits": {"kl_mean": 0.05, "kl_p99": 1.0, "match_loss": 0.01, "loop_rise": 0.01},
        "passed": passed,
        "reasons": [] if passed else [f"{plan.name}: 87.5% of the answers are right"],
        "model": plan.model.to_json(),
        **changes,
    }
    documents.save(path, "evaluation", body, {"plan": plan.digest})


def whole(folder: Path, names: list[str]) -> list[str]:
    """Files of two scenarios; the command's arguments for them."""
    statistics = statistics_file(folder, names)
    for number, (name, kept) in enumerate(zip(names, KEPT.values(), strict=True)):
        plan = plan_file(folder / f"p{number}" / "plan.json", statistics, name, kept)
        evaluation_file(folder / f"p{number}" / "evaluation.json", plan, passed=number == 0)
    (folder / "speed.json").write_text(json.dumps(SPEED))
    return [
        "--statistics", str(folder / "all.stats.safetensors"),
        "--plan", *(str(folder / f"p{number}" / "plan.json") for number in (0, 1)),
        "--evaluation", *(str(folder / f"p{number}" / "evaluation.json") for number in (0, 1)),
        "--serving", str(folder / "speed.json"),
    ]  # fmt: skip


SPEED = {
    "machine": {"cpu": "some <cpu>", "isa": ["avx2"], "command": "not this one"},
    "command": "bench/scenarios.py MODEL SCENARIOS",
    "rows": [
        {"way": "full", "rss_bytes": 4e8, "start_s": 3.0, "tokens_per_s": {"1": 40.0, "8": 100.0}},
        {"way": "physical", "scenario": "credit", "bytes": 2e8, "tokens_per_s": {"1": 50.0, "8": 150.0}},
    ],
}


def report(arguments: list[str], out: Path) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    commands_report.add_arguments(parser)
    parser.add_argument("--json", action="store_true")
    assert commands_report.run(parser.parse_args([*arguments, "--out", str(out)])) == 0
    found: dict[str, Any] = json.loads((out / "report.json").read_bytes())["body"]
    return found
