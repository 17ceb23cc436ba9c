"""Scenarios that come and go while the server runs."""

import argparse
import gc
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from scenario_files import some_mask, write_scenario
from serving import Running, serving_service
from world import tiny_checkpoint

from moe_runtime.async_engine import AsyncEngine
from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine
from moe_runtime.errors import ConfigError, PlanError
from moe_runtime.experts.commands_scenarios import add_arguments, run
from moe_runtime.experts.registry import placement_of
from moe_runtime.output import TokenEvent
from moe_runtime.server.__main__ import USAGE_ERROR, main
from moe_runtime.server.scenarios import open_scenarios
from moe_runtime.server.service import build_service, read_admin_token
from moe_runtime.server.settings import ServerConfig

TOKEN = "an admin token of some length"
ADMIN = {"Authorization": f"Bearer {TOKEN}"}
ENGINE = EngineConfig(max_context=512, cache_bytes=1 << 22, threads=1, packed_file=False)
pytestmark = pytest.mark.usefixtures("compute_device")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    model = tiny_checkpoint(tmp_path / "tiny")
    write_scenario(model / "scenarios", model, "credit", some_mask(model, 3, 0))
    return model


@pytest.fixture
def token(tmp_path: Path) -> Path:
    token = tmp_path / "token"
    token.touch(0o600)
    token.write_text(TOKEN + "\n")
    return token


@contextmanager
def served(model: Path, token: Path, **options: Any) -> Iterator[Running]:
    """As moe-serve puts it together."""
    config = ServerConfig(port=0, admin_token_file=token, **options)
    scenarios = open_scenarios(model, config)
    placement = None if scenarios.full else placement_of(scenarios)
    engine = Engine.load(model, ENGINE, placement=placement, live=not scenarios.full)
    for scenario in scenarios:
        engine.masks.add(scenario.name, scenario.mask, scenario.policy)
    with serving_service(build_service(AsyncEngine(engine), model, "tiny", config, scenarios)) as running:
        yield running


@pytest.fixture
def server(model: Path, token: Path) -> Iterator[Running]:
    with served(model, token) as running:
        yield running


def ask(server: Running, name: str, **more: Any) -> httpx.Response:
    body = {"model": f"tiny:{name}", "prompt": "What is the rate?", "max_tokens": 4, "temperature": 0, **more}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)


def admin(server: Running, method: str, name: str = "", **headers: str) -> httpx.Response:
    url = f"{server.url}/admin/scenarios{'/' if name else ''}{name}"
    return httpx.request(method, url, headers=headers or ADMIN, timeout=30)


def test_the_administration_is_closed_without_its_token(server: Running, model: Path) -> None:
    for headers in ({"X": "y"}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
        for method, name in (("GET", ""), ("POST", "credit"), ("DELETE", "credit")):
            answer = admin(server, method, name, **headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
    assert ask(server, "credit").status_code == 200
    service = build_service(AsyncEngine(Engine.load(model, ENGINE)), model, "tiny", ServerConfig(port=0))
    with serving_service(service) as closed:
        assert admin(closed, "GET").json()["error"]["code"] == "unknown_url"


def test_a_token_that_others_can_read_or_guess_ends_the_start(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o640)
    with pytest.raises(ConfigError, match="others may read it"):
        read_admin_token(token)
    token.chmod(0o600)
    token.write_text("short\n")
    with pytest.raises(ConfigError, match="5 characters, at least 16"):
        read_admin_token(token)
    with pytest.raises(ConfigError, match="No such file"):
        read_admin_token(tmp_path / "none")


def test_a_scenario_comes_goes_and_comes_back(server: Running, model: Path) -> None:
    assert ask(server, "wealth").status_code == 404
    write_scenario(model / "scenarios", model, "wealth", some_mask(model, 3, 1))
    added = admin(server, "POST", "wealth")
    assert added.json() == {"name": "wealth", "state": "serving", "running": 0}
    first = ask(server, "wealth").json()["choices"]
    assert admin(server, "POST", "wealth").json()["error"]["code"] == "scenario_conflict"
    names = [item["name"] for item in admin(server, "GET").json()["scenarios"]]
    assert names == ["credit", "wealth"]
    assert admin(server, "DELETE", "wealth").json() == {"name": "wealth", "state": "gone"}
    assert ask(server, "wealth").status_code == 404
    assert admin(server, "DELETE", "wealth").status_code == 404
    assert admin(server, "POST", "wealth").status_code == 200
    assert ask(server, "wealth").json()["choices"] == first


def test_what_may_not_be_served_is_refused_and_nothing_changes(server: Running, model: Path) -> None:
    write_scenario(model / "scenarios", model, "bad", some_mask(model, 3, 1))
    (model / "scenarios" / "bad" / "certificate.json").unlink()
    for name, reason in (("bad", "certificate is missing"), ("none", "no plan.json"), ("..", "letters")):
        answer = admin(server, "POST", name.replace("..", "%2E%2E%00"))
        assert answer.status_code == 422 and reason in answer.json()["error"]["message"]
        assert ask(server, name).status_code == 404


def test_a_leaving_scenario_refuses_new_requests_and_finishes_its_streams(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"model": "tiny:credit", "prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True,
            "temperature": 0, "seed": 1}  # fmt: skip
    expected = ask(server, "credit", prompt="a", max_tokens=400, ignore_eos=True).json()["choices"][0]["text"]
    answers, may_step, step = [], threading.Event(), server.engine.engine.step

    def held_step() -> list[TokenEvent]:
        assert may_step.wait(30)
        return step()

    may_step.set()
    monkeypatch.setattr(server.engine.engine, "step", held_step)
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as stream:
        lines = stream.iter_lines()
        kept = [next(lines)]
        may_step.clear()
        leaver = threading.Thread(target=lambda: answers.append(admin(server, "DELETE", "credit")))
        leaver.start()
        assert server.wait_until(lambda: server.service.scenarios.state("credit") == "leaving")
        refused = ask(server, "credit")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "scenario_unavailable")
        assert int(refused.headers["retry-after"]) > 0
        assert admin(server, "POST", "credit").json()["error"]["code"] == "scenario_conflict"
        cards = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert [card["scenario"]["state"] for card in cards if "scenario" in card] == ["leaving"]
        may_step.set()
        kept += lines
    leaver.join(30)
    assert answers[0].json() == {"name": "credit", "state": "gone"}
    assert "data: [DONE]" in kept
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in kept if line.startswith("data: {")]
    assert "".join(texts) == expected


