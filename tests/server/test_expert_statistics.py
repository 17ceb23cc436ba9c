"""--expert-statistics, from the flag to the plan of which experts stay on a GPU; the GPU is made up."""

import dataclasses
import gc
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exporting import case_checkpoint, exported
from scenario_files import write_scenario
from world import tiny_checkpoint

from moe_runtime import engine_load, expert_room, kernels
from moe_runtime.config import EngineConfig
from moe_runtime.device import DeviceChoice
from moe_runtime.engine import Engine
from moe_runtime.errors import ConfigError
from moe_runtime.expert_room import ExpertRoom
from moe_runtime.experts.__main__ import main as moe_experts
from moe_runtime.experts.statistics_file import load_statistics
from moe_runtime.placement import Placement, plan_placement
from moe_runtime.plan import ExpertMask, LayerMask
from moe_runtime.server.__main__ import main

GPU = torch.device("cuda", 0)
EXPERT_BYTES = 3 * 256 * 128 * 4
TEXTS = {
    "credit": "What is the interest rate of the loan, and when is it due? Who may borrow, how much, at which "
    "fee, and what does a late payment cost? Which papers are needed?",
    "wealth": "麒麟债券基金的风险等级是多少？什么时候可以赎回，最低认购金额是多少？"
    "手续费怎样计算，由谁承担？",
}
KEPT = (0, 2, 3, 5, 6)
Start = Callable[..., Placement]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a scenario that keeps KEPT of its experts, and statistics of two in a file beside it."""
    folder = tmp_path_factory.mktemp("statistics")
    model = tiny_checkpoint(folder / "tiny", hidden_size=256, moe_intermediate_size=128)
    mask = ExpertMask(tuple(LayerMask(layer, 8, KEPT) for layer in range(2)))
    write_scenario(model / "scenarios", model, "credit", mask)
    for name, text in TEXTS.items():
        (folder / f"{name}.txt").write_text(text)
    words = [str(folder / f"{name}.txt") for name in TEXTS]
    assert moe_experts(["profile", "--model", str(model), "--out", str(statistics(model)), *words]) == 0
    return model


def statistics(model: Path) -> Path:
    return model.parent / "tiny.stats.safetensors"


@pytest.fixture(autouse=True)
def _collector_on() -> Iterator[None]:
    """A start that fails leaves it off, as its process ends."""
    yield
    gc.enable()


@pytest.fixture
def start(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Start:
    """moe-serve with these flags, up to where its experts are placed on a GPU; the placement."""

    def start(*words: str) -> Placement:
        placed: list[Placement] = []

        def keep(*arguments: Any) -> Placement:
            placed.append(plan_placement(*arguments))
            raise ConfigError("far enough")

        plain_choose, plain_place = kernels.choose, ExpertRoom.place
        meta = torch.device("meta")  # for what has to be allocated there

        def choose(*arguments: Any, **options: Any) -> kernels.Kernels:
            there = options.get("device") == GPU
            return plain_choose("triton", device=meta) if there else plain_choose(*arguments, **options)

        def place(room: ExpertRoom, model: Any, chosen: kernels.Kernels, *rest: Any) -> None:
            on_gpu = dataclasses.replace(chosen, device=GPU if chosen.device == meta else chosen.device)
            plain_place(room, model, on_gpu, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(engine_load, "choose_device", lambda *_: DeviceChoice(GPU, "a made up GPU"))
            patch.setattr(engine_load, "use", lambda device: None)
            patch.setattr(kernels, "choose", choose)
            patch.setattr(ExpertRoom, "place", place)
            patch.setattr(expert_room, "free_bytes", lambda device: 1 << 30)
            patch.setattr(expert_room, "plan_placement", keep)
            flags = ("--model", str(model), "--port", "0", "--num-blocks", "8", "--device", "cuda:0")
            assert main([*flags, "--device-bytes", str(5 * EXPERT_BYTES), *words]) == 2
        assert "far enough" in capsys.readouterr().err
        return placed[0]

    return start


def hottest(
    model: Path, scenarios: list[str], kept: tuple[int, ...] = tuple(range(8))
) -> set[tuple[int, int]]:
    """Layer and expert of the five that were chosen most."""
    counts = sum(load_statistics(statistics(model)).of(name).counts for name in scenarios)
    assert isinstance(counts, torch.Tensor)
    every = [(layer, expert) for layer in range(2) for expert in kept]
    ranked = sorted(every, key=lambda place: (-int(counts[place]), place[1], place[0]))
    assert counts[ranked[4]] > counts[ranked[5]], "no two of them may tie for the last place"
    return set(ranked[:5])


def on_device(placement: Placement) -> set[tuple[int, int]]:
    return {(layer.layer, expert) for layer in placement.layers for expert in layer.experts("device")}


def test_the_experts_that_all_texts_chose_most_stay_on_the_gpu(
    model: Path, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    flags = ("--expert-statistics", str(statistics(model)))
    with caplog.at_level(logging.INFO):
        found = on_device(start(*flags))
    assert found == hottest(model, ["credit", "wealth"]) != on_device(start())
    tokens = sum(found.num_tokens for found in load_statistics(statistics(model)).scenarios.values())
    choices = f"{tokens * 2 * 2} choices in texts of credit, wealth"
    assert f"experts are ranked by tiny.stats.safetensors: {choices}" in caplog.messages


def test_with_scenarios_their_texts_alone_count(model: Path, start: Start) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    found = start("--expert-statistics", str(statistics(model)), "--scenarios", "credit")
    assert on_device(found) == hottest(model, ["credit"], KEPT)
    assert found.resident == start("--scenarios", "credit").resident


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--device", "cpu"), "--expert-statistics with --device cpu: there is no GPU to divide"),
        (
            ("--device", "auto", "--expert-statistics", "none"),
            "none: no such file; `moe-experts profile` makes",
        ),
        (("--device", "auto"), "was made for another model: its weights and config"),
        (
            ("--device", "auto", "--scenarios", "loans"),
            "no statistics of scenario 'loans'; there are: credit, w",
        ),
    ],
)
def test_what_cannot_be_used_ends_the_start(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    other = tiny_checkpoint(tmp_path, seed=1)
    write_scenario(other / "scenarios", other, "loans", ExpertMask.full({0: 8, 1: 8}))
    flags = ("--model", str(other), "--port", "0", "--expert-statistics", str(statistics(model)))
    assert main([*flags, *words]) == 2
    told = capsys.readouterr().err
    assert told.startswith("moe-serve: --expert-statistics") and message in told


def test_an_export_with_its_full_router_numbers_its_experts_otherwise(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, mask = case_checkpoint(tmp_path / "full", "qwen3_moe")
    exported(full, mask, tmp_path / "cut", ghost_router=True)
    capsys.readouterr()
    flags = ("--model", str(tmp_path / "cut"), "--port", "0", "--device", "auto")
    assert main([*flags, "--expert-statistics", str(statistics(model))]) == 2
    told = capsys.readouterr().err
    assert told.startswith("moe-serve: --expert-statistics") and "an export with its full router" in told


def test_where_nothing_is_divided_the_log_says_so(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As on --device auto without a GPU."""
    config = EngineConfig(num_blocks=8, packed_file=False)
    Engine.load(model, config, hotness=dict.fromkeys(range(2), [1] * 8))
    assert "the experts' statistics are not used: without a GPU there is nothing to divide" in caplog.messages


def test_a_share_of_choices_is_told() -> None:
    hotness = {0: [3, 1, 0, 0], 1: [0, 4, 2, 0]}
    placement = Placement.from_json(
        {
            "layers": [
                {"layer": 0, "num_experts": 4, "device": [0], "host": [1]},
                {"layer": 1, "num_experts": 4, "device": [2], "host": [1, 3]},
            ]
        }
    )
    assert expert_room._share_of_choices(placement, hotness) == 5 / 10
    assert expert_room._share_of_choices(placement, {0: [0] * 4, 1: [0] * 4}) == 0.0
