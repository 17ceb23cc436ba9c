"""``moe-experts profile``: scenario texts -> one statistics file."""

from __future__ import annotations

import argparse
import json
from functools import reduce
from pathlib import Path

from moe_runtime.errors import ConfigError
from moe_runtime.experts.corpus import read_corpora
from moe_runtime.experts.corpus_text import Renderer
from moe_runtime.experts.options import add_engine_arguments, engine_config
from moe_runtime.experts.profile import profile, require_enough
from moe_runtime.experts.statistics import Statistics
from moe_runtime.experts.statistics_file import load_statistics, save_statistics


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run scenario texts through the model once and keep what every expert did with them. All plans are "
        "made from this file, so a model is profiled once per text, not per plan. Statistics are sums: with "
        "--add those of earlier files go into the new one."
    )
    parser.add_argument(
        "texts",
        nargs="*",
        metavar="TEXT",
        help="a .jsonl file ({'messages': [...]} or {'text': '...'} a line) or .txt file (blank lines part "
        "documents), a folder of such files, or a folder of one folder per scenario. The name of file or "
        "folder is the scenario's, unless it is given: NAME=PATH",
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="the model's folder; needed for texts")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="X.stats.safetensors")
    parser.add_argument(
        "--add", type=Path, action="append", default=[], metavar="FILE", help="statistics to add; repeatable"
    )
    parser.add_argument(
        "--skip-system",
        action="store_true",
        help="do not count begin tokens and the system prompts that conversations bring",
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="INT", help="of each scenario, taking documents in seeded order"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the documents' order (default: 0)")
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    parts = [load_statistics(path) for path in arguments.add]
    if arguments.texts:
        parts.append(_profile(arguments))
    if not parts:
        raise ConfigError("nothing to profile: name scenario texts, or statistics files with --add")
    statistics = save_statistics(arguments.out, reduce(Statistics.add, parts))
    found = {
        "file": arguments.out.name,
        "digest": statistics.digest,
        "layers": len(statistics.shape.layers),
        "num_experts": statistics.shape.num_experts,
        "scenarios": {
            name: {
                "documents": each.num_documents,
                "tokens": each.num_tokens,
                "experts_unseen": int(each.unseen.sum()),
                "corpora": list(each.corpora),
            }
            for name, each in statistics.scenarios.items()
        },
    }
    if arguments.json:
        print(json.dumps(found))
        return 0
    experts = statistics.shape.num_experts * len(statistics.shape.layers)
    for name, each in statistics.scenarios.items():
        print(
            f"{name}: {each.num_tokens} tokens of {each.num_documents} documents; "
            f"{int(each.unseen.sum())} of {experts} experts never used"
        )
    print(f"{arguments.out} ({statistics.digest[:12]})")
    return 0


def _profile(arguments: argparse.Namespace) -> Statistics:
    if arguments.model is None:
        raise ConfigError("texts need a model: --model DIR")
    if arguments.max_tokens is not None and arguments.max_tokens < 1:
        raise ConfigError(f"--max-tokens {arguments.max_tokens}: must be at least 1")
    config = engine_config(arguments)
    if not arguments.out.parent.is_dir():
        raise ConfigError(f"--out {arguments.out}: there is no folder {arguments.out.parent}")
    corpora = read_corpora(
        arguments.texts,
        Renderer.load(arguments.model),
        seed=arguments.seed,
        max_tokens=arguments.max_tokens,
    )
    require_enough(arguments.model, corpora)
    return profile(arguments.model, corpora, config, skip_lead=arguments.skip_system)
