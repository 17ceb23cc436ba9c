"""``moe-experts policy``: a scenario's own prompts -> the threshold of its policy.json."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

from moe_runtime.drift_policy import Action, DriftPolicy
from moe_runtime.engine import Engine
from moe_runtime.errors import ConfigError, PlanError
from moe_runtime.experts.certificate import Certificate
from moe_runtime.experts.corpus import Corpus, read_corpora
from moe_runtime.experts.corpus_text import Renderer
from moe_runtime.experts.drift import read_log
from moe_runtime.experts.evaluation import planning_fingerprints, require_apart
from moe_runtime.experts.options import add_engine_arguments, engine_config, read_planned
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.progress import Progress
from moe_runtime.experts.prompt_masses import prompt_masses
from moe_runtime.experts.recovery_file import RecoveryFile
from moe_runtime.experts.registry import CERTIFICATE, RECOVERY
from moe_runtime.experts.threshold import CONFIDENCE, RATE, Detected, Threshold, detect, propose
from moe_runtime.experts.whole_file import replacing
from moe_runtime.recovery import Recovery

MODEL_FLAGS = ("model", "plan", "statistics")  # all are needed for texts


@dataclass(frozen=True)
class Masses:
    """Lost masses of prompts under a scenario's mask: its own, and others' by their name."""

    scenario: str
    own: Sequence[float]
    foreign: Mapping[str, Sequence[float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Propose the lost mass above which a scenario's policy acts: the lowest that at most a stated share "
        "of the scenario's own prompts is above, whatever their distribution. From a --log of its own "
        "traffic, or from texts that its plan has not seen; texts of other names are told how many of their "
        "prompts are found."
    )
    parser.add_argument(
        "texts",
        nargs="*",
        metavar="TEXT",
        help="as for `evaluate`: those of the plan's scenario are its own prompts, all others foreign. A "
        "conversation is asked up to its last answer, a text is read whole",
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="for texts: the model's folder")
    parser.add_argument("--plan", type=Path, metavar="FILE", help="for texts: the scenario's plan")
    parser.add_argument("--statistics", type=Path, metavar="FILE", help="for texts: the plan's")
    parser.add_argument(
        "--recovery", type=Path, metavar="FILE", help="for texts: the recovery that the scenario applies"
    )
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="the --drift-log of a server with the scenario's own traffic"
    )
    parser.add_argument("--scenario", help="of the log (default: the only one in it)")
    parser.add_argument(
        "--foreign-log",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="such a log of other prompts that were sent to the scenario; repeatable",
    )
    parser.add_argument(
        "--false-alarms",
        type=float,
        default=RATE,
        metavar="SHARE",
        help="own prompts that may be above the threshold, 0 to 1 (default: %(default)s)",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        default=CONFIDENCE,
        help="that no more of them will be (default: %(default)s)",
    )
    parser.add_argument(
        "--action",
        choices=get_args(Action),
        default="flag",
        help="what the server does above it (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="write the policy there: policy.json in the scenario's folder",
    )
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    masses = _of_log(arguments) if arguments.log is not None else _of_texts(arguments)
    try:
        found = propose(masses.own, arguments.false_alarms, arguments.confidence)
    except PlanError as error:
        raise PlanError(f"scenario {masses.scenario!r}: {error}") from error
    detected = {name: detect(each, found.threshold) for name, each in masses.foreign.items()}
    policy = DriftPolicy(found.threshold, arguments.action)
    if arguments.out is not None:
        with replacing(arguments.out) as file:
            file.write(json.dumps(asdict(policy)).encode() + b"\n")
    if arguments.json:
        told = {name: asdict(each) for name, each in detected.items()}
        body = {"scenario": masses.scenario, "policy": asdict(policy), **asdict(found), "detected": told}
        print(json.dumps(body))
    else:
        print(_told(masses, found, detected, policy))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    given = [f"--{name}" for name in MODEL_FLAGS if getattr(arguments, name) is not None]
    if arguments.log is not None:
        if arguments.recovery is not None:
            given.append("--recovery")
        if given or arguments.texts:
            raise ConfigError(
                f"--log says all there is to know; leave out {given[0] if given else 'the texts'}"
            )
        return
    if arguments.foreign_log or arguments.scenario is not None:
        raise ConfigError("--foreign-log and --scenario belong to --log")
    if not arguments.texts or len(given) < len(MODEL_FLAGS):
        raise ConfigError(
            "name a --log of the scenario's own traffic, or --model, --plan, --statistics and texts"
        )


def _of_log(arguments: argparse.Namespace) -> Masses:
    own: dict[str, list[float]] = {}
    for each in read_log(arguments.log, arguments.scenario):
        own.setdefault(each.scenario, []).append(each.lost_mass)
    if len(own) != 1:
        there = ", ".join(sorted(own)) or "no prompt of such a scenario"
        raise PlanError(f"{arguments.log.name} has {there}; --scenario chooses one")
    scenario, masses = own.popitem()
    return Masses(scenario, masses, _of_foreign_logs(arguments.foreign_log, scenario))


def _of_foreign_logs(paths: Sequence[Path], scenario: str) -> dict[str, list[float]]:
    """By the log's name without its suffix."""
    files: dict[str, Path] = {}
    for path in paths:
        other = files.setdefault(path.stem, path)
        if other is not path:
            raise ConfigError(
                f"--foreign-log {path}: {other} is called {path.stem!r} as well; rename one of them"
            )
    foreign = {name: [each.lost_mass for each in read_log(path, scenario)] for name, path in files.items()}
    for name, masses in foreign.items():
        if not masses:
            raise PlanError(f"{files[name]}: there is no foreign prompt to detect: none of {scenario!r}")
    return foreign


