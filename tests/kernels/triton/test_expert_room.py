"""How experts are divided between a GPU that is not here and its host: the driver's answers are replaced."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("triton", reason="triton is not installed")

from world import tiny_checkpoint  # noqa: E402

from moe_runtime import expert_room  # noqa: E402
from moe_runtime.checkpoint import Checkpoint  # noqa: E402
from moe_runtime.config import EngineConfig  # noqa: E402
from moe_runtime.errors import ConfigError, PlanError  # noqa: E402
from moe_runtime.expert_room import ExpertRoom  # noqa: E402
from moe_runtime.kernels import Kernels, choose  # noqa: E402
from moe_runtime.loader import find_weights, read_model_config  # noqa: E402
from moe_runtime.placement import Placement  # noqa: E402
from moe_runtime.plan import ExpertMask, LayerMask  # noqa: E402
from moe_runtime.quant.recipe import Recipe  # noqa: E402

CONFIG = EngineConfig(device="cuda", num_blocks=8)
BLOCK_BYTES = 2 * 2 * 2 * 16 * 16 * 4  # layers, keys and values, heads, positions, dimensions, float32
EXPERT_BYTES = 3 * 256 * 128 * 4
Place = Callable[..., Placement | None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path, hidden_size=256, moe_intermediate_size=128)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Place:
    """-> where a model's experts go on a GPU with ``free`` bytes; None where they all fit."""

    def place(
        free: int, config: EngineConfig = CONFIG, wanted: Placement | None = None, **hotness: list[int]
    ) -> Placement | None:
        kernels = choose("triton", device=torch.device("meta"))
        architecture, model_config = read_model_config(folder, None)
        model, recipe = architecture.build(model_config, kernels), Recipe.of(config)
        placed: list[Placement] = []
        monkeypatch.setattr(expert_room, "free_bytes", lambda device: free)
        monkeypatch.setattr(expert_room, "_place", lambda model, kernels, placement: placed.append(placement))
        room = ExpertRoom(config, wanted, {int(name[1:]): counts for name, counts in hotness.items()} or None)
        on_gpu: Kernels = dataclasses.replace(kernels, device=torch.device("cuda", 0))
        room.place(model, on_gpu, recipe, lambda: find_weights(model, Checkpoint(folder), recipe))
        return placed[0] if placed else None

    return place


def others(folder: Path) -> int:
    """Bytes of the weights that are not experts."""
    tensors = load_file(folder / "model.safetensors")
    return sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." not in name)


def free_for(experts: int, folder: Path) -> int:
    """The least free memory that leaves room for so many experts, a cache of 8 blocks and a workspace."""
    needed = 8 * BLOCK_BYTES + others(folder) + experts * EXPERT_BYTES
    return next(free for free in range(needed, 2 * needed) if free - free // 16 >= needed)


def test_every_expert_stays_on_a_gpu_that_holds_it(place: Place, folder: Path) -> None:
    assert place(free_for(16, folder)) is None
    short = place(free_for(16, folder) - 1)
    assert short is not None and short.count("host") == 1
    none = place(free_for(0, folder))
    assert none is not None and none.count("host") == 16
    half = place(free_for(7, folder))
    assert half is not None
    assert [layer.experts("device") for layer in half.layers] == [(0, 1, 2, 3), (0, 1, 2)]


def test_the_hottest_experts_stay(place: Place, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        placement = place(free_for(3, folder), l0=[1, 1, 9, 1, 1, 1, 1, 1], l1=[7, 1, 1, 1, 1, 1, 8, 1])
    assert "those that stay have 64.9 % of the choices that were counted" in caplog.messages
    assert placement is not None
    assert [layer.experts("device") for layer in placement.layers] == [(2,), (0, 6)]
    with pytest.raises(PlanError, match="count 0 experts in layer 1"):
        place(free_for(3, folder), l0=[1, 1, 9, 1, 1, 1, 1, 1])


def test_a_smaller_format_and_a_subset_need_less(place: Place, folder: Path) -> None:
    free = free_for(8, folder)
    assert place(free, dataclasses.replace(CONFIG, quantize="experts=int8")) is None
    kept = Placement.of(ExpertMask(tuple(LayerMask(layer, 8, (0, 2, 4, 6)) for layer in range(2))))
    assert place(free, wanted=kept) == kept
    fewer = place(free - 1, wanted=kept)
    assert fewer is not None and fewer.resident == kept.resident and fewer.count("host") == 1


def test_the_flags_decide(place: Place, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked = dataclasses.replace(CONFIG, device_bytes=3 * EXPERT_BYTES - 1)
    placement = place(free_for(16, folder), asked)
    assert placement is not None and placement.count("device") == 2
    with caplog.at_level(logging.WARNING):
        place(free_for(16, folder), asked)
    assert "14 of 16 experts (5.5 MB of 6.3 MB) do not fit the 1.2 MB that cuda:0 has" in caplog.text
    with pytest.raises(
        ConfigError, match="--require-placement: 1 of 16 experts .* use --quantize int8 or int4"
    ):
        place(free_for(15, folder), dataclasses.replace(CONFIG, require_placement=True))
    assert place(free_for(16, folder), dataclasses.replace(CONFIG, require_placement=True)) is None


def test_what_is_not_experts_must_fit(place: Place, folder: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"the cache takes 65.5 KB and cuda:0 has 65.5 KB free; lower --cache-b"
    ):
        place(8 * BLOCK_BYTES - 1, dataclasses.replace(CONFIG, device_bytes=0))
    with pytest.raises(
        ConfigError, match="too little for the cache .* and room to compute; lower --cache-bytes, or"
    ):
        place(free_for(0, folder) - 1)
    asked = dataclasses.replace(CONFIG, device_bytes=9 * EXPERT_BYTES)
    with pytest.raises(
        ConfigError, match="--device-bytes wants 3.5 MB for experts; lower --cache-bytes or --device"
    ):
        place(free_for(8, folder), asked)
