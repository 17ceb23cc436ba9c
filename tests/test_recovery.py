"""Scenarios that make up for the experts they lack, in one engine with scenarios that do not."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from planted import domain_mask, planted_checkpoint, say
from test_masks import CONFIG, GREEDY, answers, prompts, random_mask
from world import tiny_checkpoint

from moe_runtime.batch import Batch
from moe_runtime.engine import Engine
from moe_runtime.errors import PlanError
from moe_runtime.kernels import choose
from moe_runtime.layers.moe import MAX_MASKS
from moe_runtime.loader import load_model
from moe_runtime.masks import MaskTable
from moe_runtime.placement import Placement
from moe_runtime.plan import ExpertMask
from moe_runtime.recovery import Kind, Recovery
from moe_runtime.recovery_rows import _has_no_room

pytestmark = pytest.mark.usefixtures("compute_device")


def made(mask: ExpertMask, kind: Kind, hidden: int = 32, seed: int = 0, size: float = 1.0) -> Recovery:
    """Random numbers of ``size``."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for layer in mask.layers:
        if kind == "constants":
            shape: tuple[int, ...] = (layer.num_experts - len(layer.kept), hidden)
        else:
            shape = (layer.num_experts,)
        layers[layer.layer] = size * torch.randn(shape, generator=generator)
        if kind == "router":
            layers[layer.layer][[e for e in range(layer.num_experts) if e not in layer.kept]] = 0.0
    return Recovery(kind, layers)


def changed(recovery: Recovery, layer: int, numbers: torch.Tensor) -> Recovery:
    return dataclasses.replace(recovery, layers={**recovery.layers, layer: numbers})


SCENARIOS: Mapping[str, Kind | None] = {"plain": None, "constants": "constants", "router": "router"}


def add_all(engine: Engine) -> Engine:
    """One mask with each recovery and with none, and other constants under another mask."""
    mask, other = random_mask(engine, 5, 0), random_mask(engine, 4, 1)
    for name, kind in SCENARIOS.items():
        engine.masks.add(name, mask, recovery=None if kind is None else made(mask, kind))
    engine.masks.add("other", other, recovery=made(other, "constants", seed=1))
    return engine


@pytest.fixture(params=["qwen3_moe", "deepseek_v3"])
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    return tiny_checkpoint(tmp_path, request.param)


def told(engine: Engine, asked: list[tuple[list[int], str | None]]) -> list[tuple[Any, Any]]:
    return [(answer.token_ids, answer.logprobs) for answer in answers(engine, asked)]


def test_every_row_of_a_mixed_batch_gets_what_it_gets_alone(folder: Path) -> None:
    names = [None, "plain", "constants", "router", "other", "constants"]
    asked = list(zip(prompts(6), names, strict=True))
    engine = add_all(Engine.load(folder, CONFIG))
    together = told(engine, asked)
    for pair, expected in zip(asked, together, strict=True):
        assert told(add_all(Engine.load(folder, CONFIG)), [pair]) == [expected]
    assert engine.stats().outside_mask == 0

    without = Engine.load(folder, CONFIG)
    without.masks.add("plain", random_mask(without, 5, 0))
    assert told(without, asked[:2]) == together[:2]
    as_plain = told(without, [(ids, "plain") for ids, _ in asked[2:4]])
    assert all(one != two for one, two in zip(as_plain, together[2:4], strict=True))


