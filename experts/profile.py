"""One pass over scenario texts: what every expert did with them, on the model's real routing.

The model runs as it serves (its weights' format, its kernels), layer by layer, through layers/trace.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from moe_runtime.batch import Batch
from moe_runtime.config import EngineConfig
from moe_runtime.engine_load import load_parts
from moe_runtime.errors import PlanError
from moe_runtime.experts.accumulate import Accumulator, BatchRows
from moe_runtime.experts.corpus import Corpus
from moe_runtime.experts.fingerprints import fingerprints, union
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.packing import cache_blocks, pack
from moe_runtime.experts.progress import Progress
from moe_runtime.experts.sketch import token_keys
from moe_runtime.experts.statistics import ScenarioStatistics, Shape, Statistics
from moe_runtime.layers.cache import Cache
from moe_runtime.layers.decoder import Decoder
from moe_runtime.layers.trace import trace
from moe_runtime.loader import read_model_config
from moe_runtime.quant.recipe import Recipe
from moe_runtime.scheduler import Step

TOKENS_PER_EXPERT = 32  # the fewest, on average over the experts of a layer, that say anything


def require_enough(model_dir: Path, corpora: Sequence[Corpus]) -> None:
    """Raises PlanError for a scenario with too few tokens for the model's number of experts, and for layers
    of unequal size. Reads config.json alone.
    """
    _, config = read_model_config(model_dir, "float32")  # whatever the dtype is
    moe = config.moe
    if len({*config.num_experts_per_layer} - {0}) > 1:
        raise PlanError(
            "the layers have different numbers of experts, and statistics have one for all: profile the "
            "model that it was exported from"
        )
    needed = -(-TOKENS_PER_EXPERT * moe.num_experts // moe.top_k)
    for corpus in corpora:
        corpus.require(
            needed,
            f"{TOKENS_PER_EXPERT} for each of the {moe.num_experts} experts of a layer, when a token visits "
            f"{moe.top_k} of them",
        )


def profile(
    model_dir: Path, corpora: Sequence[Corpus], config: EngineConfig, *, skip_lead: bool = False
) -> Statistics:
    """The statistics of every corpus as a scenario. ``skip_lead``: begin tokens and system prompts are read,
    and not counted.

    Raises PlanError as ``require_enough``, CheckpointError and ConfigError as loading a model does.
    """
    require_enough(model_dir, corpora)
    parts = load_parts(model_dir, config, None, None)
    profiler = Profiler(parts.model, config, skip_lead=skip_lead)
    found = {}
    for corpus in sorted(corpora, key=lambda corpus: corpus.scenario):
        with Progress(f"profile {corpus.scenario}", corpus.num_tokens) as progress:
            found[corpus.scenario] = profiler.run(corpus, progress)
    return Statistics(ModelIdentity.of(model_dir), profiler.shape, found)


@dataclass(frozen=True)
class _Marked:
    """Of one document: what of it counts, bool [T]; what the assistant wrote, bool [T]; its token_keys."""

    counted: torch.Tensor
    answers: torch.Tensor
    keys: torch.Tensor


class Profiler:
    """A loaded model, to be run on one corpus after the other."""

    def __init__(self, model: Decoder, config: EngineConfig, *, skip_lead: bool = False) -> None:
        self._model = model
        self._config = config
        self._skip_lead = skip_lead
        moe = model.config.moe
        self.shape = Shape(
            layers=tuple(number for number, _ in model.mixtures()),
            num_experts=moe.num_experts,
            top_k=moe.top_k,
            num_groups=moe.num_groups,
            topk_groups=moe.topk_groups,
            hidden=model.config.hidden_size,
            weights=Recipe.of(config).label,
        )

    def run(self, corpus: Corpus, progress: Progress) -> ScenarioStatistics:
        """Its statistics. Raises PlanError when the model computes numbers that are not finite."""
        documents = [text.token_ids for text in corpus.texts]
        marked = [self._mark(corpus, number) for number in range(len(documents))]
        accumulator = Accumulator(self.shape, self._model.device)
        cache = self._new_cache([len(ids) for ids in documents])
        for step in pack(documents, self._config.max_batch_tokens, self._config.block_size):
            accumulator.start(_rows(step, marked))
            batch = Batch.build(step, self._config.block_size)
            trace(self._model, batch, cache, accumulator)
            accumulator.end_batch()
            progress.advance(step.num_tokens)
        return accumulator.finish(
            corpus.digest,
            union(fingerprints(ids) for ids in documents),
            len(documents),
            sum(int(each.counted.sum()) for each in marked),
        )

    def _mark(self, corpus: Corpus, number: int) -> _Marked:
        rendered = corpus.texts[number].rendered
        counted = torch.ones(len(rendered.token_ids), dtype=torch.bool)
        if self._skip_lead:
            counted[: rendered.lead] = False
        answers = torch.zeros_like(counted)
        for start, end in rendered.answers:
            answers[start:end] = True
        return _Marked(counted, answers, token_keys(rendered.token_ids))

    def _new_cache(self, lengths: Sequence[int]) -> Cache:
        config = self._config
        num_blocks = cache_blocks(lengths, config.max_batch_tokens, config.block_size)
        return self._model.new_cache(num_blocks, config.block_size, config.kv_dtype)


def _rows(step: Step, marked: Sequence[_Marked]) -> BatchRows:
    parts = [(marked[chunk.sequence_id], slice(chunk.start, chunk.end)) for chunk in step.chunks]
    counted = torch.cat([each.counted[part] for each, part in parts])
    sizes = torch.tensor([len(chunk.token_ids) for chunk in step.chunks])
    return BatchRows(
        counted=torch.nonzero(counted)[:, 0],
        answers=torch.cat([each.answers[part] for each, part in parts])[counted],
        documents=torch.arange(len(parts)).repeat_interleave(sizes)[counted],
        num_tokens=step.num_tokens,
        num_documents=len(parts),
        keys=torch.cat([each.keys[part] for each, part in parts])[counted],
        continued=step.chunks[0].start > 0,
    )
