"""Teacher-forced running: what a mask does to every prediction of given documents, nothing being cut.

The full model and the masked ones read the same tokens in the same batches, one after the other, so that no
more than one batch's logits of two models are in memory (and those of the full model, while they are few).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from moe_runtime.batch import Batch
from moe_runtime.config import EngineConfig
from moe_runtime.engine_load import Parts, load_parts
from moe_runtime.errors import PlanError
from moe_runtime.experts.divergence import TokenDivergences, compare_logits
from moe_runtime.experts.packing import cache_blocks, pack
from moe_runtime.layers.cache import Cache
from moe_runtime.layers.decoder import Decoder
from moe_runtime.masks import NO_MASK, MaskTable
from moe_runtime.plan import ExpertMask
from moe_runtime.recovery import Recovery
from moe_runtime.scheduler import Step

MAX_LOGIT_VALUES = 1 << 25  # of one batch: 128 MiB of float32
REMEMBERED_BYTES = 1 << 30  # the full model's logits of the documents that were compared last
MASKS_TOGETHER = 8  # in one pass over the documents: each has a cache of its own

Documents = Sequence[Sequence[int]]
Advance = Callable[[int], None]  # told of tokens computed
Recoveries = Sequence[Recovery | None]  # one per mask, or empty: none at all


def batch_tokens(model: Decoder, config: EngineConfig) -> int:
    """Tokens of a batch whose logits are all wanted at once."""
    return max(1, min(config.max_batch_tokens, MAX_LOGIT_VALUES // model.config.vocab_size))


def all_logits(model: Decoder, step: Step, cache: Cache, row: int, config: EngineConfig) -> torch.Tensor:
    """float32 [tokens, V], of all tokens of the step under mask ``row``."""
    chunks = tuple(replace(chunk, logit_start=chunk.start, mask_row=row) for chunk in step.chunks)
    return model.forward(Batch.build(Step(chunks), config.block_size), cache)


class Runner:
    """A loaded model that is compared with itself under masks. Not thread-safe."""

    def __init__(self, parts: Parts, config: EngineConfig) -> None:
        self.model = parts.model
        self.parts = parts
        self._config = config
        self._masks = MaskTable(parts.model)
        self._remembered: dict[str, list[torch.Tensor]] = {}  # by digest of the documents, one per step

    @classmethod
    def load(cls, model_dir: Path, config: EngineConfig) -> Runner:
        """Raises CheckpointError and ConfigError as the engine does."""
        return cls(load_parts(model_dir, config, None, None), config)

    @property
    def num_experts(self) -> dict[int, int]:
        """By decoder layer that has a router."""
        return {number: mixture.config.num_experts for number, mixture in self.model.mixtures()}

    def compare(
        self,
        documents: Documents,
        masks: Sequence[ExpertMask],
        advance: Advance = lambda tokens: None,
        recoveries: Recoveries = (),
    ) -> list[TokenDivergences]:
        """Of each mask, with its recovery if there is one, against all experts, over all ``documents`` (token
        ids each, in this order).

        ``advance`` is told of len(masks) times the tokens, bit by bit. The same documents again are cheaper:
        the full model's logits are kept while they are few. Raises PlanError for masks that do not fit the
        model, recoveries that do not fit their mask, documents without two tokens, and logits that are not
        finite.
        """
        if not any(len(ids) > 1 for ids in documents):
            raise PlanError("nothing to compare on: no document has two tokens or more")
        results: list[TokenDivergences] = []
        for start in range(0, len(masks), MASKS_TOGETHER):
            part = slice(start, start + MASKS_TOGETHER)
            results += self._compare(documents, masks[part], recoveries[part], advance)
        return results

    def compare_one(self, documents: Documents, mask: ExpertMask) -> TokenDivergences:
        """As ``compare`` of one mask."""
        return self.compare(documents, [mask])[0]

    @contextmanager
    def masked(self, masks: Sequence[ExpertMask], recoveries: Recoveries = ()) -> Iterator[list[int]]:
        """Their rows of the mask table, for a while. Raises PlanError as ``compare``."""
        names: list[str] = []
        try:
            for number, mask in enumerate(masks):
                recovery = recoveries[number] if recoveries else None
                self._masks.add(f"mask {number}", mask, recovery=recovery)
                names.append(f"mask {number}")
            yield [self._masks.grant(name).row for name in names]
        finally:
            for name in names:
                self._masks.remove(name)

    def _compare(
        self,
        documents: Documents,
        masks: Sequence[ExpertMask],
        recoveries: Recoveries,
        advance: Advance,
    ) -> list[TokenDivergences]:
        found: list[list[TokenDivergences]] = [[] for _ in masks]
        caches = [self._new_cache(documents) for _ in masks]
        with self.masked(masks, recoveries) as rows:
            for step, full in self._full(documents):
                wanted = _Wanted(step, documents)
                reference = full.index_select(0, wanted.rows.to(full.device))
                for row, cache, parts in zip(rows, caches, found, strict=True):
                    logits = self._logits(step, cache, row)
                    logits = logits.index_select(0, wanted.rows.to(logits.device))
                    numbers = compare_logits(reference.to(logits.device), logits, wanted.following)
                    parts.append(TokenDivergences(wanted.documents, wanted.positions, **numbers))
                    advance(step.num_tokens)
        return [TokenDivergences.joined(parts) for parts in found]

    def _full(self, documents: Documents) -> Iterator[tuple[Step, torch.Tensor]]:
        """Every step with the full model's logits, float32 [tokens, V] on the CPU or where they are made."""
        key = _digest(documents)
        steps = self._steps(documents)
        if key in self._remembered:
            yield from zip(steps, self._remembered[key], strict=True)
            return
        self._remembered.clear()
        num_bytes = 4 * sum(len(ids) for ids in documents) * self.model.config.vocab_size
        keep, cache, made = num_bytes <= REMEMBERED_BYTES, self._new_cache(documents), []
        for step in steps:
            logits = self._logits(step, cache, NO_MASK)
            if keep:
                made.append(logits.cpu())
            yield step, logits
        if keep:
            self._remembered[key] = made

    def _logits(self, step: Step, cache: Cache, row: int) -> torch.Tensor:
        """float32 [tokens, V], of all tokens of the step under mask ``row``."""
        return all_logits(self.model, step, cache, row, self._config)

    def _steps(self, documents: Documents) -> Iterator[Step]:
        return pack(documents, self._batch_tokens, self._config.block_size)

    @property
    def _batch_tokens(self) -> int:
        return batch_tokens(self.model, self._config)

    def _new_cache(self, documents: Documents) -> Cache:
        config = self._config
        blocks = cache_blocks([len(ids) for ids in documents], self._batch_tokens, config.block_size)
        return self.model.new_cache(blocks, config.block_size, config.kv_dtype)


class _Wanted:
    """The tokens of a step that have another one after them: ``rows`` int64 of the step's tokens, with
    ``documents``, ``positions`` and the ids ``following``, int64 each.
    """

    def __init__(self, step: Step, documents: Documents) -> None:
        rows: list[int] = []
        owners: list[int] = []
        positions: list[int] = []
        following: list[int] = []
        before = 0
        for chunk in step.chunks:
            ids = documents[chunk.sequence_id]
            end = min(chunk.end, len(ids) - 1)
            rows += range(before, before + end - chunk.start)
            owners += [chunk.sequence_id] * (end - chunk.start)
            positions += range(chunk.start, end)
            following += ids[chunk.start + 1 : end + 1]
            before += len(chunk.token_ids)
        self.rows, self.documents, self.positions, self.following = (
            torch.tensor(values, dtype=torch.int64) for values in (rows, owners, positions, following)
        )


def _digest(documents: Documents) -> str:
    digest = hashlib.sha256()
    for ids in documents:
        digest.update(len(ids).to_bytes(8, "little") + np.asarray(ids, dtype="<i8").tobytes())
    return digest.hexdigest()