def test_all_backends_make_up_alike(folder: Path) -> None:
    asked: list[tuple[list[int], str | None]]
    asked = list(zip(prompts(4), ["constants", "router", "other", "plain"], strict=True))
    tokens = []
    for backend in ("auto", "reference"):
        engine = add_all(Engine.load(folder, dataclasses.replace(CONFIG, backend=backend)))
        tokens.append([answer.token_ids for answer in answers(engine, asked)])
        assert engine.stats().outside_mask == 0
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize(
    "variant", ["softmax, not normalised", "sigmoid, bias, groups, dense first layer, shared"]
)
def test_constants_that_are_right_change_no_bit(tmp_path: Path, variant: str) -> None:
    """Experts outside the mask give zero for everything, and so do the constants: the full model's bits, in
    the domain and outside, where the mask alone would choose others.
    """

    def silence(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            expert = name.partition("experts.")[2].partition(".")[0]
            if name.endswith("down_proj.weight") and expert.isdigit() and int(expert) not in (0, 2, 4, 6):
                tensor.zero_()

    engine = Engine.load(planted_checkpoint(tmp_path, variant, silence), CONFIG)
    mask = domain_mask("credit", [number for number, _ in engine.model.mixtures()])
    engine.masks.add("alone", mask)
    engine.masks.add("constants", mask, recovery=made(mask, "constants", 64, size=0.0))
    for domain in ("credit", "wealth"):
        ids = list(say(domain, 40).encode())
        full, alone, constants = told(engine, [(ids, None), (ids, "alone"), (ids, "constants")])
        assert constants == full and (domain == "credit" or alone != full)


def test_experts_that_are_not_in_memory_have_constants_all_the_same(folder: Path) -> None:
    check_a_part_of_the_experts(folder, live=False)


@pytest.mark.cpu_only("experts come and go there alone")
def test_experts_that_could_come_have_constants_meanwhile(folder: Path) -> None:
    check_a_part_of_the_experts(folder, live=True)


def check_a_part_of_the_experts(folder: Path, *, live: bool) -> None:
    asked: list[tuple[list[int], str | None]]
    asked = [(prompts(2)[0], "constants"), (prompts(2)[1], "router"), (prompts(2)[1], "constants")]
    found = []
    for part in (False, True):
        mask = random_mask(Engine.load(folder, CONFIG), 4, 2)
        engine = Engine.load(
            folder, CONFIG, placement=Placement.of(mask) if part else None, live=live and part
        )
        engine.masks.add("constants", mask, recovery=made(mask, "constants"))
        engine.masks.add("router", mask, recovery=made(mask, "router"))
        found.append(told(engine, asked))
        assert engine.masks.absent.is_empty is not part and engine.stats().outside_mask == 0
    assert found[0] == found[1]


def test_a_scenario_that_leaves_leaves_nothing_behind(folder: Path) -> None:
    engine = add_all(Engine.load(folder, CONFIG))
    tables = [mixture.recovery for _, mixture in engine.model.mixtures()]
    ids = prompts(1)[0]
    expected = answers(engine, [(ids, "constants")])[0].token_ids
    engine.add("one", ids, GREEDY, scenario="constants")
    engine.step()
    engine.masks.remove("constants")  # it runs on
    mask = random_mask(engine, 4, 7)
    engine.masks.add("new", mask, recovery=made(mask, "constants", seed=7))  # beside its constants
    got = [token for _ in range(20) for event in engine.step() for token in event.token_ids]
    assert tuple(got) == expected[1:]

    capacity = [len(table.constants) for table in tables]  # type: ignore[arg-type]
    engine.masks.add("again", mask, recovery=made(mask, "router", seed=8))  # in the row that is free again
    engine.masks.remove("new")
    engine.masks.add("new", mask, recovery=made(mask, "constants", seed=7))  # in the place that is free again
    assert capacity == [len(table.constants) for table in tables]  # type: ignore[arg-type]
    fresh = Engine.load(folder, CONFIG)
    fresh.masks.add("new", mask, recovery=made(mask, "constants", seed=7))
    fresh.masks.add("again", mask, recovery=made(mask, "router", seed=8))
    asked: list[tuple[list[int], str | None]] = [(ids, "new"), (ids, "again")]
    assert told(engine, asked) == told(fresh, asked)

    for name in list(engine.masks.scenarios):
        engine.masks.remove(name)
    assert all(table.routing is None and table.constants is None for table in tables)
    engine.masks.add("plain", mask)
    plain = Engine.load(folder, CONFIG)
    plain.masks.add("plain", mask)
    assert told(engine, [(ids, "plain"), (ids, None)]) == told(plain, [(ids, "plain"), (ids, None)])


def test_cached_prefixes_are_shared_within_a_recovery_only(folder: Path) -> None:
    engine = add_all(Engine.load(folder, CONFIG))
    mask = random_mask(engine, 5, 0)
    engine.masks.add("same", mask, recovery=made(mask, "constants"))
    engine.masks.add("similar", mask, recovery=made(mask, "constants", seed=5))
    ids, cached = prompts(1)[0] * 2, {}
    for name in ("constants", "plain", "router", "similar", "same"):
        engine.add("one", ids, GREEDY, scenario=name)
        while engine.has_work():
            for event in engine.step():
                cached[name] = event.num_cached_tokens
    assert cached == {"constants": 0, "plain": 0, "router": 0, "similar": 0, "same": 32}


def test_recoveries_that_do_not_fit_are_refused_and_change_nothing(folder: Path) -> None:
    engine = Engine.load(folder, CONFIG)
    mask, moves = random_mask(engine, 5, 0), engine.model.moves
    constants, router = made(mask, "constants"), made(mask, "router")
    layer = mask.layers[0].layer
    one, row = constants.layers[layer], router.layers[layer]
    for wrong, message in (
        (made(random_mask(engine, 4, 1), "constants"), "needs 3 rows of float32"),
        (made(mask, "constants", hidden=48), "made for another model"),
        (changed(constants, layer, one[:, 0]), "made for another model"),
        (changed(router, layer, row[:, None]), "made for another model"),
        (changed(router, layer, row[:-1]), "needs 8 rows of float32"),
        (changed(constants, layer, one.double()), "is torch.float64"),
        (changed(constants, layer, one / 0), "numbers that are not finite"),
        (changed(router, layer, row * torch.nan), "numbers that are not finite"),
        (changed(router, 99, row), "of different layers"),
        (dataclasses.replace(router, kind="other"), "must be constants or router"),  # type: ignore[arg-type]
    ):
        with pytest.raises(PlanError, match=message):
            engine.masks.add("credit", mask, recovery=wrong)
    assert not engine.masks.scenarios and engine.model.moves == moves
    for number in range(MAX_MASKS):
        engine.masks.add(str(number), mask, recovery=constants if number % 2 else router)
    with pytest.raises(PlanError, match="64 scenarios are served already"):
        engine.masks.add("one more", mask, recovery=router)


NO_ROOM = "scenario 'second': the device has no room for its recovery"


@pytest.mark.parametrize("kind", ["constants", "router"])
@pytest.mark.parametrize(
    ("error", "told_as", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), PlanError, NO_ROOM),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
            PlanError,
            NO_ROOM,
        ),
        (RuntimeError("a bug"), RuntimeError, "^a bug$"),
        (KeyboardInterrupt("now"), KeyboardInterrupt, "^now$"),
    ],
)
def test_a_device_without_room_refuses_the_scenario(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: Kind,
    error: BaseException,
    told_as: type[BaseException],
    message: str,
) -> None:
    """And whatever else happens between two layers: the row's next scenario gets nothing of it."""
    engine, fresh = Engine.load(folder, CONFIG), Engine.load(folder, CONFIG)
    mask = random_mask(engine, 5, 0)
    engine.masks.add("first", mask, recovery=made(mask, "constants"))
    expected = told(engine, [(prompts(1)[0], "first")])
    *_, (_, last) = engine.model.mixtures()
    moves = engine.model.moves

    def fail(*_: object) -> bool:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(last.recovery, "put_constants" if kind == "constants" else "put_offsets", fail)
        with pytest.raises(told_as, match=message):
            engine.masks.add("second", mask, recovery=made(mask, kind, seed=1))
    assert list(engine.masks.scenarios) == ["first"] and engine.model.moves > moves
    assert told(engine, [(prompts(1)[0], "first")]) == expected
    engine.masks.add("plain", mask)  # in the row that was half written
    fresh.masks.add("plain", mask)
    assert told(engine, [(prompts(1)[0], "plain")]) == told(fresh, [(prompts(1)[0], "plain")])
    engine.masks.remove("plain")
    engine.masks.add("second", mask, recovery=made(mask, "constants"))
    assert told(engine, [(prompts(1)[0], "second")]) == expected


