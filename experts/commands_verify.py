"""``moe-experts verify``: an exported checkpoint against the plan it was made from."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from moe_runtime.errors import ConfigError
from moe_runtime.experts import documents
from moe_runtime.experts.corpus import read_corpora
from moe_runtime.experts.corpus_text import Renderer
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.options import add_engine_arguments, engine_config
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.verify import Verification, generate_prompts, load_manifest, verify
from moe_runtime.loader import read_model_config

KIND = "verification"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare an exported checkpoint with the full model under the plan's mask: the files with their "
        "manifest, float32 logits bit for bit, greedy answers token for token. Exit status 1 on any "
        "difference. The instruction set is the machine's; MOE_FORCE_ISA=avx2 compares on kernels that "
        "multiply in float32."
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the full model's folder")
    parser.add_argument("--plan", type=Path, required=True, metavar="FILE", help="of `moe-experts plan`")
    parser.add_argument("--exported", type=Path, required=True, metavar="DIR", help="of `moe-experts export`")
    parser.add_argument("--out", type=Path, metavar="FILE", help="keep the result in this JSON document")
    parser.add_argument(
        "texts",
        nargs="*",
        metavar="TEXT",
        help="texts to take prompts from, as for `moe-experts profile` (default: random tokens)",
    )
    parser.add_argument("--prompts", type=int, default=1000, metavar="INT", help="at most (default: 1000)")
    parser.add_argument(
        "--prompt-tokens", type=int, default=128, metavar="INT", help="of a text, at most (default: 128)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=16, metavar="INT", help="of each answer (default: 16)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of prompts and their order (default: 0)")
    add_engine_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """0, or 1 when anything differs."""
    for name in ("prompts", "prompt_tokens", "max_tokens"):
        if getattr(arguments, name) < 1:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} {getattr(arguments, name)}: must be at least 1")
    config = engine_config(arguments)
    plan = PlanFile.load(arguments.plan)
    manifest = load_manifest(arguments.exported, plan.mask)
    plan.model.check(ModelIdentity.of(arguments.model), f"the plan {arguments.plan.name}")
    found = verify(
        arguments.model,
        plan.mask,
        arguments.exported,
        _prompts(arguments),
        config,
        max_tokens=arguments.max_tokens,
    )
    if arguments.out is not None:
        inputs = {"plan": plan.digest, "manifest": manifest.digest, "weights": plan.model.weights}
        documents.save(arguments.out, KIND, found.to_json(), inputs)
    print(json.dumps(found.to_json()) if arguments.json else _told(found))
    return 0 if found.passed else 1


def _prompts(arguments: argparse.Namespace) -> list[list[int]]:
    if not arguments.texts:
        _, config = read_model_config(arguments.model, "float32")  # whatever the dtype is
        return generate_prompts(arguments.prompts, config.vocab_size, arguments.seed)
    corpora = read_corpora(arguments.texts, Renderer.load(arguments.model), seed=arguments.seed)
    prompts = [
        list((text.rendered.prompt_ids or text.token_ids)[: arguments.prompt_tokens])
        for corpus in sorted(corpora, key=lambda corpus: corpus.scenario)
        for text in corpus.texts
    ]
    return prompts[: arguments.prompts]


def _told(found: Verification) -> str:
    lines = [
        f"files: {found.files - len(found.files_different)} of {found.files} as in the manifest",
        f"logits: {found.positions - len(found.logits_different)} of {found.positions} positions equal, bit "
        "for bit",
        f"greedy answers: {found.prompts - len(found.answers_different)} of {found.prompts} prompts equal, "
        f"{found.generated} tokens",
    ]
    if found.files_different:
        lines.append(f"different files: {', '.join(found.files_different)}")
    if found.logits_different:
        prompt, position = found.logits_different[0]
        lines.append(f"first different logits: prompt {prompt}, position {position}")
    if found.answers_different:
        lines.append(f"first different answer: prompt {found.answers_different[0]}")
    if found.outside_mask:
        lines.append(f"the masked model left its mask {found.outside_mask} times")
    lines.append("the export is the masked model" if found.passed else "THE EXPORT IS NOT THE MASKED MODEL")
    return "\n".join(lines)
