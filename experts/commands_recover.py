"""``moe-experts recover``: small tensors that make up for a plan's missing experts, without touching any."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_runtime.errors import ConfigError, PlanError
from moe_runtime.experts.corpus import Corpus, find_texts_of, read_corpus
from moe_runtime.experts.corpus_text import Renderer
from moe_runtime.experts.evaluation import require_apart
from moe_runtime.experts.fingerprints import Hashes, fingerprints, union
from moe_runtime.experts.forward import Runner
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.options import add_engine_arguments, engine_config, read_planned
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.progress import Progress
from moe_runtime.experts.recovery_constants import constants
from moe_runtime.experts.recovery_file import RecoveryFile
from moe_runtime.experts.recovery_search import Found, fit, num_trials, search
from moe_runtime.experts.statistics import Statistics
from moe_runtime.placement import readable_bytes

REFUSED = 3  # exit status, as of `plan`: nothing was found that helps
MAX_TEXT_TOKENS = 65536
CHOICE_TOKENS = 8192  # of --text per scenario, which is run once for every strength


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make up for the experts that a plan lacks with a few numbers per layer; no expert is touched. "
        '"constants": the mean output of every missing expert, from statistics alone, in its place (MoNE). '
        '"router": offsets of the kept experts\' router logits, in closed form from one pass over TEXT; how '
        "strong they are is chosen by the KL that they leave on --text. `evaluate --recovery` then finds out "
        "on unseen texts whether it helps; a server applies it only if it does, as recovery.safetensors "
        f"beside the plan. Exit status {REFUSED}, and no file, when no router correction lowers the KL."
    )
    parser.add_argument(
        "texts",
        nargs="*",
        metavar="TEXT",
        help='for "router": texts of the plan\'s scenario to fit it on, named as for `profile`; what was '
        "profiled will do",
    )
    parser.add_argument("--kind", choices=("constants", "router"), required=True)
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--plan", type=Path, required=True, metavar="FILE")
    parser.add_argument("--statistics", type=Path, required=True, metavar="FILE", help="the plan's")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="recovery.safetensors")
    parser.add_argument(
        "--text",
        nargs="+",
        default=[],
        metavar="TEXT",
        help='for "router": other texts of the scenario, such as those that `plan --text` measured on; the '
        f"first {CHOICE_TOKENS} tokens are used",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=MAX_TEXT_TOKENS,
        metavar="INT",
        help=f"of each scenario's TEXT (default: {MAX_TEXT_TOKENS})",
    )
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """0 when the file is written, REFUSED when nothing was found that helps."""
    _check(arguments)
    plan, statistics, identity = read_planned(arguments)
    if plan.mask.num_kept == sum(plan.mask.num_experts.values()):
        raise PlanError(f"{arguments.plan.name} keeps all experts: there is nothing to make up for")
    made = _constants(statistics, plan, identity) if arguments.kind == "constants" else None
    if made is None:
        found, known = _router(arguments, plan)
        if not found.helps:
            return _refused(arguments, found)
        made = RecoveryFile(found.recovery, plan.digest, plan.mask.digest, identity, _told(found), known)
    saved = made.save(arguments.out)
    told = {
        "file": arguments.out.name,
        "digest": saved.digest,
        "plan": plan.digest,
        "kind": saved.kind,
        "bytes": saved.num_bytes,
        **saved.made,
    }
    print(json.dumps(told) if arguments.json else _lines(arguments, saved))
    return 0


def _check(arguments: argparse.Namespace) -> None:
    if not arguments.out.parent.is_dir():
        raise ConfigError(f"--out {arguments.out}: there is no folder {arguments.out.parent}")
    if arguments.max_tokens < 1:
        raise ConfigError(f"--max-tokens {arguments.max_tokens}: must be at least 1")
    if arguments.kind == "constants" and (arguments.texts or arguments.text):
        raise ConfigError("--kind constants follows from the statistics alone: leave TEXT and --text out")
    if arguments.kind == "router" and not (arguments.texts and arguments.text):
        raise ConfigError(
            "--kind router needs TEXT to fit on, and --text, other texts to choose its strength by"
        )


def _constants(statistics: Statistics, plan: PlanFile, identity: ModelIdentity) -> RecoveryFile:
    recovery, unseen = constants(statistics, plan)
    made = {
        "statistics": statistics.digest,
        "unseen": {str(layer): list(experts) for layer, experts in unseen.items()},
    }
    return RecoveryFile(recovery, plan.digest, plan.mask.digest, identity, made)


def _router(arguments: argparse.Namespace, plan: PlanFile) -> tuple[Found, Hashes]:
    """The best correction, and the fingerprints of all texts that it was made from."""
    config = engine_config(arguments)
    fitted = _corpora(arguments, plan, arguments.texts, arguments.max_tokens)
    chosen = _corpora(arguments, plan, arguments.text, CHOICE_TOKENS)
    known = _fingerprints(fitted)
    require_apart(chosen, known, "TEXT, which the correction is fitted on")
    runner = Runner.load(arguments.model, config)
    documents = [text.token_ids for corpus in fitted for text in corpus.texts]
    with Progress(f"fit {plan.name}", sum(map(len, documents))) as progress:
        equations = fit(runner, config, plan.mask, documents, progress.advance)
    documents = [text.token_ids for corpus in chosen for text in corpus.texts]
    with Progress(f"choose {plan.name}", num_trials() * sum(map(len, documents))) as progress:
        found = search(runner, plan.mask, equations, documents, progress.advance)
    return found, union([known, _fingerprints(chosen)])


def _corpora(
    arguments: argparse.Namespace, plan: PlanFile, words: Sequence[str], max_tokens: int
) -> list[Corpus]:
    """Of the plan's scenarios, all of them."""
    named = find_texts_of(plan.scenarios, words)
    renderer = Renderer.load(arguments.model)
    return [read_corpus(name, path, renderer).take(max_tokens) for name, path in named.items()]