def test_the_allocator_of_the_cpu_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.zeros(1 << 50)
    assert _has_no_room(raised.value) and not _has_no_room(RuntimeError("a bug"))


def test_a_mask_that_cannot_be_written_leaves_no_recovery_and_its_row_free(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, fresh = Engine.load(folder, CONFIG), Engine.load(folder, CONFIG)
    mask = random_mask(engine, 5, 0)
    *_, (_, last) = engine.model.mixtures()
    with monkeypatch.context() as patch:
        patch.setattr(last, "masks", None)
        with pytest.raises(TypeError):
            engine.masks.add("second", mask, recovery=made(mask, "router"))
    engine.masks.add("plain", mask)
    fresh.masks.add("plain", mask)
    assert told(engine, [(prompts(1)[0], "plain")]) == told(fresh, [(prompts(1)[0], "plain")])
    for number in range(MAX_MASKS - 1):
        engine.masks.add(str(number), mask)


@pytest.mark.cpu_only("the program of the C++ kernels")
def test_the_program_is_made_anew_and_is_the_layers_bit_for_bit(folder: Path) -> None:
    model = load_model(folder, choose("cpu"))
    table, mask = MaskTable(model), random_mask(SimpleNamespace(model=model), 5, 0)  # type: ignore[arg-type]
    in_python, program = (model.new_cache(8, 16) for _ in range(2))
    in_python.program, before = None, program.program
    for name, kind in SCENARIOS.items():
        table.add(name, mask, recovery=None if kind is None else made(mask, kind))
    rows = torch.tensor([table.grant(name).row for name in SCENARIOS] + [-1]).int()
    tokens = 40
    batch = Batch(
        torch.arange(tokens) % 200, torch.arange(tokens).int(), torch.arange(tokens),
        torch.zeros(tokens, dtype=torch.int32), torch.arange(8).int()[None], torch.arange(tokens),
        rows[torch.arange(tokens) % len(rows)],
    )  # fmt: skip
    assert torch.equal(model.forward(batch, program), model.forward(batch, in_python))
    assert program.program is not before
