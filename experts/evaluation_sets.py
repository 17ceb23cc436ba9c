"""Every test set of an evaluation: the plan's next-token distributions and answers, alone and with each
recovery, and what other cuts of its size do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine
from moe_runtime.experts.corpus import Corpus
from moe_runtime.experts.evaluation import measure_answers
from moe_runtime.experts.forward import Runner
from moe_runtime.experts.progress import Progress
from moe_runtime.experts.recovery_file import RecoveryFile
from moe_runtime.experts.recovery_trial import (
    ALONE,
    Variants,
    choose,
    measure_variants,
    told_in_certificate,
    variants_of,
)
from moe_runtime.plan import ExpertMask


@dataclass(frozen=True)
class Amounts:
    """How much is measured: answers per set, tokens of an answer; and the seed of intervals."""

    max_answers: int
    answer_tokens: int
    seed: int


class SetsOfTexts:
    """A loaded model and what is asked of it."""

    def __init__(self, model_dir: Path, config: EngineConfig, mask: ExpertMask, amounts: Amounts) -> None:
        """Raises CheckpointError and ConfigError as loading a model does."""
        self._runner = Runner.load(model_dir, config)
        parts = self._runner.parts
        self._engine = Engine(
            parts.model, parts.tokenizer, config, chooser=parts.chooser, sampler=parts.sampler
        )
        self._mask = mask
        self._amounts = amounts

    def measure(
        self,
        corpora: Sequence[Corpus],
        own: Sequence[str],
        files: Mapping[str, RecoveryFile],
        others: Mapping[str, ExpertMask],
    ) -> dict[str, Any]:
        """ "sets", "baselines" and "recovery" of an evaluation's body. ``own``: the names of the sets that
        decide, which of the plan's variants is applied too; ``files``: recoveries by kind; ``others``: masks
        that the plan is compared with in its own sets.
        """
        variants = variants_of(files)
        told: dict[str, dict[str, dict[str, Any]]] = {}
        compared: dict[str, dict[str, Any]] = {}
        for corpus in (corpus for corpus in corpora if corpus.scenario in own):
            told[corpus.scenario], compared[corpus.scenario] = self._divergences(corpus, variants, others)
        tried = dict(told)
        applied = choose(list(files), tried)
        for corpus in (corpus for corpus in corpora if corpus.scenario not in own):
            told[corpus.scenario], _ = self._divergences(corpus, {applied: variants[applied]}, {})
        for corpus in corpora:
            for name, found in told[corpus.scenario].items():
                found["answers"] = self._answers(corpus, name, variants)
        sets = [
            {
                "name": corpus.scenario,
                "in_scenario": corpus.scenario in own,
                "digest": corpus.digest,
                "divergence": told[corpus.scenario][applied]["divergence"],
                "answers": told[corpus.scenario][applied]["answers"],
            }
            for corpus in corpora
        ]
        recovery = told_in_certificate(files, tried, applied)
        return {
            "sets": sets,
            "baselines": {name: found for name, found in compared.items() if found},
            "recovery": None if recovery is None else {**recovery, "sets": tried},
        }

    def _divergences(
        self, corpus: Corpus, variants: Variants, others: Mapping[str, ExpertMask]
    ) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
        total = corpus.num_tokens * (len(variants) + len(others))
        with Progress(f"{corpus.scenario}: divergence", total) as progress:
            return measure_variants(
                self._runner, corpus, self._mask, variants, others, self._amounts.seed, progress.advance
            )

    def _answers(self, corpus: Corpus, name: str, variants: Variants) -> dict[str, Any] | None:
        most = self._amounts.max_answers
        asked = sum(bool(text.rendered.prompt_ids) for text in corpus.texts)
        what = f"{corpus.scenario}: answers" + (f", {name}" if name != ALONE else "")
        with Progress(what, 2 * min(asked, most), "answers") as progress:
            return measure_answers(
                self._engine,
                corpus,
                self._mask,
                most,
                self._amounts.answer_tokens,
                progress.advance,
                variants[name],
            )
