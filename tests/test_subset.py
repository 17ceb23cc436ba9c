"""A model of which some experts were left out: the same bits as under a mask, and nothing else in memory."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from model_oracle import chunked_logits
from safetensors.torch import load_file
from world import tiny_checkpoint, write_weights

from moe_runtime.batch import Batch
from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine
from moe_runtime.errors import CheckpointError, KernelError, PlanError, RequestError
from moe_runtime.expert_room import ExpertRoom, describe
from moe_runtime.kernels import choose
from moe_runtime.layers.cache import Cache
from moe_runtime.layers.decoder import Decoder
from moe_runtime.loader import load_model, read_model_config
from moe_runtime.packed_store import PackedStore
from moe_runtime.placement import Placement
from moe_runtime.plan import ExpertMask, LayerMask
from moe_runtime.quant.recipe import Recipe
from moe_runtime.sampling import SamplingParams

PROMPTS = [torch.arange(40, 61), torch.arange(90, 99)]
PLAIN, INT4 = EngineConfig(), EngineConfig(quantize="int4", quantize_group=32)


def some_experts(folder: Path, kept: tuple[tuple[int, ...], ...] = ((0, 3, 5), (1, 2, 3, 7))) -> ExpertMask:
    """Of each layer with a router, in turn."""
    _, config = read_model_config(folder, None)
    routed = [number for number, has_router in enumerate(config.moe_layers) if has_router]
    return ExpertMask(
        tuple(
            LayerMask(number, config.moe.num_experts, kept[index % len(kept)])
            for index, number in enumerate(routed)
        )
    )


def load(folder: Path, backend: str, mask: ExpertMask | None = None, config: EngineConfig = PLAIN) -> Decoder:
    room = None if mask is None else ExpertRoom(config, Placement.of(mask))
    return load_model(folder, choose(backend), Recipe.of(config), room=room)


@dataclasses.dataclass
class Masked:
    """A model whose tokens all obey the first row of its masks."""

    model: Decoder
    in_python: bool = False

    def new_cache(self, num_blocks: int, block_size: int) -> Cache:
        cache = self.model.new_cache(num_blocks, block_size)
        return dataclasses.replace(cache, program=None) if self.in_python else cache

    def forward(self, batch: Batch, cache: Cache) -> torch.Tensor:
        return self.model.forward(
            dataclasses.replace(batch, mask_rows=torch.zeros_like(batch.mask_rows)), cache
        )


def under(mask: ExpertMask, model: Decoder) -> Decoder:
    """The whole model, its first row of masks being ``mask``."""
    for (_, mixture), layer in zip(model.mixtures(), mask.layers, strict=True):
        mixture.masks[0] = 0
        mixture.masks[0, list(layer.kept)] = 1
    return model


def logits(model: Decoder, in_python: bool = False) -> torch.Tensor:
    masked: Any = Masked(model, in_python)
    return torch.cat(chunked_logits(masked, PROMPTS))


@pytest.mark.parametrize(
    ("architecture", "backend", "config"),
    [
        ("qwen3_moe", "cpu", PLAIN),
        ("qwen3_moe", "cpu", INT4),
        ("qwen3_moe", "reference", PLAIN),
        ("qwen2_moe", "cpu", INT4),
        ("deepseek_v3", "cpu", INT4),
        ("deepseek_v3", "cpu layer by layer", PLAIN),
    ],
    ids=lambda value: value if isinstance(value, str) else value.quantize,
)
def test_a_part_gives_the_bits_of_the_whole_under_the_same_mask(
    tmp_path: Path, architecture: str, backend: str, config: EngineConfig
) -> None:
    folder = tiny_checkpoint(tmp_path, architecture, torch_dtype="bfloat16")
    mask, name = some_experts(folder), backend.split()[0]
    whole, part = load(folder, name, None, config), load(folder, name, mask, config)
    expected = logits(under(mask, whole), in_python=backend != "cpu")
    assert torch.equal(logits(part, in_python=backend != "cpu"), expected)
    for (_, mixture), layer in zip(part.mixtures(), mask.layers, strict=True):
        assert mixture.experts.packed.num_experts == len(layer.kept)  # type: ignore[union-attr]


def test_what_is_everywhere_costs_nothing(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    everything = ExpertMask.full({0: 8, 1: 8})
    for _, mixture in load(folder, "cpu", everything).mixtures():
        assert mixture.experts.residence is None and mixture.placed is None
    mixed = ExpertMask((LayerMask(0, 8, (1, 2)), LayerMask(1, 8, tuple(range(8)))))
    (_, part), (_, whole) = load(folder, "cpu", mixed).mixtures()
    assert part.experts.residence is not None and whole.experts.residence is None


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_token_that_wants_an_absent_expert_is_an_error_with_names(tmp_path: Path, backend: str) -> None:
    folder = tiny_checkpoint(tmp_path)
    model = load(folder, backend, some_experts(folder))
    with pytest.raises(
        KernelError, match=r"layer 0: expert [12467], chosen by token \d+ of the batch, is not"
    ):
        chunked_logits(model, PROMPTS)
    assert logits(model).isfinite().all(), "and the model goes on"


def test_tensors_of_absent_experts_must_be_there_and_are_not_read(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    mask, tensors = some_experts(folder), load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.{}.up_proj.weight"
    expected = logits(load(folder, "cpu", mask))
    spoiled = {**tensors, name.format(1): torch.full_like(tensors[name.format(1)], torch.nan)}
    write_weights(folder, spoiled)
    with pytest.raises(CheckpointError, match="NaN"):
        load(folder, "cpu")
    assert torch.equal(logits(load(folder, "cpu", mask)), expected)
    for change, message in (
        ({name.format(1): None}, r"experts.1.up_proj.weight: missing from the checkpoint"),
        ({name.format(1): torch.zeros(3, 3)}, r"experts.1.up_proj.weight: shape \[3, 3\]"),
    ):
        changed = {key: value for key, value in {**tensors, **change}.items() if value is not None}
        write_weights(folder, changed)
        with pytest.raises(CheckpointError, match=message):
            load(folder, "cpu", mask)


def test_a_placement_that_does_not_fit_is_refused_before_loading(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    for mask, message in (
        (ExpertMask.full({0: 8}), "it has 0 experts in layer 1, the model 8"),
        (ExpertMask.full({0: 8, 1: 9}), "it has 9 experts in layer 1"),
        (ExpertMask((LayerMask(0, 8, (4,)), LayerMask(1, 8, (1, 2)))), "leaves 1 experts in layer 0, each"),
    ):
        with pytest.raises(PlanError, match=message):
            load(folder, "cpu", mask)


# --- packed files -------------------------------------------------------------------------------------------


def start(folder: Path, mask: ExpertMask | None, config: EngineConfig = INT4) -> tuple[Decoder, PackedStore]:
    recipe = Recipe.of(config)
    store = PackedStore(folder, recipe, None, True, mask)
    room = None if mask is None else ExpertRoom(config, Placement.of(mask))
    model = load_model(folder, choose("cpu"), recipe, store, None, room)
    store.wait()
    return model, store


def test_a_part_has_a_packed_file_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_checkpoint(tmp_path / "model", torch_dtype="bfloat16", hidden_size=64)
    mask, other = some_experts(folder), some_experts(folder, ((0, 1), (2, 3)))
    _, whole = start(folder, None)
    first, store = start(folder, mask)
    expected = logits(first)
    assert whole.path.exists() and store.path.exists() and store.path.name.startswith("int4-g32_some-")
    assert store.path.stat().st_size < whole.path.stat().st_size
    with caplog.at_level(logging.INFO, logger="moe_runtime.packed"):
        second, _ = start(folder, mask)
        assert "weights mapped from" in caplog.text
        assert torch.equal(logits(second), expected)
        assert second.config.weight_bytes == first.config.weight_bytes
    third, elsewhere = start(folder, other)
    assert elsewhere.path != store.path
    assert torch.equal(logits(third), logits(load(folder, "cpu", other, INT4)))


def test_a_packed_file_of_other_experts_is_not_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_checkpoint(tmp_path / "model", torch_dtype="bfloat16", hidden_size=64)
    mask, other = some_experts(folder), some_experts(folder, ((0, 3, 6), (1, 2, 3, 7)))
    expected, part = start(folder, mask)
    _, whole = start(folder, None)
    _, different = start(folder, other)
    for wrong in (whole, different):  # as many experts in each layer, or all of them
        part.path.write_bytes(wrong.path.read_bytes())
        caplog.clear()
        again, _ = start(folder, mask)
        assert "stale: set of experts differs" in caplog.text
        assert torch.equal(logits(again), logits(expected))
    whole.path.write_bytes(part.path.read_bytes())
    caplog.clear()
    start(folder, None)
    assert "stale: set of experts differs" in caplog.text


# --- the engine ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("compute_device")
def test_the_engine_answers_as_the_whole_model_does_under_the_scenario(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_checkpoint(tmp_path, "deepseek_v3")
    mask = some_experts(folder, ((0, 2, 3, 6),))
    config = EngineConfig(max_context=128, packed_file=False)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2)
    answers = []
    for placement in (None, Placement.of(mask)):
        with caplog.at_level(logging.INFO, logger="moe_runtime"):
            engine = Engine.load(folder, config, placement=placement)
        engine.masks.add("credit", mask)
        engine.add("request", list(range(60, 80)), params, scenario="credit")
        events = []
        while engine.has_work():
            events += engine.step()
        answers.append([dataclasses.replace(event, lost_mass=None) for event in events])
    assert answers[0] == answers[1] and answers[0][-1].finish_reason == "length"
    assert [line.split() for line in caplog.text.splitlines()[-2:]][1][-3:] == ["KB)", "0", "4"]


@pytest.mark.usefixtures("compute_device")
def test_the_engine_refuses_what_would_need_absent_experts(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    mask = some_experts(folder)
    engine = Engine.load(folder, EngineConfig(packed_file=False), placement=Placement.of(mask))
    with pytest.raises(RequestError, match="holds the experts of its scenarios alone; name one of them"):
        engine.add("request", [1, 2, 3], SamplingParams())
    assert not engine.has_work()
    wider = mask.union(some_experts(folder, ((0, 3, 6), (1, 2))))
    with pytest.raises(PlanError, match="scenario 'wealth' uses expert 6 of layer 0"):
        engine.masks.add("wealth", wider)
    engine.masks.add("wealth", mask)


@pytest.mark.usefixtures("compute_device")
def test_the_accuracy_gate_measures_what_is_there(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    placement = Placement.of(some_experts(folder))
    config = EngineConfig(quantize="int8", max_quant_kl=5.0, packed_file=False)
    assert Engine.load(folder, config, placement=placement).model.config.weight_bytes > 0


def test_the_description_tells_bytes_by_tier(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    model = load(folder, "reference", some_experts(folder))
    sizes = [mixture.experts.packed.num_bytes for _, mixture in model.mixtures()]  # type: ignore[union-attr]
    assert sizes == [3 * 3 * 32 * 16 * 4, 4 * 3 * 32 * 16 * 4]
    assert describe(model).splitlines() == [
        "experts on cpu, on the host and left out",
        "layers  device       host  absent",
        "0       3 (18.4 KB)  0     5",
        "1       4 (24.6 KB)  0     4",
        "all     7 (43.0 KB)  0     9",
    ]
