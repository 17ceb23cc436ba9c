"""``moe-experts plan``: statistics and a budget -> the experts that a scenario keeps."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moe_runtime.cli import parse_bytes
from moe_runtime.errors import ConfigError, PlanError
from moe_runtime.experts.budget import DEFAULT_KL_MEAN, DEFAULT_KL_P99, Limits
from moe_runtime.experts.corpus import Corpus, find_texts_of, read_corpus
from moe_runtime.experts.corpus_text import Renderer
from moe_runtime.experts.forward import Runner
from moe_runtime.experts.model_bytes import ModelBytes
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.options import add_engine_arguments, engine_config
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.planning import KlBudget, Outcome, Wish, plan_by_count, plan_by_kl, rules_of
from moe_runtime.experts.protect import read_protected
from moe_runtime.experts.prune import Rules, count_of_bytes, count_of_ratio
from moe_runtime.experts.score import DEFAULT, SCORES
from moe_runtime.experts.statistics import Statistics
from moe_runtime.experts.statistics_file import load_statistics
from moe_runtime.placement import readable_bytes

REFUSED = 3  # exit status: the KL budget cannot be met at any cut worth making
MAX_TEXT_TOKENS = 65536


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Choose the experts that a scenario keeps. By number, from statistics alone: --keep, --keep-ratio or "
        "--bytes. Or by measuring: with --text, as few as a KL budget allows, each layer its own number "
        "(--uniform: all the same), and with one of the former as well, that number if the budget allows it. "
        f"Exit status {REFUSED}, and no plan, when the budget cannot be met."
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the model's folder")
    parser.add_argument(
        "--statistics", type=Path, required=True, metavar="FILE", help="of `moe-experts profile`"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the plan, plan.json")
    parser.add_argument(
        "--scenario", metavar="NAMES", help="of the statistics, comma-separated (default: the only one)"
    )
    parser.add_argument(
        "--combine",
        choices=("mix", "union", "intersection"),
        help="several scenarios as one plan: from their mixed scores, or what a plan of each keeps, together "
        "or in common",
    )
    parser.add_argument("--score", choices=tuple(SCORES), default=DEFAULT, help=f"(default: {DEFAULT})")
    parser.add_argument("--seed", type=int, default=0, help="of the random score (default: 0)")
    _add_budgets(parser)
    _add_constraints(parser)
    add_engine_arguments(parser)


def _add_budgets(parser: argparse.ArgumentParser) -> None:
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--keep", type=int, metavar="N", help="experts of every layer")
    sizes.add_argument("--keep-ratio", metavar="RATIO", help="of every layer's experts, such as 0.5 or 1/3")
    sizes.add_argument("--bytes", metavar="BYTES", help="of all weights as published, for example 20GiB")
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="held-out scenario texts, named as for `profile`, to measure KL on",
    )
    parser.add_argument(
        "--max-kl",
        type=float,
        metavar="NATS",
        help=f"largest mean KL(full || masked) (default: {DEFAULT_KL_MEAN})",
    )
    parser.add_argument(
        "--max-kl-p99",
        type=float,
        metavar="NATS",
        help=f"largest 99 %% quantile of it over tokens (default: {DEFAULT_KL_P99:g})",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=MAX_TEXT_TOKENS,
        metavar="INT",
        help=f"of each scenario's --text (default: {MAX_TEXT_TOKENS})",
    )
    parser.add_argument("--uniform", action="store_true", help="every layer keeps as many, also with --text")
    parser.add_argument(
        "--step",
        type=int,
        metavar="INT",
        help="experts that one move of the search cuts (default: a sixteenth of a layer's)",
    )


def _add_constraints(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--multiple-of", type=int, default=1, metavar="INT", help="of experts that a layer keeps (default: 1)"
    )
    parser.add_argument(
        "--protect",
        nargs="+",
        default=[],
        metavar="WHAT",
        help="experts never to cut: LAYER:ID,ID; a JSON file {LAYER: [ID, ...]}; or all that a plan keeps",
    )


def run(arguments: argparse.Namespace) -> int:
    """0 when the plan is written, REFUSED when the KL budget cannot be met."""
    _check(arguments)
    statistics = load_statistics(arguments.statistics, ModelIdentity.of(arguments.model))
    wish = _wish(arguments, statistics)
    rules = rules_of(statistics, wish)
    size = ModelBytes.of(
        arguments.model, dict.fromkeys(statistics.shape.layers, statistics.shape.num_experts)
    )
    count = _count(arguments, rules, size)
    if not arguments.text:
        assert count is not None, "checked"
        plan = plan_by_count(statistics, wish, count, size)
        return _saved(arguments, plan)
    outcome = _measured(arguments, statistics, wish, rules, size, count)
    if outcome.plan is not None:
        return _saved(arguments, outcome.plan)
    if arguments.json:
        curve = [asdict(point) for point in outcome.curve]
        print(json.dumps({"refused": outcome.refusal, "curve": curve}))
    print(f"moe-experts plan: refused: {outcome.refusal}", file=sys.stderr)
    return REFUSED


def _check(arguments: argparse.Namespace) -> None:
    sized = any(getattr(arguments, name) is not None for name in ("keep", "keep_ratio", "bytes"))
    limited = arguments.max_kl is not None or arguments.max_kl_p99 is not None
    if not arguments.text and (limited or not sized):
        raise ConfigError(
            "a KL budget is measured: name held-out scenario texts with --text"
            if limited
            else "say how much to keep: --keep, --keep-ratio or --bytes; or --text, to measure what is enough"
        )
    if not arguments.out.parent.is_dir():
        raise ConfigError(f"--out {arguments.out}: there is no folder {arguments.out.parent}")
    for name in ("max_tokens", "step"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")


def _wish(arguments: argparse.Namespace, statistics: Statistics) -> Wish:
    known = sorted(statistics.scenarios)
    if arguments.scenario is None and len(known) > 1:
        raise ConfigError(f"the statistics have several scenarios; choose with --scenario {','.join(known)}")
    names = known if arguments.scenario is None else arguments.scenario.split(",")
    if len(names) > 1 and arguments.combine is None:
        raise ConfigError(f"{len(names)} scenarios for one plan: choose --combine mix, union or intersection")
    asked = ("keep", "keep_ratio", "bytes", "max_kl", "max_kl_p99", "uniform", "step", "max_tokens")
    given: dict[str, Any] = {name: getattr(arguments, name) for name in asked}
    if arguments.text:
        limits = _limits(arguments)
        given |= {"max_kl": limits.kl_mean, "max_kl_p99": limits.kl_p99}
    else:
        del given["max_tokens"]
    return Wish(
        scenarios=tuple(names),
        combine=arguments.combine or "one",
        score=arguments.score,
        seed=arguments.seed,
        multiple_of=arguments.multiple_of,
        protected=read_protected(arguments.protect),
        asked={name: value for name, value in given.items() if value not in (None, False)},
    )


def _limits(arguments: argparse.Namespace) -> Limits:
    mean, p99 = arguments.max_kl, arguments.max_kl_p99
    return Limits(DEFAULT_KL_MEAN if mean is None else mean, DEFAULT_KL_P99 if p99 is None else p99)


def _count(arguments: argparse.Namespace, rules: Rules, size: ModelBytes) -> int | None:
    """Experts per layer that --keep, --keep-ratio or --bytes asks for."""
    if arguments.keep is not None:
        asked = f"--keep {arguments.keep}"
        allowed = rules.at_least(arguments.keep, asked)
        if allowed != arguments.keep:
            raise PlanError(f"{asked}: a layer can keep {', '.join(map(str, rules.counts))} experts")
        return allowed
    if arguments.keep_ratio is not None:
        return count_of_ratio(arguments.keep_ratio, rules)
    if arguments.bytes is not None:
        return count_of_bytes(parse_bytes(arguments.bytes), size.full, size.experts, rules)
    return None


def _measured(
    arguments: argparse.Namespace,
    statistics: Statistics,
    wish: Wish,
    rules: Rules,
    size: ModelBytes,
    count: int | None,
) -> Outcome:
    step = arguments.step or max(rules.step, -(-rules.num_experts // 16))
    budget = KlBudget(_limits(arguments), arguments.uniform, count, step)
    corpora = _corpora(arguments, wish)
    runner = Runner.load(arguments.model, engine_config(arguments))
    return plan_by_kl(statistics, wish, budget, size, runner, corpora)


def _corpora(arguments: argparse.Namespace, wish: Wish) -> dict[str, Corpus]:
    renderer = Renderer.load(arguments.model)
    return {
        name: read_corpus(name, path, renderer).take(arguments.max_tokens)
        for name, path in find_texts_of(wish.scenarios, arguments.text).items()
    }


def _saved(arguments: argparse.Namespace, plan: PlanFile) -> int:
    document = plan.save(arguments.out)
    total = sum(plan.mask.num_experts.values())
    if arguments.json:
        told = {
            "file": arguments.out.name,
            "digest": document.digest,
            "mask_digest": plan.mask.digest,
            "scenario": plan.name,
            "experts": total,
            "kept": plan.mask.num_kept,
            "bytes": dict(plan.num_bytes),
            "constraints": list(plan.constraints),
            "curve": list(plan.curve),
        }
        print(json.dumps(told))
        return 0
    for line in plan.constraints:
        print(line)
    full, kept = plan.num_bytes["full"], plan.num_bytes["kept"]
    print(
        f"{plan.name}: {plan.mask.num_kept} of {total} experts, {readable_bytes(kept)} of "
        f"{readable_bytes(full)} ({kept / full:.1%})"
    )
    print(f"{arguments.out} ({document.digest[:12]})")
    return 0
