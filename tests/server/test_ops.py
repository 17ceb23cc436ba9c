"""/health, /metrics, the log, and a server whose engine has died."""

import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serving import MODEL, ByteTokenizer, FakeEngine, serving, tiny_engine

from moe_runtime.server.service import build_service, describe_model, longest_token
from moe_runtime.server.settings import ServerConfig

BODY = {"model": MODEL, "prompt": "secret words", "max_tokens": 5}


def values(text: str) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def test_metrics_have_the_names_that_dashboards_for_vllm_look_for() -> None:
    with serving(FakeEngine()) as server, httpx.Client(base_url=server.url) as client:
        assert client.post("/v1/completions", json=BODY).status_code == 200
        assert client.post("/v1/completions", json={}).status_code == 400
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found = values(answer.text)
    label = f'{{model_name="{MODEL}"}}'
    names = (
        "num_requests_running",
        "num_requests_waiting",
        "generation_tokens_total",
        "num_preemptions_total",
    )
    for name in (*names, "prefix_cache_queries_total", "prefix_cache_hits_total"):
        assert f"vllm:{name}{label}" in found
    assert found[f"vllm:kv_cache_usage_perc{label}"] == 0.25
    assert found[f"vllm:prompt_tokens_total{label}"] == 11
    assert found[f'vllm:request_success_total{{finished_reason="stop",model_name="{MODEL}"}}'] == 0
    for name in ("time_to_first_token", "e2e_request_latency", "request_time_per_output_token"):
        assert found[f"vllm:{name}_seconds_count{label}"] == 1
    assert found[f"vllm:inter_token_latency_seconds_count{label}"] == 4
    assert found[f"vllm:request_generation_tokens_sum{label}"] == 5
    assert found['moe_http_responses_total{status="2xx"}'] == 1
    assert found['moe_http_responses_total{status="4xx"}'] == 1
    assert "secret" not in answer.text


def test_two_apps_in_one_process_count_apart() -> None:
    with serving(FakeEngine()) as one, serving(FakeEngine()) as other:
        httpx.post(f"{one.url}/v1/completions", json=BODY)
        assert values(httpx.get(f"{other.url}/metrics").text)['moe_http_responses_total{status="2xx"}'] == 0


def test_a_dead_engine_fails_the_health_check_and_new_requests() -> None:
    with serving(FakeEngine()) as server, httpx.Client(base_url=server.url) as client:
        server.engine.is_alive = False
        server.engine.refusal = "cuda:0 has failed (CUDA error: illegal memory access)"
        for answer in (client.get("/health"), client.post("/v1/completions", json=BODY)):
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "engine_stopped"
        message = client.get("/health").json()["error"]["message"]
        assert message == "cuda:0 has failed (CUDA error: illegal memory access); restart the server"
        assert client.get("/v1/models").status_code == 200


