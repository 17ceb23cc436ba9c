"""Statistics written by hand, for tests of what is made from them."""

import torch

from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.statistics import NUM_BUCKETS, ScenarioStatistics, Shape, Statistics

HIDDEN = 4
SUMS_BY_HAND = ("gate", "norm", "norm_squared", "gate_norm", "gate_norm_turn", "peak")


def by_hand(counts: list[list[int]], tokens: int = 10_000, **given: list[list[float]]) -> ScenarioStatistics:
    """``counts`` [L, E]; every other sum is the counts unless it is given."""
    chosen = torch.tensor(counts)
    layers, experts = chosen.shape
    sums = {name: torch.tensor(given.get(name, counts)).double() for name in SUMS_BY_HAND}
    return ScenarioStatistics(
        counts=chosen,
        answer_counts=chosen,
        documents_seen=chosen,
        outputs=torch.zeros(layers, experts, HIDDEN, dtype=torch.float64),
        pairs=torch.zeros(layers, experts, experts, dtype=torch.int64),
        tail=torch.zeros(layers, experts, NUM_BUCKETS, dtype=torch.int64),
        sample_keys=torch.zeros(0, dtype=torch.int64),
        sample_experts=torch.zeros(0, layers, 2, dtype=torch.int32),
        sample_weights=torch.zeros(0, layers, 2),
        fingerprints=torch.zeros(0, dtype=torch.int64),
        num_documents=1,
        num_tokens=tokens,
        corpora=("corpus",),
        **sums,
    )


def shape_of(layers: int, experts: int, top_k: int = 2, groups: int = 1, topk_groups: int = 1) -> Shape:
    return Shape(tuple(range(1, layers + 1)), experts, top_k, groups, topk_groups, HIDDEN, "plain")


def statistics_of(shape: Shape, **scenarios: ScenarioStatistics) -> Statistics:
    return Statistics(ModelIdentity("w", "c", "t"), shape, scenarios, "digest")
