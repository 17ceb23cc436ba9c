"""``moe-experts evaluate`` and ``simulate``: what a plan costs on held-out texts; nothing is cut."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_runtime.errors import ConfigError, PlanError
from moe_runtime.experts import documents
from moe_runtime.experts.certificate import Certificate
from moe_runtime.experts.corpus import Corpus, read_corpora
from moe_runtime.experts.corpus_text import Renderer
from moe_runtime.experts.evaluation import (
    Limits,
    baselines,
    objections,
    planning_fingerprints,
    require_apart,
    require_enough,
)
from moe_runtime.experts.evaluation_sets import Amounts, SetsOfTexts
from moe_runtime.experts.intervals import MIN_DOCUMENTS
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.options import add_engine_arguments, engine_config, read_planned
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.recovery_file import RecoveryFile
from moe_runtime.experts.recovery_trial import read_recoveries
from moe_runtime.experts.statistics import Statistics
from moe_runtime.placement import readable_bytes

KIND = "evaluation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare the full model with itself under a plan's mask, on texts that the plan has not seen: KL "
        "divergence with 95 % intervals, whole answers, other scenarios (the blast radius), random masks and "
        "every other score at equal bytes. With --recovery also with what makes up for missing experts: it "
        "is applied only where it lowers the KL beyond doubt; all numbers then hold with it. Exit status 2 "
        "when the plan costs more than its limits."
    )
    parser.add_argument(
        "texts",
        nargs="+",
        metavar="TEXT",
        help="test texts as `profile` takes them, by scenario; those of the plan's scenario decide, all "
        'others are told. {"messages": [...], "answer": "..."} lines are questions to be answered',
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--plan", type=Path, required=True, metavar="FILE")
    parser.add_argument("--statistics", type=Path, required=True, metavar="FILE", help="the plan's")
    parser.add_argument(
        "--recovery",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="of `recover`, one of each kind: the best is applied, if the change of mean KL that it makes on "
        f"the scenario's texts ({MIN_DOCUMENTS} documents at least) is below 0 with its whole 95 %% interval",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the evaluation, as a JSON document")
    parser.add_argument("--certificate", type=Path, metavar="FILE", help="what the server asks for")
    limits = Limits()
    parser.add_argument(
        "--max-kl", type=float, default=limits.kl_mean, help="nats, mean (default %(default)s)"
    )
    parser.add_argument("--max-kl-p99", type=float, default=limits.kl_p99, help="nats (default %(default)s)")
    parser.add_argument(
        "--max-match-loss",
        type=float,
        default=limits.match_loss,
        help="of right answers (default %(default)s)",
    )
    parser.add_argument(
        "--max-loop-rise",
        type=float,
        default=limits.loop_rise,
        help="of looping answers (default %(default)s)",
    )
    parser.add_argument("--max-answers", type=int, default=200, help="per set of texts (default %(default)s)")
    parser.add_argument("--answer-tokens", type=int, default=128, help="of one answer (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, help="of test text per set (default: all)")
    parser.add_argument("--no-baselines", action="store_true", help="leave out random and other scores")
    parser.add_argument("--seed", type=int, default=0, help="of order and intervals (default %(default)s)")
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    limits = Limits(arguments.max_kl, arguments.max_kl_p99, arguments.max_match_loss, arguments.max_loop_rise)
    plan, statistics, identity = _inputs(arguments)
    corpora = read_corpora(
        arguments.texts,
        Renderer.load(arguments.model),
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
    )
    own = [corpus.scenario for corpus in corpora if corpus.scenario in plan.scenarios]
    if not own:
        raise PlanError(
            f"no test text of the plan's scenario {plan.name!r} among {[c.scenario for c in corpora]}; name "
            f"one with {plan.scenarios[0]}=PATH"
        )
    require_apart(corpora, planning_fingerprints(statistics, plan))
    if arguments.certificate is not None:
        require_enough([corpus for corpus in corpora if corpus.scenario in own])
    files = read_recoveries(arguments.recovery, plan, corpora)
    body = _measure(arguments, plan, statistics, corpora, own, files)
    reasons = objections([found for found in body["sets"] if found["in_scenario"]], limits)
    body |= {"limits": asdict(limits), "passed": not reasons, "reasons": reasons, "model": identity.to_json()}
    inputs = {"plan": plan.digest, "statistics": statistics.digest}
    inputs |= {f"recovery ({kind})": file.digest for kind, file in files.items()}
    if arguments.out is not None:
        documents.save(arguments.out, KIND, body, inputs)
    if arguments.certificate is not None:
        _certificate(plan, identity, body, limits, corpora).save(arguments.certificate, inputs)
    print(json.dumps(body) if arguments.json else _table(body))
    return 0 if body["passed"] else 2


def _inputs(arguments: argparse.Namespace) -> tuple[PlanFile, Statistics, ModelIdentity]:
    for name in ("max_kl", "max_kl_p99", "max_answers", "answer_tokens"):
        if not getattr(arguments, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: must be above 0")
    return read_planned(arguments)


def _measure(
    arguments: argparse.Namespace,
    plan: PlanFile,
    statistics: Statistics,
    corpora: Sequence[Corpus],
    own: Sequence[str],
    files: Mapping[str, RecoveryFile],
) -> dict[str, Any]:
    amounts = Amounts(arguments.max_answers, arguments.answer_tokens, arguments.seed)
    texts = SetsOfTexts(arguments.model, engine_config(arguments), plan.mask, amounts)
    others = {} if arguments.no_baselines else baselines(statistics, plan.scenarios, plan.mask)
    return {
        "scenario": plan.scenario if isinstance(plan.scenario, str) else list(plan.scenario),
        "plan": plan.digest,
        "mask_digest": plan.mask.digest,
        "experts": {"kept": plan.mask.num_kept, "all": sum(plan.mask.num_experts.values())},
        "bytes": dict(plan.num_bytes),
        **texts.measure(corpora, own, files, others),
    }


def _certificate(
    plan: PlanFile,
    identity: ModelIdentity,
    body: Mapping[str, Any],
    limits: Limits,
    corpora: Sequence[Corpus],
) -> Certificate:
    """Of several sets of the plan's own scenarios the worst number counts."""
    own = [found for found in body["sets"] if found["in_scenario"]]

    def worst(name: str, part: str) -> float:
        return max(float(found["divergence"][name][part]) for found in own)

    return Certificate(
        scenario=plan.scenario,
        plan=plan.digest,
        mask_digest=plan.mask.digest,
        model=identity.to_json(),
        budget={"kl_mean": limits.kl_mean, "kl_p99": limits.kl_p99},
        passed=body["passed"],
        reasons=tuple(body["reasons"]),
        measured={
            "kl_mean": worst("kl_mean", "high"),
            "kl_p99": worst("kl_p99", "value"),
            "sets": {found["name"]: found["answers"] for found in own},
        },
        test={corpus.scenario: corpus.digest for corpus in corpora},
        recovery=None
        if body["recovery"] is None
        else {name: body["recovery"][name] for name in ("applied", "tried")},
    )


