"""Scenarios over HTTP: whom a model's name means, mixed batches, policies, comings and goings."""

import dataclasses
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from devices import ComputeDevice
from scenario_files import some_mask, write_scenario
from serving import Running, serving_service
from world import tiny_checkpoint

from moe_runtime.async_engine import AsyncEngine
from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine
from moe_runtime.errors import ConfigError, PlanError
from moe_runtime.experts.registry import placement_of
from moe_runtime.plan import ExpertMask
from moe_runtime.server.scenarios import open_scenarios
from moe_runtime.server.service import build_service
from moe_runtime.server.settings import ServerConfig

ENGINE = EngineConfig(max_context=256, cache_bytes=1 << 22, threads=1, packed_file=False)
PROMPTS = ["What is the rate?", "利率是多少？", "A third text, somewhat longer than the others."]
pytestmark = pytest.mark.usefixtures("compute_device")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with four scenarios, of which two have a policy that every prompt violates."""
    model = tiny_checkpoint(tmp_path_factory.mktemp("scenarios") / "tiny")
    policies = {"credit": None, "wealth": None, "strict": "reject", "open": "fallback", "watched": "flag"}
    for seed, (name, action) in enumerate(policies.items()):
        policy = None if action is None else {"threshold": 0.0, "action": action}
        write_scenario(model / "scenarios", model, name, some_mask(model, 3, seed), policy)
    return model


@contextmanager
def served(model: Path, **options: Any) -> Iterator[Running]:
    """As moe-serve puts it together."""
    config = ServerConfig(port=0, **options)
    scenarios = open_scenarios(model, config)
    placement = None if scenarios.full else placement_of(scenarios)
    engine = Engine.load(model, ENGINE, placement=placement)
    for scenario in scenarios:
        engine.masks.add(scenario.name, scenario.mask, scenario.policy)
    service = build_service(AsyncEngine(engine), model, "tiny", config, scenarios)
    with serving_service(service) as running:
        yield running


@pytest.fixture(scope="module")
def server(model: Path, compute_device: ComputeDevice) -> Iterator[Running]:
    with served(model) as running:
        yield running


def body(name: str, prompt: str = PROMPTS[0], **more: Any) -> dict[str, Any]:
    return {"model": name, "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True, **more}


def ask(server: Running, name: str, prompt: str = PROMPTS[0], **more: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=body(name, prompt, **more), timeout=30)


def text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def error(answer: httpx.Response) -> dict[str, Any]:
    return dict(answer.json()["error"])


def values(server: Running) -> dict[str, float]:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line and not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def alone(model: Path, mask: ExpertMask | None, prompt: str) -> str:
    """What the engine says to one prompt that has it for itself."""
    engine = Engine.load(model, ENGINE)
    if mask is not None:
        engine.masks.add("only", mask)
    params = dataclasses.replace(engine.default_params, temperature=0.0, max_tokens=6, ignore_eos=True)
    engine.add("one", list(prompt.encode()), params, scenario=None if mask is None else "only")
    events = []
    while engine.has_work():
        events += engine.step()
    return "".join(event.text for event in events)


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    results: list[Any] = [None] * len(calls)

    def run(index: int) -> None:
        results[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_scenarios_mixed_in_one_batch_answer_as_each_does_alone(model: Path, server: Running) -> None:
    names = [None, "credit", "wealth"]
    asked = [(name, prompt) for name in names for prompt in PROMPTS]
    calls = [
        lambda name=name, prompt=prompt: ask(server, f"tiny:{name}" if name else "tiny", prompt)
        for name, prompt in asked
    ]
    answers = at_once(calls)
    for (name, prompt), answer in zip(asked, answers, strict=True):
        mask = None if name is None else some_mask(model, 3, names.index(name) - 1)
        assert text(answer) == alone(model, mask, prompt)
        assert answer.json()["model"] == (f"tiny:{name}" if name else "tiny")
    assert len({text(answer) for answer in answers}) > 2 * len(PROMPTS)  # bytes that are no text look alike


def test_models_are_listed_with_what_they_cost(server: Running) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
        cards = {card.id: card for card in client.models.list()}
        assert sorted(cards) == [
            "tiny", "tiny:credit", "tiny:open", "tiny:strict", "tiny:watched", "tiny:wealth",
        ]  # fmt: skip
        scenario: Any = client.models.retrieve("tiny:credit").scenario  # type: ignore[attr-defined]
    assert (scenario["experts_kept"], scenario["experts"], scenario["bytes"]) == (6, 16, 600)
    assert scenario["state"] == "serving" and scenario["certificate"]["valid"] is True
    assert cards["tiny:strict"].scenario["policy"] == {"threshold": 0.0, "action": "reject"}  # type: ignore[attr-defined]


def test_the_official_client_chats_with_a_scenario(server: Running) -> None:
    messages: Any = [{"role": "user", "content": "What is the rate?"}]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        answer = client.chat.completions.create(model="tiny:credit", messages=messages, max_tokens=4)
        assert answer.model == "tiny:credit" and answer.usage is not None
        usage: Any = answer.usage.model_extra
        assert usage["scenario"]["name"] == "credit" and 0 < usage["scenario"]["lost_mass"] < 1
        chunks = list(
            client.chat.completions.create(
                model="tiny:watched", messages=messages, max_tokens=4, stream=True,
                stream_options={"include_usage": True},
            )
        )  # fmt: skip
        assert {chunk.model for chunk in chunks} == {"tiny:watched"}
        last: Any = chunks[-1].usage
        assert last.model_extra["scenario"]["drift"] == "flag"
        with pytest.raises(openai.ConflictError, match="lost mass"):
            client.chat.completions.create(model="tiny:strict", messages=messages, stream=True)


def test_an_unknown_scenario_is_told_which_there_are(server: Running) -> None:
    for name in (
        "tiny:mortgage",
        "other:credit",
        "credit",
        "tiny:",
        ":credit",
        "tiny:credit:x",
        "TINY:credit",
    ):
        answer = ask(server, name)
        assert (answer.status_code, error(answer)["code"]) == (404, "model_not_found")
        assert "'tiny:credit'" in error(answer)["message"] and "'tiny'" in error(answer)["message"]
    assert httpx.get(f"{server.url}/v1/models/tiny:mortgage").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_a_rejected_prompt_gets_a_status_and_never_a_token(server: Running, stream: bool) -> None:
    answer = ask(server, "tiny:strict", stream=stream)
    assert answer.status_code == 409 and answer.headers["x-should-retry"] == "false"
    assert error(answer)["code"] == "outside_scenario" and error(answer)["param"] == "model"
    assert "takes at most 0.0000" in error(answer)["message"]


def test_one_rejected_prompt_of_several_ends_all_before_a_token_is_shown(model: Path) -> None:
    folder = model.parent / "some"
    write_scenario(folder, model, "some", some_mask(model, 3, 0), {"threshold": 0.9, "action": "flag"})
    with served(model, scenario_dir=folder) as server:
        lost = [
            ask(server, "tiny:some", prompt).json()["usage"]["scenario"]["lost_mass"] for prompt in PROMPTS
        ]
    between = (min(lost) + max(lost)) / 2
    write_scenario(folder, model, "some", some_mask(model, 3, 0), {"threshold": between, "action": "reject"})
    with served(model, scenario_dir=folder) as server:
        for prompt, mass in zip(PROMPTS, lost, strict=True):
            assert ask(server, "tiny:some", prompt).status_code == (409 if mass > between else 200)
        for stream in (False, True):
            answer = httpx.post(
                f"{server.url}/v1/completions", json=body("tiny:some") | {"prompt": PROMPTS, "stream": stream}
            )
            assert answer.status_code == 409 and "choices" not in answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_falls_back_gets_the_full_models_answer(
    model: Path, server: Running, stream: bool
) -> None:
    expected = alone(model, None, PROMPTS[1])
    answer = ask(server, "tiny:open", PROMPTS[1], stream=stream)
    assert answer.status_code == 200 and answer.headers["x-moe-drift"].startswith("fallback; lost_mass=0.")
    if stream:
        lines = [
            line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")
        ]
        assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == expected
    else:
        assert text(answer) == expected
        assert answer.json()["usage"]["scenario"]["drift"] == "fallback"


def test_a_fallback_gives_the_log_probabilities_of_the_full_model(server: Running) -> None:
    wanted = {"echo": True, "logprobs": 1}
    full, fallen = (ask(server, name, PROMPTS[2], **wanted).json() for name in ("tiny", "tiny:open"))
    assert full["choices"] == fallen["choices"]


def test_flagged_answers_say_so_and_are_the_masks_own(model: Path, server: Running) -> None:
    answer = ask(server, "tiny:watched")
    assert text(answer) == alone(model, some_mask(model, 3, 4), PROMPTS[0])
    assert answer.headers["x-moe-drift"].startswith("flag; lost_mass=0.")


def test_what_is_cached_does_not_change_the_verdict(model: Path) -> None:
    long = PROMPTS[2] * 4
    with served(model) as server:
        masses = [
            ask(server, "tiny:watched", long).json()["usage"]["scenario"]["lost_mass"] for _ in range(2)
        ]
        usage = ask(server, "tiny:watched", long).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] > 100
    assert masses[0] == masses[1] == usage["scenario"]["lost_mass"]


def test_metrics_count_by_scenario(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "drift.jsonl"
    with served(model, drift_log=log) as server:
        for name in ("credit", "credit", "strict", "open"):
            ask(server, f"tiny:{name}")
        found = values(server)
    label = 'model_name="tiny",scenario='
    length = len(PROMPTS[0])
    assert found[f'moe_scenario_requests_total{{{label}"credit"}}'] == 2
    assert found[f'moe_scenario_prompt_tokens_total{{{label}"credit"}}'] == 2 * length
    assert found[f'moe_scenario_generation_tokens_total{{{label}"credit"}}'] == 12
    assert found[f'moe_scenario_lost_mass_count{{{label}"strict"}}'] == 1
    assert found['moe_scenario_drifted_total{action="reject",model_name="tiny",scenario="strict"}'] == 1
    assert found['moe_scenario_drifted_total{action="fallback",model_name="tiny",scenario="open"}'] == 1
    assert found['vllm:request_success_total{finished_reason="drift",model_name="tiny"}'] == 1
    assert found['moe_dispatches_outside_mask_total{model_name="tiny"}'] == 0
    assert (found["moe_scenarios_served"], found["moe_experts_resident"]) == (5, 16)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(line["scenario"], line["tokens"], line["drift"]) for line in lines] == [
        ("credit", length, None), ("credit", length, None), ("strict", length, "reject"),
        ("open", length, "fallback"),
    ]  # fmt: skip
    assert log.stat().st_mode & 0o077 == 0


def test_a_subset_server_holds_its_scenarios_experts_alone(model: Path, server: Running) -> None:
    with served(model, scenarios="credit,wealth") as subset:
        for name in ("credit", "wealth"):
            assert text(ask(subset, f"tiny:{name}")) == text(ask(server, f"tiny:{name}"))
        answer = ask(subset, "tiny")
        assert answer.status_code == 404 and "not offered without a scenario" in error(answer)["message"]
        assert [card["id"] for card in httpx.get(f"{subset.url}/v1/models").json()["data"]] == [
            "tiny:credit", "tiny:wealth",
        ]  # fmt: skip
        assert ask(subset, "tiny:watched").status_code == 404
        union = some_mask(model, 3, 0).union(some_mask(model, 3, 1))
        found, whole = values(subset), values(server)
        assert found["moe_experts_resident"] == union.num_kept < found["moe_experts"] == 16
        assert found["moe_expert_bytes"] / whole["moe_expert_bytes"] == union.num_kept / 16


@pytest.mark.parametrize(
    ("names", "reason"),
    [("credit,nothing", "there is no 'nothing'; there are: credit, "), ("credit,credit", "named twice")],
)
def test_wrong_lists_of_scenarios_end_the_start(model: Path, names: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        open_scenarios(model, ServerConfig(scenarios=names))


def test_a_policy_that_cannot_be_obeyed_is_refused_before_the_weights_are_read(
    model: Path, tmp_path: Path
) -> None:
    reason = "falls back to the full model, of which this server holds a part"
    with pytest.raises(PlanError, match=f"'open': its policy {reason}"):
        open_scenarios(model, ServerConfig(scenarios="credit,open"))
    assert "open" in open_scenarios(model, ServerConfig())
    whole = ExpertMask.full({0: 8, 1: 8})
    write_scenario(tmp_path / "all", model, "all", whole, {"threshold": 0.5, "action": "fallback"})
    open_scenarios(model, ServerConfig(scenario_dir=tmp_path / "all", scenarios="all"))  # nothing is absent
    flat = tiny_checkpoint(tmp_path / "flat", num_hidden_layers=1)
    for name, policy in (("plain", None), ("strict", {"threshold": 0.5, "action": "reject"})):
        write_scenario(flat / "scenarios", flat, name, some_mask(flat, 3, 0), policy)
    found = open_scenarios(flat, ServerConfig())
    assert [scenario.name for scenario in found] == ["plain"]
    assert "lost mass is measured before the last layer" in found.refused["strict"]


def test_an_uncertified_scenario_is_left_out_and_says_why(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scenarios"
    for name in ("good", "bad"):
        write_scenario(folder, model, name, some_mask(model, 3, 0))
    (folder / "bad" / "certificate.json").unlink()
    with served(model, scenario_dir=folder) as server:
        answer = ask(server, "tiny:bad")
        assert answer.status_code == 404 and "its certificate is missing" in error(answer)["message"]
        assert ask(server, "tiny:good").status_code == 200
    with served(model, scenario_dir=folder, allow_uncertified=True) as server:
        assert ask(server, "tiny:bad").status_code == 200
        card = httpx.get(f"{server.url}/v1/models/tiny:bad").json()
        assert card["scenario"]["certificate"]["objections"] == [
            "its certificate is missing (certificate.json)"
        ]


def test_where_every_scenario_is_refused_the_answer_still_says_why(model: Path, tmp_path: Path) -> None:
    write_scenario(tmp_path, model, "credit", some_mask(model, 3, 0))
    (tmp_path / "credit" / "certificate.json").unlink()
    with served(model, scenario_dir=tmp_path) as server:
        body = {"model": "tiny:credit", "prompt": "What?", "max_tokens": 1}
        answer = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answer.status_code == 404
    assert "certificate is missing" in answer.json()["error"]["message"]
