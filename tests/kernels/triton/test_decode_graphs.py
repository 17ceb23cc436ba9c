"""Decode steps padded and replayed over static memory, against the same steps launched kernel by kernel: bit
for bit, with the kernels that serve. Where there is no GPU, a captured graph is the call itself, made again.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from model_oracle import BLOCK_SIZE, Paged  # noqa: E402
from world import tiny_checkpoint  # noqa: E402

from moe_runtime.batch import Batch  # noqa: E402
from moe_runtime.config import EngineConfig  # noqa: E402
from moe_runtime.engine import Engine  # noqa: E402
from moe_runtime.graph_recorder import Recorder, recorder_for  # noqa: E402
from moe_runtime.graphs import DecodeGraphs  # noqa: E402
from moe_runtime.kernels import RouteMeter, choose  # noqa: E402
from moe_runtime.layers.cache import Cache  # noqa: E402
from moe_runtime.layers.decoder import Decoder  # noqa: E402
from moe_runtime.loader import load_model  # noqa: E402
from moe_runtime.sampling import SamplingParams  # noqa: E402

SEQUENCES = 3


class Rerun:
    """Stands in for a GPU's recorder."""

    def __init__(self) -> None:
        self.replayed = 0

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self.replayed += 1
            run()

        return replay

    def free_bytes(self) -> int:
        return 1 << 30

    def settle(self) -> None:
        raise AssertionError("nothing failed")


def recorder(device: torch.device) -> Recorder:
    return recorder_for(device) or Rerun()


class Replayed:
    """A model as Paged drives it: each step is launched kernel by kernel over a copy of the cache, and then
    replayed. Rows obey the first mask, the second and none, by turns.
    """

    def __init__(self, model: Decoder, metered: bool) -> None:
        self.model = model
        self.metered = metered
        self.lost = torch.zeros(0)

    def new_cache(self, num_blocks: int, block_size: int) -> Cache:
        self.cache = self.model.new_cache(num_blocks, block_size)
        self.graphs = DecodeGraphs(
            self.model, self.cache, recorder(self.model.device), 4, block_size=block_size, max_blocks=7
        )
        return self.cache

    def forward(self, batch: Batch, cache: Cache) -> torch.Tensor:
        rows = (torch.arange(len(batch.token_ids)) + int(batch.positions[0])).int() % 3 - 1
        batch = replace(batch, mask_rows=rows)
        plain, other = copy.deepcopy(cache), self._meter(len(rows))
        expected, meter = self.model.forward(batch, plain, other), self._meter(len(rows))
        logits = self.graphs.forward(batch, meter).clone()
        assert torch.equal(logits, expected)
        for one, two in zip(plain.layers, cache.layers, strict=True):
            assert torch.equal(one.keys, two.keys)
            assert one.values is None or (two.values is not None and torch.equal(one.values, two.values))
        if meter is not None and other is not None and meter.lost is not None and other.lost is not None:
            assert torch.equal(meter.lost, other.lost) and torch.equal(meter.outside, other.outside)
            self.lost = torch.cat((self.lost, meter.lost.cpu()))
        return logits

    def _meter(self, num_tokens: int) -> RouteMeter | None:
        return RouteMeter.zeros(num_tokens, self.model.device) if self.metered else None


@pytest.mark.parametrize(
    ("architecture", "kv_heads", "metered"),
    [("qwen3_moe", 1, True), ("deepseek_v3", 4, False)],
    ids=["gqa", "mla"],
)
def test_a_replayed_step_is_the_same_bits_in_logits_cache_and_lost_mass(
    tmp_path: Path, device: torch.device, architecture: str, kv_heads: int, metered: bool
) -> None:
    folder = tiny_checkpoint(tmp_path, architecture, num_key_value_heads=kv_heads)
    model = load_model(folder, choose("triton", device=device))
    for number, mixture in model.mixtures():
        allowed = torch.rand(2, 8, generator=torch.Generator().manual_seed(number)).argsort(1) < 5
        mixture.masks[:2] = allowed.to(device)
    replayed = Replayed(model, metered)
    paged = Paged(replayed, SEQUENCES, 12)  # type: ignore[arg-type]
    torch.manual_seed(7)
    for layer in paged.cache.layers:
        for part in (layer.keys, layer.values):
            if part is not None:
                part.copy_(torch.randn(part.shape))
    paged.lengths = [1, 6, 7]
    for rows in ((0, 1, 2), (2, 1, 0)):
        paged.forward({row: torch.randint(0, 256, (1,)) for row in rows})
    (shape,) = replayed.graphs._replays
    assert (shape.tokens, shape.metered) == (4, metered) and bool(replayed.lost.any()) is metered


def test_rows_that_pad_write_nothing_and_read_no_expert(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_checkpoint(tmp_path), choose("triton", device=device))
    cache = model.new_cache(4, BLOCK_SIZE)
    chosen: list[torch.Tensor] = []
    for _, mixture in model.mixtures():

        def add_norm(x: Any, ids: torch.Tensor, *rest: Any, go: Any = mixture.experts.add_norm) -> Any:
            chosen.append(ids)
            return go(x, ids, *rest)

        monkeypatch.setattr(mixture.experts, "add_norm", add_norm)
    logits = model.forward(Batch.of_nobody(3, 2), cache)
    assert logits.isfinite().all()
    assert len(chosen) == 2 and all(bool((ids == -1).all()) for ids in chosen)
    assert not any(bool(part.any()) for layer in cache.layers for part in (layer.keys, layer.values))


def test_the_engine_replays_and_one_request_with_nan_fails_alone(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    counting = Rerun()
    if device.type == "cpu":
        monkeypatch.setattr("moe_runtime.graphs.recorder_for", lambda _: counting)
    kind = "cuda" if device.type == "cuda" else "cpu"
    config = EngineConfig(device=kind, backend="triton", num_blocks=4, max_running=2, max_batch_tokens=8)
    engine = Engine.load(tiny_checkpoint(tmp_path), config)
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    [[alone]] = engine.generate([[65, 66, 67]], params)
    assert alone.finish_reason == "length" and (counting.replayed == 1 or device.type == "cuda")
    engine.model.embedding.table[9] = torch.nan
    [[clean], [broken]] = engine.generate([[65, 66, 67], [65, 9]], params)
    assert clean.token_ids == alone.token_ids and clean.error is None
    assert broken.finish_reason == "error" and broken.error is not None and "finite" in broken.error
