"""Scenarios in one engine: masked rows, mixed batches, cached prefixes apart, nothing outside a mask."""

import dataclasses
from pathlib import Path

import pytest
import torch
from world import tiny_checkpoint

from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine
from moe_runtime.errors import ModelNotFound, PlanError
from moe_runtime.masks import MaskTable
from moe_runtime.output import Completion
from moe_runtime.plan import ExpertMask, LayerMask
from moe_runtime.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=1)
CONFIG = EngineConfig(max_context=128, max_batch_tokens=48, block_size=8, packed_file=False)
pytestmark = pytest.mark.usefixtures("compute_device")


def random_mask(engine: Engine, kept: int, seed: int) -> ExpertMask:
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for number, mixture in engine.model.mixtures():
        count = mixture.config.num_experts
        ids = torch.randperm(count, generator=generator)[:kept].sort().values
        layers.append(LayerMask(number, count, tuple(ids.tolist())))
    return ExpertMask(tuple(layers))


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randint(0, 256, (20 + row,), generator=generator).tolist() for row in range(count)]


def answers(engine: Engine, asked: list[tuple[list[int], str | None]]) -> list[Completion]:
    """All at once."""
    for row, (ids, scenario) in enumerate(asked):
        engine.add(str(row), ids, GREEDY, scenario=scenario)
    events: dict[str, list] = {str(row): [] for row in range(len(asked))}  # type: ignore[type-arg]
    while engine.has_work():
        for event in engine.step():
            events[event.request_id].append(event)
    return [Completion.of(events[str(row)]) for row in range(len(asked))]


@pytest.fixture(params=["qwen3_moe", "deepseek_v3"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return tiny_checkpoint(tmp_path, request.param)


def test_a_batch_of_mixed_scenarios_gives_each_what_it_gives_alone(folder: Path) -> None:
    names = [None, "credit", "wealth", "credit", None, "wealth"]
    asked = list(zip(prompts(6), names, strict=True))

    def loaded() -> Engine:
        engine = Engine.load(folder, CONFIG)
        for seed, name in enumerate(("credit", "wealth")):
            engine.masks.add(name, random_mask(engine, 5, seed))
        return engine

    engine = loaded()
    together = answers(engine, asked)
    for pair, expected in zip(asked, together, strict=True):
        alone = answers(loaded(), [pair])[0]
        assert (alone.token_ids, alone.logprobs) == (expected.token_ids, expected.logprobs)
    full = answers(loaded(), [(ids, None) for ids, _ in asked])
    assert [one.token_ids == other.token_ids for one, other in zip(full, together, strict=True)] == [
        name is None for name in names
    ]
    assert engine.stats().outside_mask == 0


def test_all_backends_obey_a_mask_alike(folder: Path) -> None:
    asked = list(zip(prompts(4), [None, "credit", "wealth", "credit"], strict=True))
    told = []
    for backend in ("auto", "reference"):
        engine = Engine.load(folder, dataclasses.replace(CONFIG, backend=backend))
        for seed, name in enumerate(("credit", "wealth")):
            engine.masks.add(name, random_mask(engine, 5, seed))
        told.append([completion.token_ids for completion in answers(engine, asked)])
    assert told[0] == told[1]


def test_lost_mass_is_zero_under_a_full_mask_and_known_under_a_small_one(tmp_path: Path) -> None:
    engine = Engine.load(tiny_checkpoint(tmp_path), CONFIG)
    full = ExpertMask.full({number: layer.config.num_experts for number, layer in engine.model.mixtures()})
    engine.masks.add("all", full)
    engine.masks.add("few", random_mask(engine, 4, 1))
    last = {}
    for name, ids in zip(("all", "few", None), prompts(3), strict=True):
        engine.add(name or "full", ids, GREEDY, scenario=name)
    while engine.has_work():
        for event in engine.step():
            last[event.request_id] = event.lost_mass
    assert last["all"] == 0.0 and last["full"] is None and last["few"] is not None and 0 < last["few"] < 1


def test_cached_prefixes_are_shared_within_a_mask_only(folder: Path) -> None:
    engine = Engine.load(folder, CONFIG)
    engine.masks.add("credit", random_mask(engine, 5, 0))
    engine.masks.add("same", random_mask(engine, 5, 0))
    engine.masks.add("wealth", random_mask(engine, 5, 1))
    ids = prompts(1)[0] * 2
    cached = {}
    for name in ("credit", "wealth", None, "credit", "same"):
        engine.add("one", ids, GREEDY, scenario=name)
        while engine.has_work():
            for event in engine.step():
                cached[name] = event.num_cached_tokens
    assert cached == {"credit": 32, "wealth": 0, None: 0, "same": 32}


def test_a_scenario_that_leaves_serves_its_running_requests_to_their_end(folder: Path) -> None:
    engine = Engine.load(folder, CONFIG)
    engine.masks.add("credit", random_mask(engine, 5, 0))
    expected = answers(engine, [(prompts(1)[0], "credit")])[0].token_ids
    engine.add("one", prompts(1)[0], GREEDY, scenario="credit")
    engine.step()
    assert engine.masks.users("credit") == 1
    engine.masks.remove("credit")
    engine.masks.add("wealth", random_mask(engine, 5, 1))  # another row: that one is in use
    with pytest.raises(ModelNotFound, match="no scenario 'credit'; there are: wealth"):
        engine.add("two", prompts(1)[0], GREEDY, scenario="credit")
    got = [token for _ in range(20) for event in engine.step() for token in event.token_ids]
    assert tuple(got) == expected[1:]
    engine.masks.add("credit", random_mask(engine, 5, 0))
    assert engine.masks.users("credit") == 0


def test_masks_that_do_not_fit_the_model_are_refused(folder: Path) -> None:
    engine = Engine.load(folder, CONFIG)
    table: MaskTable = engine.masks
    good = random_mask(engine, 5, 0)
    table.add("credit", good)
    with pytest.raises(PlanError, match="two scenarios are called 'credit'"):
        table.add("credit", good)
    with pytest.raises(PlanError, match=r"layer \d keeps 1 experts, each token takes"):
        table.add("few", random_mask(engine, 1, 0))
    with pytest.raises(PlanError, match="made for another model"):
        table.add("other", ExpertMask((LayerMask(0, 99, tuple(range(9))),)))
    for number in range(63):
        table.add(f"scenario {number}", good)
    with pytest.raises(PlanError, match="64 scenarios are served already"):
        table.add("one more", good)
