"""Random bodies through a real socket: an answer is 200 or a well-formed 4xx, whatever was asked."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import MODEL, FakeEngine, serving

EDGES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 64, 65, 2**31, 2**53, -(2**63), 2**63 - 1, 0.0, -0.0, 0.5, 1e-300, 1e300,
    "", "a", "\x00", "\U0001f600", [], [0], [256], [257], [[]], [[1], [2]], ["a", "b"], {}, {"1": 1},
    {"a": None}, {"role": "user", "content": "a"}, [{"role": "user", "content": "a"}],
    [{"type": "text", "text": "a"}], {"include_usage": True}, {"type": "text"}, "stop", "none", "auto", MODEL,
]  # fmt: skip
FIELDS = [
    "model", "messages", "prompt", "stream", "stream_options", "n", "max_tokens", "max_completion_tokens",
    "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos", "echo", "logprobs",
    "top_logprobs", "best_of", "tools", "response_format", "user", "zzz",
]  # fmt: skip


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with (
        serving(FakeEngine(answer="ok, 好")) as server,
        httpx.Client(base_url=server.url, timeout=10) as client,
    ):
        yield client
        assert server.wait_until(lambda: not server.engine.open)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["/v1/completions", "/v1/chat/completions"]),
    fields=st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(EDGES), max_size=5),
)
def test_random_values_never_break_the_server(
    client: httpx.Client, path: str, fields: dict[str, Any]
) -> None:
    good = {"model": MODEL, "messages": [{"role": "user", "content": "a"}], "prompt": "a", "max_tokens": 8}
    answer = client.post(path, json=good | fields)
    assert answer.status_code in {200, 400, 404}, answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    elif fields.get("stream") is True:
        assert answer.text.endswith("data: [DONE]\n\n")
    else:
        assert answer.json()["usage"]["total_tokens"] > 0
