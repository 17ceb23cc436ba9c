"""A traced model is the served one, bit for bit, and what it tells of its mixtures is what they did."""

from pathlib import Path

import pytest
import torch
from model_oracle import BACKENDS, load
from world import ARCHITECTURES, tiny_checkpoint

from moe_runtime.batch import Batch, no_masks
from moe_runtime.config import EngineConfig
from moe_runtime.engine_load import load_parts
from moe_runtime.errors import ConfigError
from moe_runtime.layers.trace import Mixing, trace
from moe_runtime.placement import Placement
from moe_runtime.plan import ExpertMask, LayerMask

TOKENS = 21


def batch() -> Batch:
    """One sequence of TOKENS tokens, all with logits."""
    positions = torch.arange(TOKENS)
    return Batch(
        token_ids=torch.randint(250, (TOKENS,), generator=torch.Generator().manual_seed(0)),
        positions=positions.int(),
        slots=positions,
        sequence_rows=torch.zeros(TOKENS, dtype=torch.int32),
        block_tables=torch.arange(3, dtype=torch.int32).unsqueeze(0),
        logit_rows=positions,
        mask_rows=no_masks(TOKENS),
    )


class Seen:
    """A watcher that keeps everything."""

    def __init__(self) -> None:
        self.seen: list[Mixing] = []
        self.sums: dict[int, torch.Tensor] = {}
        self.counted = torch.ones(TOKENS, dtype=torch.uint8)

    def output_sums(self, layer: int) -> torch.Tensor:
        return self.sums.setdefault(layer, torch.zeros(8, 32, dtype=torch.float64))

    def observe(self, mixing: Mixing) -> None:
        self.seen.append(mixing)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_trace_computes_what_serving_computes(tmp_path: Path, architecture: str, backend: str) -> None:
    model = load(tiny_checkpoint(tmp_path, architecture), backend)
    watcher = Seen()
    normed = trace(model, batch(), model.new_cache(3, 8), watcher)
    assert torch.equal(model.head(normed), model.forward(batch(), model.new_cache(3, 8)))
    assert [mixing.layer for mixing in watcher.seen] == [number for number, _ in model.mixtures()]
    for mixing in watcher.seen:
        assert mixing.residual.shape == mixing.mixed.shape == (TOKENS, 32)
        assert mixing.squares.shape == mixing.peaks.shape == (TOKENS, 2)
        assert float(watcher.sums[mixing.layer].square().sum()) > 0


def test_a_model_without_some_of_its_experts_cannot_be_traced(tmp_path: Path) -> None:
    mask = ExpertMask(tuple(LayerMask(layer, 8, (0, 1, 5)) for layer in range(2)))
    config = EngineConfig(packed_file=False)
    model = load_parts(tiny_checkpoint(tmp_path), config, Placement.of(mask), None).model
    with pytest.raises(ConfigError, match="layer 0: some experts are elsewhere or absent"):
        trace(model, batch(), model.new_cache(3, 8), Seen())
