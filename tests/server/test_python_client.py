"""The official OpenAI client for Python against a real socket: what it parses is what we promise."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from serving import ANSWER, MODEL, FakeEngine, Running, serving

from moe_runtime.errors import EngineStopped, Overloaded

HELLO: Any = [{"role": "user", "content": "What is the rate?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(FakeEngine()) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
        yield client


def test_models_are_listed_and_found(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).object == "model"


def test_a_chat_completion_has_every_field(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, user="u", metadata={"a": "b"})
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint == "fp_test"
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        ANSWER,
        "stop",
    )
    assert choice.logprobs is None
    assert answer.usage is not None
    num_prompt_tokens = len(b"user: What is the rate?\n")
    num_tokens = len(ANSWER.encode()) + 1
    assert answer.usage.prompt_tokens == num_prompt_tokens
    assert answer.usage.completion_tokens == num_tokens
    assert answer.usage.total_tokens == num_prompt_tokens + num_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_a_conversation_may_send_the_answer_back(client: openai.OpenAI, server: Running) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO)
    turns: Any = [
        {"role": "developer", "content": "Be short."},
        *HELLO,
        answer.choices[0].message,
        {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "text", "text": "now?"}]},
    ]
    client.chat.completions.create(model=MODEL, messages=turns, max_completion_tokens=1)
    prompt, params = server.engine.submitted[-1]
    assert bytes(prompt).decode() == (
        f"system: Be short.\nuser: What is the rate?\nassistant: {ANSWER}\nuser: And\nnow?\n"
    )
    assert params.max_tokens == 1


def test_a_stream_adds_up_to_the_answer(client: openai.OpenAI) -> None:
    with client.chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, n=2, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    for index in (0, 1):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert mine[0].delta.role == "assistant"
        assert [choice.delta.role for choice in mine[1:]] == [None] * (len(mine) - 1)
        assert "".join(choice.delta.content or "" for choice in mine) == ANSWER
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["stop"]
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2 * (len(ANSWER.encode()) + 1)


def test_a_stream_without_usage_has_no_usage_field(client: openai.OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, stream=True)
    text = answer.http_response.read().decode()
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert "usage" not in text
    assert text.endswith("data: [DONE]\n\n")
    assert text.count("[DONE]") == 1


@pytest.mark.parametrize("num_top", [None, 0, 2])
def test_chat_logprobs_follow_the_tokens(client: openai.OpenAI, num_top: int | None) -> None:
    top: Any = {} if num_top is None else {"top_logprobs": num_top}
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, **top)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert bytes(byte for token in logprobs.content for byte in token.bytes or []).decode() == ANSWER
    assert {token.logprob for token in logprobs.content} == {-0.5}
    assert {len(token.top_logprobs) for token in logprobs.content} == {num_top or 0}


def test_streamed_chat_logprobs_are_the_same_as_whole_ones(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=1)
    stream = client.chat.completions.create(
        model=MODEL, messages=HELLO, logprobs=True, top_logprobs=1, stream=True
    )
    parts = [chunk.choices[0].logprobs for chunk in stream]
    assert whole.choices[0].logprobs is not None
    assert [token for part in parts if part for token in part.content or []] == whole.choices[
        0
    ].logprobs.content


def test_completion_logprobs_count_characters_along_the_text(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="利率", echo=True, logprobs=1, max_tokens=4)
    choice = answer.choices[0]
    assert choice.text == "利率The "
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.tokens[0] == "bytes:\\xe5"
    assert choice.logprobs.tokens[-4:] == ["T", "h", "e", " "]
    assert choice.logprobs.text_offset == [0, 0, 0, 1, 1, 1, 2, 3, 4, 5]
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.top_logprobs is not None
    assert choice.logprobs.top_logprobs[-1] == {"A": -0.5, " ": -0.5}


def test_the_prompt_alone_can_be_scored(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="abc", echo=True, logprobs=0, max_tokens=0)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == ("abc", "length")
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == [None, -0.5, -0.5]
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [("ab", ["ab"]), (["ab", "c"], ["ab", "c"]), ([97, 98], ["ab"]), ([[97], [98, 99]], ["a", "bc"])],
    ids=["string", "strings", "ids", "lists of ids"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_every_shape_of_prompt_is_answered(
    client: openai.OpenAI, prompt: Any, texts: list[str], stream: bool
) -> None:
    answer: Any = client.completions.create(
        model=MODEL, prompt=prompt, n=2, max_tokens=3, echo=True, logprobs=1, stream=stream
    )
    found = dict.fromkeys(range(2 * len(texts)), "")
    for chunk in answer if stream else [answer]:
        for choice in chunk.choices:
            found[choice.index] += choice.text
    assert list(found.values()) == [text + "The" for text in texts for _ in range(2)]


def test_a_completion_has_16_tokens_unless_told_otherwise(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="a")
    assert answer.choices[0].text == ANSWER[:16]
    assert answer.choices[0].finish_reason == "length"


def test_sampling_parameters_reach_the_engine(client: openai.OpenAI, server: Running) -> None:
    client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        temperature=0.25,
        top_p=0.5,
        presence_penalty=1.5,
        frequency_penalty=-1,
        logit_bias={"65": 5},
        seed=7,
        stop=["x", "y"],
        max_tokens=9,
        n=2,
        extra_body={
            "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2, "ignore_eos": True,
            "stop_token_ids": [66], "include_stop_str_in_output": True,
        },
    )  # fmt: skip
    _, params = server.engine.submitted[-1]
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.25, 0.5, 5, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (1.5, -1, 1.1)
    assert (dict(params.logit_bias), params.seed, params.stop) == ({65: 5}, 7, ("x", "y"))
    assert (params.max_tokens, params.min_tokens, params.n) == (9, 2, 2)
    assert (params.ignore_eos, params.stop_token_ids, params.include_stop) == (True, (66,), True)


def test_unknown_fields_are_named_in_a_header(client: openai.OpenAI) -> None:
    create = client.chat.completions.with_raw_response.create
    answer = create(
        model=MODEL, messages=HELLO, user="u", extra_body={"zeta": 1, "alpha\n": 2, "nothing": None}
    )
    assert answer.headers["x-moe-ignored-fields"] == "alpha?,zeta"
    assert "x-moe-ignored-fields" not in create(model=MODEL, messages=HELLO, user="u").headers


def test_errors_arrive_as_the_client_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=3)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    assert bad.value.request_id is not None
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt="a" * 5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="a")
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(
            model=MODEL, messages=HELLO, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert (tools.value.param, tools.value.code) == ("tools", "unsupported_parameter")


def test_a_full_queue_is_retried_and_then_succeeds(client: openai.OpenAI, server: Running) -> None:
    server.engine.refusals += [Overloaded("the queue is full", retry_after=1)]
    answer = client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO)
    assert answer.retries_taken == 1
    assert answer.parse().choices[0].message.content == ANSWER


def test_a_full_queue_without_retries_is_a_503(client: openai.OpenAI, server: Running) -> None:
    server.engine.refusals += [Overloaded("the queue is full", retry_after=7), EngineStopped("stopping")]
    once = client.with_options(max_retries=0)
    with pytest.raises(openai.InternalServerError) as full:
        once.chat.completions.create(model=MODEL, messages=HELLO)
    assert (full.value.status_code, full.value.code) == (503, "overloaded")
    assert full.value.response.headers["retry-after"] == "7"
    with pytest.raises(openai.InternalServerError) as stopped:
        once.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    assert (stopped.value.status_code, stopped.value.code) == (503, "engine_stopped")


def test_prompts_are_admitted_all_or_none(server: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt=[[97], [98], [999]])
    assert server.wait_until(lambda: not server.engine.open)


def test_more_choices_than_allowed_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=MODEL, prompt=["a"] * 9, n=8)
    assert error.value.param == "n"


def test_a_failure_in_mid_stream_is_an_error_event_and_no_end() -> None:
    with (
        serving(FakeEngine(fail_after=3)) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client,
    ):
        stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        received = []
        with pytest.raises(openai.APIError, match="not finite"):
            received.extend(chunk.choices[0] for chunk in stream)
        assert "".join(choice.delta.content or "" for choice in received) == ANSWER[:3]
        assert {choice.finish_reason for choice in received} == {None}
        raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO, stream=True)
        text = raw.http_response.read().decode()
        assert "[DONE]" not in text
        last = json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))
        assert last["error"]["code"] == "request_failed"
        with pytest.raises(openai.InternalServerError) as whole:
            client.chat.completions.create(model=MODEL, messages=HELLO)
        assert whole.value.status_code == 500
        assert whole.value.response.headers["x-should-retry"] == "false"


def test_logprobs_without_a_floor_stay_numbers() -> None:
    with (
        serving(FakeEngine(logprob=float("-inf"))) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client,
    ):
        chat = client.chat.completions.create(model=MODEL, messages=HELLO, logprobs=True, top_logprobs=1)
        assert chat.choices[0].logprobs is not None
        assert {token.logprob for token in chat.choices[0].logprobs.content or []} == {-9999.0}
        old = client.completions.create(model=MODEL, prompt="ab", logprobs=1, echo=True)
        assert old.choices[0].logprobs is not None
        assert set(old.choices[0].logprobs.token_logprobs or []) == {None, -9999.0}


def test_the_async_client_streams_many_answers_at_one_time(server: Running) -> None:
    async def one(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
            return await asyncio.gather(*(one(client) for _ in range(20)))

    assert asyncio.run(all_of_them()) == [ANSWER] * 20


def test_leaving_a_stream_early_aborts_the_request() -> None:
    engine = FakeEngine(delay=0.01, answer="x" * 2000)
    with (
        serving(engine) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client,
    ):
        stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        next(iter(stream))
        stream.close()
        assert server.wait_until(lambda: not engine.open, 2)