def resident(server: Running) -> int:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return round(float(next(line for line in lines if line.startswith("moe_experts_resident ")).split()[1]))


@pytest.mark.cpu_only("elsewhere experts do not come and go")
def test_a_subset_server_reads_the_experts_of_who_comes_and_gives_up_those_of_who_goes(
    model: Path, token: Path
) -> None:
    masks = [some_mask(model, 3, seed) for seed in range(2)]
    write_scenario(model / "scenarios", model, "wealth", masks[1])
    with served(model, token) as whole:
        expected = {name: ask(whole, name).json()["choices"] for name in ("credit", "wealth")}
    with served(model, token, scenarios="credit") as server:
        assert resident(server) == 6 and ask(server, "wealth").status_code == 404
        assert admin(server, "POST", "wealth").json()["state"] == "serving"
        assert resident(server) == masks[0].union(masks[1]).num_kept
        assert {name: ask(server, name).json()["choices"] for name in expected} == expected
        assert admin(server, "DELETE", "credit").json()["state"] == "gone"
        assert resident(server) == 6
        assert ask(server, "wealth").json()["choices"] == expected["wealth"]
        (model / "scenarios" / "credit" / "policy.json").write_text(
            '{"threshold": 0.9, "action": "fallback"}'
        )
        refused = admin(server, "POST", "credit")
        assert refused.status_code == 422 and "falls back to the full model" in refused.text
        assert resident(server) == 6


@pytest.mark.cpu_only("elsewhere experts do not come and go")
def test_experts_of_who_cannot_be_added_are_given_up_whatever_the_reason(
    model: Path, token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_scenario(model / "scenarios", model, "wealth", some_mask(model, 3, 1))
    with served(model, token, scenarios="credit") as server:

        def fail(*_: object) -> None:
            raise RuntimeError("a bug")

        with monkeypatch.context() as patch:
            patch.setattr(server.engine.engine.masks, "add", fail)
            assert admin(server, "POST", "wealth").status_code == 500
        mixtures = list(server.engine.engine.model.mixtures())
        assert sum(mixture.placed.count("device") for _, mixture in mixtures) == 6  # the gauge may be stale
        assert ask(server, "wealth").status_code == 404
        assert admin(server, "POST", "wealth").status_code == 200 and resident(server) > 6


def command(server: Running, token: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.add_argument("--json", action="store_true")
    return run(parser.parse_args([*words, "--server", server.url, "--admin-token-file", str(token)]))


def test_the_command_does_the_same(
    server: Running, model: Path, token: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scenario(model / "scenarios", model, "wealth", some_mask(model, 3, 1))
    assert command(server, token, "add", "wealth") == 0
    assert command(server, token, "list") == 0
    assert capsys.readouterr().out == (
        "wealth: serving, 0 running\ncredit: serving, 0 running\nwealth: serving, 0 running\n"
    )
    assert command(server, token, "drop", "wealth", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"name": "wealth", "state": "gone"}
    with pytest.raises(PlanError, match="there is no scenario 'wealth'"):
        command(server, token, "drop", "wealth")
    with pytest.raises(ConfigError, match="need the name"):
        command(server, token, "add")


def test_a_token_that_others_can_read_ends_the_start_before_the_weights_are_read(
    model: Path, token: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    token.chmod(0o644)
    monkeypatch.setattr(Engine, "load", lambda *_, **__: pytest.fail("the weights are read"))
    try:
        assert main(["--model", str(model), "--port", "0", "--admin-token-file", str(token)]) == USAGE_ERROR
    finally:
        gc.enable()  # a start leaves it off until the model is there
    assert "--admin-token-file" in capsys.readouterr().err