def _fingerprints(corpora: Sequence[Corpus]) -> Hashes:
    return union(fingerprints(text.token_ids) for corpus in corpora for text in corpus.texts)


def _told(found: Found) -> dict[str, Any]:
    return {
        "damping": found.damping,
        "step": found.step,
        "explained": found.explained,
        "kl_alone": found.kl_alone,
        "kl_with": found.kl_with,
        "tried": [
            {"damping": damping, "step": step, "kl_mean": kl} for (damping, step), kl in found.tried.items()
        ],
    }


def _refused(arguments: argparse.Namespace, found: Found) -> int:
    told = (
        f"no correction lowers the mean KL: {found.kl_alone:.5f} nats without, {found.kl_with:.5f} with the "
        "best one"
    )
    if arguments.json:
        print(json.dumps({"refused": told, **_told(found)}))
    print(f"moe-experts recover: refused: {told}", file=sys.stderr)
    return REFUSED


def _lines(arguments: argparse.Namespace, saved: RecoveryFile) -> str:
    made = saved.made
    if saved.kind == "constants":
        unseen = sum(map(len, made["unseen"].values()))
        lines = [f"constants of {sum(map(len, saved.recovery.layers.values()))} missing experts"]
        lines += [f"layer {layer}: no token chose {ids}: zeros" for layer, ids in made["unseen"].items()]
        lines[0] += f", {unseen} of them never seen" if unseen else ""
    else:
        lines = [
            f"router correction (damping {made['damping']:g}, step {made['step']:g}): mean KL "
            f"{made['kl_alone']:.4f} -> {made['kl_with']:.4f} nats on the texts it was chosen by"
        ]
    lines.append(f"{arguments.out} ({saved.digest[:12]}), {readable_bytes(saved.num_bytes)}")
    return "\n".join(lines)
