"""``moe-experts simulate``: what plans change, quickly: token by token, without answers or a certificate."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_runtime.experts.corpus import read_corpora
from moe_runtime.experts.corpus_text import Renderer
from moe_runtime.experts.evaluation import measure_divergence
from moe_runtime.experts.forward import Runner
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.options import add_engine_arguments, engine_config
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.progress import Progress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run texts through the full model and through its masks, nothing being cut, and compare every "
        "next-token distribution. To choose between plans; `evaluate` judges one on texts of its own."
    )
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="as for `profile`")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--plan", type=Path, nargs="+", required=True, metavar="FILE")
    parser.add_argument("--max-tokens", type=int, help="of text per set (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of order and intervals (default %(default)s)")
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    identity = ModelIdentity.of(arguments.model)
    plans = {str(path): PlanFile.load(path) for path in arguments.plan}
    for path, plan in plans.items():
        identity.check(plan.model, path)
    corpora = read_corpora(
        arguments.texts,
        Renderer.load(arguments.model),
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
    )
    masks = {path: plan.mask for path, plan in plans.items()}
    runner = Runner.load(arguments.model, engine_config(arguments))
    found: dict[str, Any] = {
        path: {"plan": plan.digest, "bytes": dict(plan.num_bytes), "sets": {}} for path, plan in plans.items()
    }
    for corpus in corpora:
        with Progress(corpus.scenario, corpus.num_tokens * len(masks)) as progress:
            measured = measure_divergence(runner, corpus, masks, arguments.seed, progress.advance)
        for path, numbers in measured.items():
            found[path]["sets"][corpus.scenario] = numbers
    print(json.dumps(found) if arguments.json else _table(found))
    return 0


def _table(found: Mapping[str, Any]) -> str:
    lines = [f"{'plan':<32}{'MB':>9}  {'texts':<20}{'mean KL (95 %)':<26}{'p99 KL':>8}{'top-1':>8}"]
    for path, plan in found.items():
        for name, numbers in plan["sets"].items():
            kl = numbers["kl_mean"]
            lines.append(
                f"{path[-31:]:<32}{plan['bytes']['kept'] / 1e6:>9.1f}  {name:<20}"
                f"{kl['value']:.4f} ({kl['low']:.4f}-{kl['high']:.4f})   {numbers['kl_p99']['value']:>8.3f}"
                f"{numbers['top1']['value']:>8.1%}"
            )
    return "\n".join(lines)
