"""Recoveries over HTTP: applied from the start and to who comes later, told in /v1/models."""

import gc
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from scenario_files import some_mask, write_recovery, write_scenario
from serving import Running, serving_service
from world import tiny_checkpoint

from moe_runtime.async_engine import AsyncEngine
from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine
from moe_runtime.errors import ConfigError
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.recovery_file import RecoveryFile
from moe_runtime.sampling_params import SamplingParams
from moe_runtime.server.__main__ import main
from moe_runtime.server.scenarios import open_scenarios
from moe_runtime.server.service import build_service
from moe_runtime.server.settings import ServerConfig

ENGINE = EngineConfig(max_context=256, cache_bytes=1 << 22, threads=1, packed_file=False)
TOKEN = "an admin token of some length"
PROMPT = "What is the rate?"
KINDS = {"credit": "constants", "wealth": "router", "plain": None}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three scenarios of one mask."""
    model = tiny_checkpoint(tmp_path_factory.mktemp("recovery") / "tiny")
    folder = model / "scenarios"
    for name, kind in KINDS.items():
        write_scenario(folder, model, name, some_mask(model, 3, 0))
        if kind is not None:
            write_recovery(folder, model, name, kind)  # type: ignore[arg-type]
    return model


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Running]:
    """As moe-serve puts it together."""
    token = model / "token"
    token.touch(0o600)
    token.write_text(TOKEN)
    config = ServerConfig(port=0, admin_token_file=token)
    scenarios = open_scenarios(model, config)
    engine = Engine.load(model, ENGINE)
    for scenario in scenarios:
        engine.masks.add(scenario.name, scenario.mask, scenario.policy, scenario.recovery)
    with serving_service(build_service(AsyncEngine(engine), model, "tiny", config, scenarios)) as running:
        yield running


def said(server: Running, name: str) -> str:
    body = {"model": f"tiny:{name}", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def alone(model: Path, name: str) -> str:
    """What the engine says with the file's numbers."""
    engine = Engine.load(model, ENGINE)
    folder = model / "scenarios" / name
    plan = PlanFile.load(folder / "plan.json")
    file = folder / "recovery.safetensors"
    recovery = RecoveryFile.load(file, plan).recovery if file.exists() else None
    engine.masks.add(name, plan.mask, recovery=recovery)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    engine.add("one", engine.tokenizer.encode(PROMPT), params, scenario=name)
    events = []
    while engine.has_work():
        events += engine.step()
    return "".join(event.text for event in events)


def test_every_scenario_answers_with_its_own_recovery(server: Running, model: Path) -> None:
    answers = {name: said(server, name) for name in KINDS}
    assert answers == {name: alone(model, name) for name in KINDS}
    assert len({*answers.values()}) == 3


def test_a_start_prepares_the_engine_once_its_scenarios_are_there(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Recoveries make the graphs of a GPU stale, which would be captured again while requests wait."""
    seen: list[list[str]] = []

    def prepare(engine: Engine) -> None:
        seen.append(sorted(engine.masks.scenarios))
        raise ConfigError("far enough")

    monkeypatch.setattr(Engine, "prepare", prepare)
    status = main(["--model", str(model), "--port", "0", "--num-blocks", "8", "--no-packed-file"])
    gc.enable()  # a start that fails leaves it off, as its process ends
    assert status == 2 and "far enough" in capsys.readouterr().err
    assert seen == [sorted(KINDS)]


def test_the_list_of_models_says_which_recovery_is_on(server: Running) -> None:
    listed = httpx.get(f"{server.url}/v1/models", timeout=30).json()["data"]
    found = {card["scenario"]["name"]: card["scenario"]["recovery"] for card in listed if "scenario" in card}
    assert found["plain"] is None
    assert (found["credit"]["applied"], found["credit"]["kind"]) == (True, "constants")
    assert (found["wealth"]["kind"], found["wealth"]["bytes"]) == ("router", 2 * 8 * 4)


def test_who_comes_later_brings_its_recovery(server: Running, model: Path) -> None:
    url, headers = f"{server.url}/admin/scenarios/credit", {"Authorization": f"Bearer {TOKEN}"}
    before = said(server, "credit")
    assert httpx.delete(url, headers=headers, timeout=30).json()["state"] == "gone"
    write_recovery(model / "scenarios", model, "credit", "constants", seed=5)
    assert httpx.post(url, headers=headers, timeout=30).json()["state"] == "serving"
    assert said(server, "credit") == alone(model, "credit") != before
