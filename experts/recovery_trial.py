"""With a recovery and without it on the same test texts: whether it helps, and which one is applied."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_runtime.errors import ConfigError
from moe_runtime.experts.corpus import Corpus
from moe_runtime.experts.evaluation import require_apart
from moe_runtime.experts.forward import Runner
from moe_runtime.experts.intervals import MIN_DOCUMENTS, divergence_intervals, paired_change
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.recovery_file import RecoveryFile
from moe_runtime.plan import ExpertMask
from moe_runtime.recovery import Recovery

ALONE = "alone"  # the plan without any
Variants = Mapping[str, Recovery | None]  # by name: ALONE, and the kinds of recovery


def read_recoveries(
    paths: Sequence[Path], plan: PlanFile, corpora: Sequence[Corpus]
) -> dict[str, RecoveryFile]:
    """By kind. Raises PlanError for a file that is not of ``plan``, or was made from texts of ``corpora``;
    ConfigError for two of one kind.
    """
    found: dict[str, RecoveryFile] = {}
    for path in paths:
        file = RecoveryFile.load(path, plan)
        if file.kind in found:
            raise ConfigError(f"--recovery {path}: a second one of kind {file.kind}; give one of each kind")
        require_apart(corpora, file.fingerprints, f"the texts that {path.name} was made from")
        found[file.kind] = file
    return found


def variants_of(files: Mapping[str, RecoveryFile]) -> dict[str, Recovery | None]:
    return {ALONE: None, **{kind: file.recovery for kind, file in files.items()}}


def measure_variants(
    runner: Runner,
    corpus: Corpus,
    mask: ExpertMask,
    variants: Variants,
    others: Mapping[str, ExpertMask],
    seed: int,
    advance: Callable[[int], None],
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """On the texts of one set: by variant its "divergence" and, of those besides ALONE, the "change" of mean
    KL that the recovery makes, nats with its interval; and the divergence of the ``others`` by name.
    """
    documents = [text.token_ids for text in corpus.texts if len(text.token_ids) > 1]
    masks = [mask] * len(variants) + list(others.values())
    recoveries = [*variants.values(), *[None] * len(others)]
    found = runner.compare(documents, masks, advance, recoveries)
    by_variant = dict(zip(variants, found[: len(variants)], strict=True))
    told: dict[str, dict[str, Any]] = {}
    for name, each in by_variant.items():
        told[name] = {"divergence": divergence_intervals(each, seed)}
        if name != ALONE and ALONE in by_variant:
            told[name]["change"] = paired_change(by_variant[ALONE], each, seed).to_json()
    rest = zip(others, found[len(variants) :], strict=True)
    return told, {name: divergence_intervals(each, seed) for name, each in rest}


def helps(kind: str, sets: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the KL is lower with it beyond doubt (95 %), in every set of the plan's own scenarios; sets of
    fewer than MIN_DOCUMENTS leave doubt.
    """
    return all(
        found[kind]["change"]["high"] < 0 and found[kind]["divergence"]["documents"] >= MIN_DOCUMENTS
        for found in sets.values()
    )


def choose(kinds: Sequence[str], sets: Mapping[str, Mapping[str, Any]]) -> str:
    """Of those that help the one whose worst upper end of mean KL is lowest; ALONE when none does."""

    def worst(kind: str) -> float:
        return max(float(found[kind]["divergence"]["kl_mean"]["high"]) for found in sets.values())

    return min((kind for kind in kinds if helps(kind, sets)), key=worst, default=ALONE)


def told_in_certificate(
    files: Mapping[str, RecoveryFile], sets: Mapping[str, Mapping[str, Any]], applied: str
) -> dict[str, Any] | None:
    """Certificate.recovery; None when there was none to try."""
    if not files:
        return None
    tried = [
        {
            "kind": kind,
            "digest": file.digest,
            "bytes": file.num_bytes,
            "helps": helps(kind, sets),
            "change": {name: found[kind]["change"] for name, found in sets.items()},
        }
        for kind, file in files.items()
    ]
    return {"applied": None if applied == ALONE else applied, "tried": tried}