def _of_texts(arguments: argparse.Namespace) -> Masses:
    plan, statistics, _ = read_planned(arguments)
    if arguments.recovery is None:
        _require_plan_alone(arguments.plan, plan)
    corpora = read_corpora(arguments.texts, Renderer.load(arguments.model))
    own = [corpus for corpus in corpora if corpus.scenario in plan.scenarios]
    if not own:
        raise PlanError(
            f"no text of the plan's scenario {plan.name!r} among {[c.scenario for c in corpora]}; name one "
            f"with {plan.scenarios[0]}=PATH"
        )
    require_apart(own, planning_fingerprints(statistics, plan))
    path = arguments.recovery
    recovery = None if path is None else RecoveryFile.load(path, plan).recovery
    engine = Engine.load(arguments.model, engine_config(arguments))
    masses = {corpus.scenario: _measured(engine, plan, recovery, corpus) for corpus in corpora}
    mine = [mass for corpus in own for mass in masses.pop(corpus.scenario)]
    return Masses(plan.name, mine, masses)


def _require_plan_alone(path: Path, plan: PlanFile) -> None:
    """Raises PlanError where a server would apply the recovery that lies beside the plan at ``path``: what
    is measured without it would be of something that nobody serves.
    """
    recovery, certificate = path.with_name(RECOVERY), path.with_name(CERTIFICATE)
    if not (recovery.exists() and certificate.exists()):
        return
    held = Certificate.load(certificate)
    if held.plan == plan.digest and held.applied_recovery is not None:
        raise PlanError(
            f"{certificate} applies {RECOVERY}, so a server has other lost masses than {path.name} alone; "
            f"add --recovery {recovery}"
        )


def _measured(engine: Engine, plan: PlanFile, recovery: Recovery | None, corpus: Corpus) -> list[float]:
    prompts = [text.rendered.prompt_ids or text.token_ids for text in corpus.texts]
    with Progress(f"{corpus.scenario}: lost mass", len(prompts), "prompts") as progress:
        return prompt_masses(engine, plan.mask, prompts, progress.advance, recovery)


def _told(masses: Masses, found: Threshold, detected: Mapping[str, Detected], policy: DriftPolicy) -> str:
    mean = sum(masses.own) / len(masses.own)
    lines = [
        f"{masses.scenario}: own prompts have a lost mass of {mean:.4f} in the mean, {max(masses.own):.4f} "
        f"at most; {found.num_above} of {found.num_prompts} are above {found.threshold:g}",
        f"of own prompts to come {found.expected_rate:.2%} are expected above it, and at most "
        f"{found.rate:.2%} with {found.confidence:.0%} confidence",
    ]
    lines += [
        f"{name}: {each.num_above} of {each.num_prompts} prompts are above it, {each.share:.1%} "
        f"({each.low:.1%} to {each.high:.1%})"
        for name, each in detected.items()
    ]
    return "\n".join([*lines, json.dumps(asdict(policy))])
