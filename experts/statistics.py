"""What a model's experts did with a scenario's texts, as sums: everything that plans are made from.

L layers with a router, E experts of each, top_k of them per token, H hidden. For every token that was routed
to an expert, w is the gate weight as the model applies it (after bias, groups, renormalisation and scaling),
f the expert's output [H], |f| its length. All that scores need is a formula over these sums, so plans of any
size follow from one profile; as they are sums, profiles of parts add up to the profile of the whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any

import torch

from moe_runtime.errors import PlanError
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.sketch import SAMPLE_FIELDS, merge_samples

NUM_BUCKETS = 32  # of ``tail``
LOWEST_BUCKET = -12.0  # log2 of where the second bucket of ``tail`` begins; each is half an octave wide


@dataclass(frozen=True)
class Shape:
    """What of a model its statistics have as dimensions.

    layers      numbers of the decoder layers that have a router, ascending
    num_groups, topk_groups   of a router that chooses groups of experts first; 1 and 1 without
    weights     the format that the profiled weights were in, "plain" or a recipe's label
    """

    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    num_groups: int
    topk_groups: int
    hidden: int
    weights: str


@dataclass(frozen=True, eq=False)
class ScenarioStatistics:
    """The sums of one scenario (or of several, merged).

    counts           int64 [L, E]     tokens routed to the expert
    answer_counts    int64 [L, E]     of these, tokens that the assistant wrote
    documents_seen   int64 [L, E]     documents with at least one such token
    gate             float64 [L, E]   sum w
    norm             float64 [L, E]   sum |f|
    norm_squared     float64 [L, E]   sum |f|^2, the outputs' second moment
    gate_norm        float64 [L, E]   sum w |f|
    gate_norm_turn   float64 [L, E]   sum w |f| max(0, 1 - cos(r, r + routed part)), r the residual stream
                                      that the mixture is added to, the shared expert left out (EASY-EP,
                                      arXiv 2504.06792, as in its own model code)
    peak             float64 [L, E]   largest |number| of any f
    outputs          float64 [L, E, H] sum f (over counts: the mean output, what MoNE puts in its place)
    pairs            int64 [L, E, E]  tokens routed to both; the diagonal is ``counts``
    tail             int64 [L, E, NUM_BUCKETS]  tokens by log2(w |f| / |r|): see ``contribution``
    sample_keys      int64 [S]        a sample of tokens, ascending hashes of document and position ...
    sample_experts   int32 [S, L, top_k]    ... with the experts that each was routed to
    sample_weights   float32 [S, L, top_k]  ... and their w: what a set of kept experts would lose per token
    fingerprints     int64 [N]        of the texts (fingerprints.py), ascending
    num_documents, num_tokens         of the texts, the tokens that were counted
    corpora          digests of the texts (corpus.py), ascending
    """

    counts: torch.Tensor
    answer_counts: torch.Tensor
    documents_seen: torch.Tensor
    gate: torch.Tensor
    norm: torch.Tensor
    norm_squared: torch.Tensor
    gate_norm: torch.Tensor
    gate_norm_turn: torch.Tensor
    peak: torch.Tensor
    outputs: torch.Tensor
    pairs: torch.Tensor
    tail: torch.Tensor
    sample_keys: torch.Tensor
    sample_experts: torch.Tensor
    sample_weights: torch.Tensor
    fingerprints: torch.Tensor
    num_documents: int
    num_tokens: int
    corpora: tuple[str, ...]

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, by name."""
        return {name: getattr(self, name) for name in TENSORS}

    @property
    def unseen(self) -> torch.Tensor:
        """bool [L, E]: experts that no token was routed to, of which nothing is known."""
        return self.counts == 0

    def contribution(self, quantile: float) -> torch.Tensor:
        """float64 [L, E]: below this w |f| / |r| were ``quantile`` of the expert's tokens, to within half an
        octave (the upper end of the bucket); 0 where it has none.
        """
        reached = self.tail.cumsum(-1) >= self.counts.unsqueeze(-1).double() * quantile
        bucket = reached.int().argmax(-1).double()
        return torch.where(self.unseen, 0.0, torch.exp2(LOWEST_BUCKET + bucket / 2))

    def add(self, other: ScenarioStatistics) -> ScenarioStatistics:
        """Of both texts together. Raises PlanError when they share a corpus."""
        twice = sorted({*self.corpora} & {*other.corpora})
        if twice:
            raise PlanError(f"the same texts would be counted twice (corpus {twice[0][:12]})")
        sums: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in SUMS}
        mine, theirs = ([getattr(part, name) for name in SAMPLE_FIELDS] for part in (self, other))
        sums |= dict(zip(SAMPLE_FIELDS, merge_samples(mine, theirs), strict=True))
        return replace(
            self,
            **sums,
            peak=torch.maximum(self.peak, other.peak),
            fingerprints=torch.cat((self.fingerprints, other.fingerprints)).unique(sorted=True),
            num_documents=self.num_documents + other.num_documents,
            num_tokens=self.num_tokens + other.num_tokens,
            corpora=tuple(sorted((*self.corpora, *other.corpora))),
        )


NOT_SUMMED = {"peak", "fingerprints", *SAMPLE_FIELDS, "num_documents", "num_tokens", "corpora"}
SUMS = tuple(field.name for field in fields(ScenarioStatistics) if field.name not in NOT_SUMMED)
TENSORS = tuple(
    field.name
    for field in fields(ScenarioStatistics)
    if field.name not in {"num_documents", "num_tokens", "corpora"}
)


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of one model; ``scenarios`` by name. Kept in a file by statistics_file.py; ``digest`` is that file's,
    empty before there is one.
    """

    model: ModelIdentity
    shape: Shape
    scenarios: Mapping[str, ScenarioStatistics]
    digest: str = ""

    def of(self, scenario: str) -> ScenarioStatistics:
        """Raises PlanError for a scenario that was not profiled."""
        found = self.scenarios.get(scenario)
        if found is None:
            known = ", ".join(sorted(self.scenarios)) or "none"
            raise PlanError(f"there are no statistics of scenario {scenario!r}; there are: {known}")
        return found

    def merge(self, scenarios: Sequence[str]) -> ScenarioStatistics:
        """Several scenarios as one, each token counting alike. Raises PlanError as ``of``, and for none."""
        if not scenarios or len(scenarios) != len({*scenarios}):
            raise PlanError(f"merging scenarios needs at least one, each once; got {list(scenarios)}")
        return reduce(ScenarioStatistics.add, (self.of(name) for name in scenarios))

    def add(self, other: Statistics) -> Statistics:
        """Of the texts of both; a scenario that both have is summed. Raises PlanError for statistics of
        another model, or of its weights in another format, and for texts counted twice.
        """
        self.model.check(other.model, "a statistics file to be added")
        for field in fields(Shape):
            mine, theirs = getattr(self.shape, field.name), getattr(other.shape, field.name)
            if mine != theirs:
                raise PlanError(
                    f"statistics that differ in {field.name} cannot be added: {mine} and {theirs}"
                )
        merged = dict(self.scenarios)
        for name, added in other.scenarios.items():
            try:
                merged[name] = merged[name].add(added) if name in merged else added
            except PlanError as error:
                raise PlanError(f"scenario {name!r}: {error}") from error
        return Statistics(self.model, self.shape, dict(sorted(merged.items())))