def test_a_driver_that_fails_for_good_takes_the_server_off_the_road(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = tiny_engine(tmp_path, backend="reference")
    fault = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with")
    calls = 0

    def attention(*arguments: Any, go: Any = engine.engine.model.blocks[0].attention, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise fault
        return go(*arguments, **named)

    def synchronize(_: torch.device) -> None:
        raise fault

    block = dataclasses.replace(engine.engine.model.blocks[0], attention=attention)
    monkeypatch.setattr(engine.engine.model, "blocks", (block, *engine.engine.model.blocks[1:]))
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    with serving(engine) as server, httpx.Client(base_url=server.url) as client:
        assert client.post("/v1/completions", json=BODY | {"max_tokens": 2}).status_code == 200
        # From here on the model is on a GPU, as far as the engine can tell.
        monkeypatch.setattr(type(engine.engine.model), "device", torch.device("cuda", 0))
        monkeypatch.setattr(logging.getLogger("moe_runtime.async_engine"), "disabled", True)
        failed = client.post("/v1/completions", json=BODY)
        assert failed.status_code == 500 and "cuda:0 has failed" in failed.json()["error"]["message"]
        assert server.wait_until(lambda: not engine.is_alive)
        for answer in (client.get("/health"), client.post("/v1/completions", json=BODY)):
            assert answer.status_code == 503
            message = answer.json()["error"]["message"]
            assert message.startswith("cuda:0 has failed (CUDA error: an illegal memory access")


def test_no_answer_shows_the_inside_of_the_house(caplog: pytest.LogCaptureFixture) -> None:
    with serving(FakeEngine(refusals=[ZeroDivisionError("inside, in /a/path")])) as server:
        answer = httpx.post(f"{server.url}/v1/completions", json=BODY)
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "inside" not in answer.text
    assert answer.headers["x-should-retry"] == "false"
    assert "ZeroDivisionError" in caplog.text


def test_one_log_line_per_request_without_its_words(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "moe_runtime.server")
    with serving(FakeEngine()) as server, httpx.Client(base_url=server.url) as client:
        good = client.post("/v1/completions?query=hidden", json=BODY)
        client.get("/health")
        client.get("/nothing%0Ahere")
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("req_")]
    assert len(lines) == 2
    assert lines[0].startswith(f"{good.headers['x-request-id']} POST /v1/completions 200 ")
    assert lines[0].endswith("prompt=12 cached=3 generated=5 length")
    assert " GET /nothing%0Ahere 404 " in lines[1]
    assert lines[1].endswith(" unknown_url")
    assert "secret" not in caplog.text
    assert "hidden" not in caplog.text


class SlowTokenizer(ByteTokenizer):
    def encode(self, text: str, **options: Any) -> list[int]:
        time.sleep(0.5)
        return [65]


def test_a_long_text_is_tokenised_beside_the_event_loop() -> None:
    engine = FakeEngine()
    engine.engine.tokenizer = SlowTokenizer()
    with serving(engine) as server, httpx.Client(base_url=server.url) as client:
        body = json.dumps(BODY | {"prompt": "a" * 10_000}).encode()
        request = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        import threading

        answers: list[bytes] = []
        sender = threading.Thread(
            target=lambda: answers.append(
                server.raw(request + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            )
        )
        sender.start()
        assert server.wait_until(lambda: server.service.gate.open_requests == 1)
        started = time.monotonic()
        assert client.get("/health").status_code == 200
        assert time.monotonic() - started < 0.4, "the event loop was busy"
        sender.join()
    assert answers[0].startswith(b"HTTP/1.1 200 ")


class LyingTokenizer(ByteTokenizer):
    def encode(self, text: str, *, add_special_tokens: bool = False, plain: bool = False) -> list[int]:
        raise AssertionError("this text should not have been read")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": ["a", "a" * 101]}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 51}] * 2}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": ""}] * 4097}, "messages"),
    ],
)
def test_a_text_that_cannot_fit_is_refused_unread(path: str, body: dict[str, Any], param: str) -> None:
    engine = FakeEngine()
    engine.engine.tokenizer = engine.engine.chat = LyingTokenizer()
    with serving(engine, max_prompt_characters=100) as server:
        reply = httpx.post(server.url + path, json={"model": MODEL} | body)
    assert reply.status_code == 400
    error = reply.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)


def test_no_text_that_fits_is_refused_unread(tmp_path: Path) -> None:
    engine = tiny_engine(tmp_path, max_context=64)
    service = build_service(engine, tmp_path, "tiny", ServerConfig())
    assert longest_token(engine.engine.tokenizer) == len("<|endoftext|>")
    assert service.max_prompt_characters == 4 * len("<|endoftext|>") * 64


def test_the_fingerprint_tells_model_folders_apart(tmp_path: Path) -> None:
    def fingerprint(files: Sequence[tuple[str, bytes]]) -> str:
        for name, data in files:
            (tmp_path / name).write_bytes(data)
        return describe_model(tmp_path, "m").fingerprint

    first = fingerprint([("config.json", b"{}"), ("a.safetensors", b"1" * 9_000_000)])
    assert first == fingerprint([])
    assert fingerprint([("a.safetensors", b"1" * 8_999_999 + b"2")]) != first
    assert fingerprint([("a.safetensors", b"1" * 9_000_000)]) == first
    assert fingerprint([("config.json", b"{ }")]) != first