def _table(body: Mapping[str, Any]) -> str:
    experts, sizes = body["experts"], body["bytes"]
    lines = [
        f"{body['scenario']}: {experts['kept']} of {experts['all']} experts, {sizes['kept'] / 1e6:.1f} of "
        f"{sizes['full'] / 1e6:.1f} MB",
        f"{'texts':<22}{'mean KL (95 %)':<27}{'p99 KL':>8}{'top-1':>8}{'NLL':>9}"
        f"{'right, full':>13}{'masked':>8}{'loops':>8}",
    ]
    lines += [
        _row(found["name"], found["divergence"], found["answers"], found["in_scenario"])
        for found in body["sets"]
    ]
    for scenario, masks in body["baselines"].items():
        lines.append(f"at equal bytes, on {scenario}:")
        lines += [_row(name, found, None, False) for name, found in sorted(masks.items(), key=_by_kl)]
    if body["recovery"] is not None:
        lines += _recovery_lines(body["recovery"])
    lines.append("passed" if body["passed"] else "REFUSED: " + "; ".join(body["reasons"]))
    return "\n".join(lines)


def _recovery_lines(told: Mapping[str, Any]) -> list[str]:
    lines = []
    for scenario, variants in told["sets"].items():
        lines.append(f"the plan alone and with a recovery, on {scenario}:")
        lines += [
            _row(name, found["divergence"], found["answers"], False) for name, found in variants.items()
        ]
        for tried in told["tried"]:
            change = tried["change"][scenario]
            lines.append(
                f"{tried['kind']} changes the mean KL by {change['value']:+.4f} ({change['low']:+.4f} to "
                f"{change['high']:+.4f}), {readable_bytes(tried['bytes'])}"
                + ("" if tried["helps"] else _why_not(variants[tried["kind"]]["divergence"]["documents"]))
            )
    applied = told["applied"]
    lines.append(
        "no recovery is applied"
        if applied is None
        else f"applied, and in all numbers above: {applied} (a server wants that file as "
        "recovery.safetensors beside the plan)"
    )
    return lines


def _why_not(documents: int) -> str:
    if documents < MIN_DOCUMENTS:
        return f": {documents} documents are too few to tell, {MIN_DOCUMENTS} are needed"
    return ": does not help"


def _by_kl(row: tuple[str, Mapping[str, Any]]) -> float:
    return float(row[1]["kl_mean"]["value"])


def _row(name: str, divergence: Mapping[str, Any], answers: Mapping[str, Any] | None, own: bool) -> str:
    kl, match = divergence["kl_mean"], (answers or {}).get("exact_match")
    ends = f"{answers['loop_rate']['masked']:>8.1%}" if answers else ""
    right = f"{match['full']:>13.1%}{match['masked']:>8.1%}" if match else f"{'':>21}"
    interval = f"{kl['value']:.4f} ({kl['low']:.4f}-{kl['high']:.4f})"
    return (
        f"{name + (' *' if own else ''):<22}{interval:<27}{divergence['kl_p99']['value']:>8.3f}"
        f"{divergence['top1']['value']:>8.1%}{divergence['nll_change']['value']:>+9.4f}{right}{ends}"
    )
