"""Experts that come to and go from a running engine: the same bits, and memory for what is here alone.

On the CPU: on a GPU an engine of this kind is refused at start.
"""

import dataclasses
from pathlib import Path

import pytest
from scenario_files import some_mask
from world import tiny_checkpoint

from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine
from moe_runtime.errors import KernelError, PlanError
from moe_runtime.layers.growing import GrowingExperts
from moe_runtime.placement import Placement
from moe_runtime.plan import ExpertMask
from moe_runtime.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
CONFIG = EngineConfig(max_context=128, block_size=8, packed_file=False, threads=1)
PROMPT = list("What is the rate? 利率是多少？".encode())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path, moe_intermediate_size=64, hidden_size=64)


def answer(engine: Engine, scenario: str | None) -> tuple[int, ...]:
    engine.add("one", PROMPT, GREEDY, scenario=scenario)
    tokens: list[int] = []
    while engine.has_work():
        tokens += [token for event in engine.step() for token in event.token_ids]
    return tuple(tokens)


def come(engine: Engine, name: str, mask: ExpertMask) -> None:
    assert engine.live is not None
    wanted = engine.live.lacking(mask)
    engine.live.read(wanted)
    engine.live.admit(wanted, engine.masks.absent)
    engine.masks.add(name, mask)


def go(engine: Engine, name: str) -> int:
    assert engine.live is not None
    engine.masks.remove(name)
    return engine.live.trim(engine.masks.scenarios.values(), engine.masks.absent)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_experts_that_come_and_go_answer_as_if_always_there(
    folder: Path, backend: str, quantize: str
) -> None:
    config = dataclasses.replace(CONFIG, backend=backend, quantize=quantize, quantize_group=32)
    masks = {"one": some_mask(folder, 3, 0), "two": some_mask(folder, 3, 1)}
    full = Engine.load(folder, config)
    for name, mask in masks.items():
        full.masks.add(name, mask)
    expected = {name: answer(full, name) for name in masks}
    assert expected["one"] != expected["two"]

    engine = Engine.load(folder, config, placement=Placement.of(masks["one"]), live=True)
    engine.masks.add("one", masks["one"])
    assert answer(engine, "one") == expected["one"]
    with pytest.raises(PlanError, match="which this server has not loaded"):
        engine.masks.add("two", masks["two"])
    come(engine, "two", masks["two"])
    union = masks["one"].union(masks["two"])
    assert engine.masks.absent.held().num_experts == union.num_kept
    assert {name: answer(engine, name) for name in masks} == expected
    assert go(engine, "one") == union.num_kept - masks["two"].num_kept
    assert answer(engine, "two") == expected["two"]
    come(engine, "one", masks["one"])
    assert {name: answer(engine, name) for name in masks} == expected


def test_a_running_answer_is_not_disturbed_by_comings_and_goings(folder: Path) -> None:
    masks = {name: some_mask(folder, 3, seed) for seed, name in enumerate(("one", "two", "three"))}
    engine = Engine.load(folder, CONFIG, placement=Placement.of(masks["one"]), live=True)
    engine.masks.add("one", masks["one"])
    expected = answer(engine, "one")
    engine.add("running", PROMPT, GREEDY, scenario="one")
    tokens: list[int] = []
    for name in ("two", "three"):
        come(engine, name, masks[name])
        tokens += [token for event in engine.step() for token in event.token_ids]
        go(engine, name)
    while engine.has_work():
        tokens += [token for event in engine.step() for token in event.token_ids]
    assert tuple(tokens) == expected


def test_what_has_gone_is_not_in_memory_and_cannot_be_reached(folder: Path) -> None:
    engine = Engine.load(folder, CONFIG, live=True)
    keep = some_mask(folder, 3, 0)
    before = engine.masks.absent.held()
    engine.masks.add("one", keep)
    engine.masks.add("two", some_mask(folder, 3, 1))
    assert engine.live is not None
    assert engine.live.trim([keep], engine.masks.absent) == 16 - 6
    after = engine.masks.absent.held()
    assert (before.num_experts, after.num_experts) == (16, 6)
    assert after.num_bytes == before.num_bytes * 6 // 16
    for layer, mixture in engine.model.mixtures():
        assert isinstance(mixture.experts, GrowingExperts)
        packed, here = mixture.experts.packed, set(keep.kept[layer])
        for expert in range(8):
            assert bool(packed.gate_up[expert].any()) == bool(packed.down[expert].any()) == (expert in here)
    engine.add("wrong", PROMPT, GREEDY, scenario="two")  # what the server never lets happen
    with pytest.raises(KernelError, match="is not in memory"):
        engine.step()
