"""The corpus of hostile requests (tests/corpus/requests.json): never a 500, never a dead server.

In the corpus, ``set`` changes a good body, ``raw`` replaces it; ``{"$repeat": s, "times": n}``,
``{"$list": v, "times": n}``, ``{"$nest": n}`` and ``{"$absent": true}`` stand for values too large, or too
empty, to write down.
"""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import MODEL, FakeEngine, Running, serving, tiny_engine

CASES = json.loads((Path(__file__).parent.parent / "corpus" / "requests.json").read_text(encoding="utf-8"))
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": MODEL, "prompt": "a", "max_tokens": 4},
    "/v1/chat/completions": {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "max_tokens": 4},
}


def expand(value: Any) -> Any:
    if isinstance(value, list):
        return [expand(item) for item in value]
    if not isinstance(value, dict):
        return value
    if "$repeat" in value:
        return value["$repeat"] * value["times"]
    if "$list" in value:
        return [value["$list"]] * value["times"]
    if "$nest" in value:
        nested: Any = []
        for _ in range(value["$nest"]):
            nested = [nested]
        return nested
    return {key: expand(item) for key, item in value.items()}


def body_of(case: dict[str, Any]) -> bytes:
    if "raw" in case:
        return "".join(expand(case["raw"])).encode(case.get("encoding", "utf-8"))
    body = GOOD[case["path"]] | case["set"]
    body = {key: expand(value) for key, value in body.items() if value != {"$absent": True}}
    return json.dumps(body).encode()


@pytest.fixture(scope="module", params=["fake", "real"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    engine = FakeEngine() if request.param == "fake" else tiny_engine(tmp_path_factory.mktemp("model"))
    with serving(engine) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=10) as client:
        yield client


@pytest.fixture(autouse=True)
def healthy_afterwards(client: httpx.Client) -> Iterator[None]:
    yield
    assert client.get("/health").status_code == 200


def assert_error(answer: httpx.Response) -> dict[str, Any]:
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"].startswith("req_")
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert len(answer.content) < 1000, "an error must not send the request back"
    return error


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_a_hostile_request_is_answered_as_the_corpus_says(client: httpx.Client, case: dict[str, Any]) -> None:
    headers = {"content-type": "application/json"} | case.get("headers", {})
    answer = client.post(case["path"], content=body_of(case), headers=headers)
    assert answer.status_code == case["status"], answer.text[:500]
    if answer.status_code == 200:
        assert answer.json()["choices"][0]["finish_reason"] in {"stop", "length"}
        return
    error = assert_error(answer)
    assert error["type"] == "invalid_request_error"
    if "param" in case:
        assert error["param"] == case["param"], error
    if case.get("code"):
        assert error["code"] == case["code"], error


@pytest.mark.parametrize("path", GOOD)
def test_the_good_body_that_the_corpus_changes_is_good(client: httpx.Client, path: str) -> None:
    assert client.post(path, json=GOOD[path]).status_code == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/x", "/health", "/metrics", "/", "/v1"])
@pytest.mark.parametrize(
    "body", [b"", b"[" * 100_000, gzip.compress(b"0" * 10_000_000)], ids=["", "deep", "gzip"]
)
def test_every_other_route_refuses_a_body_politely(client: httpx.Client, path: str, body: bytes) -> None:
    answer = client.post(path, content=body)
    assert answer.status_code in {404, 405}
    assert_error(answer)
