"""A sample of tokens that is the same however the texts are parted: those with the smallest hashes.

From their routing the weight that any set of kept experts would lose is known token by token, not just on
average: the mean follows from the gate sums, its spread does not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from moe_runtime.experts.fingerprints import mixed

SAMPLE_SIZE = 2048  # tokens
SAMPLE_FIELDS = ("sample_keys", "sample_experts", "sample_weights")


def token_keys(token_ids: Sequence[int]) -> torch.Tensor:
    """int64 [T], at least 0: hashes of each token's document and its position in it."""
    document = hashlib.sha256(np.array(token_ids, dtype="<i8").tobytes()).digest()[:8]
    places = np.arange(len(token_ids), dtype=np.uint64) + np.frombuffer(document, dtype="<u8")
    return torch.from_numpy((mixed(places) >> np.uint64(1)).view(np.int64))


def smallest(keys: torch.Tensor, size: int = SAMPLE_SIZE) -> torch.Tensor:
    """int64 [<= size]: where the smallest keys are, in ascending order of key."""
    return keys.argsort(stable=True)[:size]


def merge_samples(mine: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The sample of two texts together from the SAMPLE_FIELDS of each."""
    joined = [torch.cat(pair) for pair in zip(mine, theirs, strict=True)]
    kept = smallest(joined[0])
    return [part[kept].contiguous() for part in joined]


def lost_weight(experts: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """float64 [S]: the share of each sampled token's gate weight, a mean over the layers, that goes to
    experts outside ``kept`` (bool [L, E]). ``experts`` and ``weights``: SAMPLE_FIELDS.
    """
    layers = torch.arange(kept.shape[0]).view(1, -1, 1)
    lost = ~kept[layers, experts.long()]
    weights = weights.double()
    return ((weights * lost).sum(-1) / weights.sum(-1)).mean(-1)
