"""Which experts a model's texts chose most: who stays on a GPU that cannot hold all of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from moe_runtime.experts.file_digests import DigestMemo
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.statistics_file import load_statistics


def expert_counts(
    path: Path, model_dir: Path, scenarios: Sequence[str] = (), memo: DigestMemo | None = None
) -> tuple[dict[int, list[int]], tuple[str, ...]]:
    """By decoder layer with a router, how many tokens chose each expert in the texts of ``scenarios``, or of
    all in the file: what ``Engine.load`` takes as ``hotness``. And whose texts these are, sorted. ``memo``
    may know the model's files.

    A text that was profiled for two scenarios counts twice, as both send it. Raises PlanError for a file that
    cannot be read, is of another model than the one in ``model_dir``, or knows nothing of a scenario.
    """
    found = load_statistics(path)
    names = tuple(sorted(scenarios or found.scenarios))
    counts = torch.stack([found.of(name).counts for name in names]).sum(0)
    ModelIdentity.of(model_dir, memo).check(found.model, path.name)  # last: it may read the whole model
    return dict(zip(found.shape.layers, counts.tolist(), strict=True)), names
