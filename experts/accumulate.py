"""What a traced model does, batch by batch, added up into one scenario's statistics.

Sums are float64 and made in one fixed order, so the same texts give the same bits. T tokens of a batch, C of
them counted, E experts, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from moe_runtime.errors import PlanError
from moe_runtime.experts.fingerprints import Hashes
from moe_runtime.experts.sketch import SAMPLE_SIZE, merge_samples
from moe_runtime.experts.statistics import LOWEST_BUCKET, NUM_BUCKETS, SUMS, ScenarioStatistics, Shape
from moe_runtime.layers.trace import Mixing


@dataclass(frozen=True, eq=False)
class BatchRows:
    """Which tokens of a batch count, and whose they are.

    counted    int64 [C], ascending: rows of the batch
    answers    bool [C]: whether the assistant wrote it
    documents  int64 [C]: which of the batch's documents it is of, ascending
    num_tokens, num_documents   of the batch
    keys       int64 [C]: sketch.token_keys
    continued  whether document 0 began in the batch before
    """

    counted: torch.Tensor
    answers: torch.Tensor
    documents: torch.Tensor
    num_tokens: int
    num_documents: int
    keys: torch.Tensor
    continued: bool


class Accumulator:
    """``start`` a batch, ``observe`` each of its mixtures in turn, ``end_batch``; then ``finish`` once. A
    Watcher of layers/trace.py.
    """

    def __init__(self, shape: Shape, device: torch.device) -> None:
        """``device``: where the model computes, and where the outputs are summed."""
        self._shape = shape
        self._device = device
        self._places = {layer: place for place, layer in enumerate(shape.layers)}
        layers, experts = len(shape.layers), shape.num_experts
        tails = {"pairs": (experts,), "tail": (NUM_BUCKETS,)}
        whole = {"counts", "answer_counts", "documents_seen", "pairs", "tail"}
        self._sums = {
            name: torch.zeros(
                layers, experts, *tails.get(name, ()), dtype=torch.int64 if name in whole else torch.float64
            )
            for name in SUMS
            if name != "outputs"
        }
        self._outputs = torch.zeros(layers, experts, shape.hidden, dtype=torch.float64, device=device)
        self._peak = torch.zeros(layers, experts, dtype=torch.float64)
        self._last_document = torch.zeros(layers, experts, dtype=torch.bool)  # experts it has used so far
        self._sample = [
            torch.empty(0, dtype=torch.int64),
            torch.empty(0, layers, shape.top_k, dtype=torch.int32),
            torch.empty(0, layers, shape.top_k, dtype=torch.float32),
        ]
        self._rows: BatchRows
        self._sampled: torch.Tensor  # int64: which of the counted rows may enter the sample
        self._new: list[torch.Tensor]  # what they bring to it
        self._counted: torch.Tensor

    def start(self, rows: BatchRows) -> None:
        self._rows = rows
        if not rows.continued:
            self._last_document.zero_()
        counted = torch.zeros(rows.num_tokens, dtype=torch.uint8)
        counted[rows.counted] = 1
        self._counted = counted.to(self._device)
        keys = self._sample[0]
        limit = int(keys[-1]) if len(keys) == SAMPLE_SIZE else torch.iinfo(torch.int64).max
        self._sampled = torch.nonzero(rows.keys < limit)[:, 0]
        size = (len(self._sampled), len(self._shape.layers), self._shape.top_k)
        self._new = [
            rows.keys[self._sampled],
            torch.empty(size, dtype=torch.int32),
            torch.empty(size, dtype=torch.float32),
        ]

    @property
    def counted(self) -> torch.Tensor:
        return self._counted

    def output_sums(self, layer: int) -> torch.Tensor:
        return self._outputs[self._places[layer]]

    def observe(self, mixing: Mixing) -> None:
        place = self._places[mixing.layer]
        ids, weights = self._taken(mixing.ids), self._taken(mixing.weights)
        self._new[1][:, place] = ids[self._sampled]
        self._new[2][:, place] = weights[self._sampled]
        self._count(place, ids.long())
        self._add_moments(place, mixing, ids.long(), weights.double())

    def end_batch(self) -> None:
        self._sample = merge_samples(self._sample, self._new)

    def _taken(self, tensor: torch.Tensor) -> torch.Tensor:
        """Of a tensor [T, ...] the counted rows, on the CPU."""
        whole = len(self._rows.counted) == self._rows.num_tokens
        return tensor.cpu() if whole else tensor.cpu()[self._rows.counted]

    def _count(self, place: int, ids: torch.Tensor) -> None:
        """ids int64 [C, top_k]."""
        rows, experts = self._rows, self._shape.num_experts
        used = torch.zeros(len(ids), experts).scatter_(1, ids, 1.0)  # float32 counts of a batch are exact
        pairs = (used.T @ used).long()
        self._sums["pairs"][place] += pairs
        self._sums["counts"][place] += pairs.diagonal()
        self._sums["answer_counts"][place] += torch.bincount(ids[rows.answers].view(-1), minlength=experts)
        owners = (rows.documents.unsqueeze(1) * experts + ids).view(-1)
        by_document = torch.bincount(owners, minlength=rows.num_documents * experts).view(-1, experts) > 0
        known = self._last_document[place]
        self._sums["documents_seen"][place] += by_document.sum(0) - (by_document[0] & known).long()
        self._last_document[place] = by_document[-1] | (known & (rows.num_documents == 1))

    def _add_moments(self, place: int, mixing: Mixing, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """ids int64 [C, top_k], weights float64 [C, top_k]."""
        experts = ids.view(-1)
        # 1. Per pair of token and expert.
        squares = self._taken(mixing.squares)
        lengths = squares.sqrt()
        shares = weights * lengths
        turned, base = _turn(self._taken(mixing.residual), self._taken(mixing.mixed))
        for name, values in (
            ("gate", weights),
            ("norm", lengths),
            ("norm_squared", squares),
            ("gate_norm", shares),
            ("gate_norm_turn", shares * turned.unsqueeze(1)),
        ):
            self._sums[name][place].index_add_(0, experts, values.view(-1))
        peaks = self._taken(mixing.peaks).double().view(-1)
        self._peak[place].scatter_reduce_(0, experts, peaks, "amax")
        # 2. How large they are against the residual stream.
        octaves = torch.log2(shares / base.unsqueeze(1)) - LOWEST_BUCKET
        buckets = ((octaves.nan_to_num() * 2).floor() + 1).clamp(0, NUM_BUCKETS - 1).long()
        tail = self._sums["tail"][place]
        tail += torch.bincount(experts * NUM_BUCKETS + buckets.view(-1), minlength=tail.numel()).view_as(tail)

    def finish(
        self, corpus_digest: str, fingerprints: Hashes, num_documents: int, num_tokens: int
    ) -> ScenarioStatistics:
        """Raises PlanError when the model's numbers were not finite."""
        whole = {**self._sums, "outputs": self._outputs.cpu()}
        for name, sums in whole.items():
            if not bool(sums.isfinite().all()):
                layer = self._shape.layers[int(torch.nonzero(~sums.isfinite())[0, 0])]
                raise PlanError(
                    f"layer {layer}: {name} is not finite; the model computes NaN or infinity on this text"
                )
        return ScenarioStatistics(
            **whole,
            peak=self._peak,
            sample_keys=self._sample[0],
            sample_experts=self._sample[1],
            sample_weights=self._sample[2],
            fingerprints=torch.from_numpy(fingerprints),
            num_documents=num_documents,
            num_tokens=num_tokens,
            corpora=(corpus_digest,),
        )


def _turn(residual: torch.Tensor, mixed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both [C, H] -> float64 [C]: max(0, 1 - cos(residual, residual + mixed)), and the residual's length,
    never 0. From the three products of the two vectors, which einsum makes without more passes over them.
    """
    vectors = residual.double().numpy(), mixed.double().numpy()
    base, both, update = (
        torch.from_numpy(np.einsum("th,th->t", vectors[first], vectors[second]))
        for first, second in ((0, 0), (0, 1), (1, 1))
    )
    smallest = torch.finfo(torch.float64).tiny
    after = (base + 2 * both + update).clamp_min(smallest)
    cosine = (base + both) / (base.clamp_min(smallest) * after).sqrt()
    return (1 - cosine).clamp_min(0), base.clamp_min(smallest).sqrt()
