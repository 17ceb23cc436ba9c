"""The engine over a fake model whose answers depend on the history it reads back through the cache."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devices import ComputeDevice
from fake_model import Answer, FakeConfig, FakeModel, byte_tokenizer, echo_answer, random_answer
from tokenizers import Tokenizer as Library
from world import MESSAGE_END, VOCAB_SIZE, tiny_checkpoint

from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine, TokenEvent
from moe_runtime.errors import CheckpointError, ConfigError, ContextLengthExceeded, RequestError
from moe_runtime.sampling import SamplingParams, log_softmax
from moe_runtime.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)
NAN = torch.full((VOCAB_SIZE,), torch.nan)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make_engine(tokenizer: Tokenizer, compute_device: ComputeDevice) -> Callable[..., Engine]:
    def make(answer: Answer = random_answer, **options: Any) -> Engine:
        config = EngineConfig(**{"block_size": 4, "num_blocks": 64, "max_batch_tokens": 16} | options)
        return compute_device.engine(FakeModel(answer), tokenizer, config)

    return make


def says(text: str) -> Answer:
    """A model that says ``text`` after a prompt that ends in a newline, then its end token."""

    def answer(history: list[int]) -> torch.Tensor:
        spoken = len(history) - history.index(10) - 1
        ids = [*text.encode(), MESSAGE_END]
        return torch.nn.functional.one_hot(torch.tensor(ids[min(spoken, len(ids) - 1)]), VOCAB_SIZE) * 9.0

    return answer


def drain(engine: Engine) -> list[TokenEvent]:
    events = []
    while engine.has_work():
        events += engine.step()
    return events


def alone(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(random_answer(tokens).argmax()))
    return tokens[len(prompt) :]


def test_greedy_generation_is_the_literal_loop(make_engine: Callable[..., Engine]) -> None:
    prompts = [[1, 2, 3], list(range(40)), [7]]
    answers = make_engine().generate(prompts, GREEDY)
    assert [list(choices[0].token_ids) for choices in answers] == [alone(prompt, 8) for prompt in prompts]


def test_an_answer_ends_at_the_end_token_without_its_text(make_engine: Callable[..., Engine]) -> None:
    [[answer]] = make_engine(says("你好!")).generate([[1, 10]], GREEDY)
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("你好!", "stop", None)
    assert answer.token_ids == (*"你好!".encode(), MESSAGE_END)


def test_max_tokens_ends_with_length_and_shows_half_characters(make_engine: Callable[..., Engine]) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=5)
    [[answer]] = make_engine(says("你好")).generate([[10]], params)
    assert (answer.text, answer.finish_reason) == ("你\ufffd", "length")


def test_without_max_tokens_the_context_is_the_limit(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_context=20)
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    assert len(engine.generate([[1] * 15], params)[0][0].token_ids) == 5


@pytest.mark.parametrize(
    ("given", "text", "reason"),
    [
        ({"stop": ("lo w",)}, "hel", "lo w"),
        ({"stop": ("lo w",), "include_stop": True}, "hello w", "lo w"),
        ({"stop": ("rldly", "or")}, "hello w", "or"),
        ({"stop": ("nowhere",)}, "hello world", None),
        ({"stop_token_ids": (ord("w"),)}, "hello ", ord("w")),
        ({"stop_token_ids": (ord("w"),), "include_stop": True}, "hello w", ord("w")),
        ({"stop": ("hel",), "min_tokens": 5}, "hello world", None),
        ({"stop": ("lo w",), "min_tokens": 4}, "hel", "lo w"),  # begins in the fourth token
        ({"stop": ("lo",), "min_tokens": 4}, "hel", "lo"),
        ({"stop": ("lo",), "min_tokens": 5}, "hello world", None),
        ({"stop": ("ello wor", "lo"), "min_tokens": 5, "include_stop": True}, "hello wor", "ello wor"),
        ({"stop": ("d!",)}, "hello world", None),
    ],
)
def test_stop_strings_and_stop_tokens(
    make_engine: Callable[..., Engine], given: dict[str, Any], text: str, reason: object
) -> None:
    params = dataclasses.replace(GREEDY, max_tokens=30, **given)
    [[answer]] = make_engine(says("hello world")).generate([[10]], params)
    assert (answer.text, answer.finish_reason, answer.stop_reason) == (text, "stop", reason)


def test_events_never_show_the_beginning_of_a_stop_string(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(says("abcabcX"))
    engine.add("r", [10], dataclasses.replace(GREEDY, max_tokens=20, stop=("bcX",)))
    assert [event.text for event in drain(engine)] == ["a", "", "", "bca", "", "", ""]


def test_ignore_eos_and_min_tokens_keep_the_answer_going(make_engine: Callable[..., Engine]) -> None:
    [[ignoring]] = make_engine(says("ab")).generate([[10]], dataclasses.replace(GREEDY, ignore_eos=True))
    assert ignoring.token_ids == (97, 98, *[MESSAGE_END] * 6) and ignoring.finish_reason == "length"
    [[longer]] = make_engine(says("ab")).generate([[10]], dataclasses.replace(GREEDY, min_tokens=4))
    assert longer.token_ids[:2] == (97, 98) and MESSAGE_END not in longer.token_ids[:4]
    assert longer.token_ids[4] == MESSAGE_END


def test_an_answer_of_min_tokens_may_be_as_long_as_max_tokens(make_engine: Callable[..., Engine]) -> None:
    params = dataclasses.replace(GREEDY, max_tokens=5, min_tokens=5, stop=("lo", "o w"))
    [[answer]] = make_engine(says("hello world")).generate([[10]], params)
    assert (answer.text, answer.finish_reason) == ("hello", "length")


def test_max_tokens_zero_only_looks_at_the_prompt(make_engine: Callable[..., Engine]) -> None:
    params = SamplingParams(max_tokens=0, prompt_logprobs=0, n=2)
    [choices] = make_engine().generate([[5, 6, 7]], params)
    assert [(choice.token_ids, choice.finish_reason) for choice in choices] == [((), "length")] * 2
    assert choices[0].prompt_logprobs is not None and len(choices[0].prompt_logprobs) == 3


@pytest.mark.cpu_only("the same sums in the same order as here; a device's are in test_device_sampling.py")
def test_logprobs_are_the_model_s_own_whatever_the_sampling(make_engine: Callable[..., Engine]) -> None:
    params = SamplingParams(
        temperature=0.3, top_k=2, seed=3, logprobs=3, max_tokens=4, repetition_penalty=1.5
    )
    [[answer]] = make_engine().generate([[5, 6, 7]], params)
    history = [5, 6, 7]
    assert answer.logprobs is not None and len(answer.logprobs) == 4
    for token in answer.logprobs:
        row = log_softmax(random_answer(history).numpy())
        assert token.logprob == row[token.token_id]
        assert [top.token_id for top in token.top] == np.argsort(-row)[:3].tolist()
        history.append(token.token_id)


@pytest.mark.parametrize("max_batch_tokens", [1, 7, 64])
def test_prompt_logprobs_of_a_cached_chunked_prompt(
    make_engine: Callable[..., Engine], max_batch_tokens: int
) -> None:
    engine = make_engine(max_batch_tokens=max_batch_tokens)
    prompt = [*b"a prompt of several blocks"]
    engine.generate([prompt], GREEDY)
    params = dataclasses.replace(GREEDY, prompt_logprobs=1, n=2)
    [choices] = engine.generate([prompt], params)
    entries = choices[0].prompt_logprobs
    assert choices[1].prompt_logprobs is None and entries is not None and entries[0] is None
    for position, entry in enumerate(entries[1:], start=1):
        assert entry is not None and entry.token_id == prompt[position]
        assert entry.logprob == log_softmax(random_answer(prompt[:position]).numpy())[prompt[position]]


def test_choices_differ_share_the_prompt_and_repeat_with_the_seed(make_engine: Callable[..., Engine]) -> None:
    params = SamplingParams(n=4, seed=11, max_tokens=6)
    engine = make_engine(max_batch_tokens=64)
    prompt = [*b"the same prompt for all choices"]
    first = engine.generate([prompt], params)[0]
    assert len({choice.token_ids for choice in first}) == 4
    assert [choice.num_cached_tokens for choice in first] == [0, 28, 28, 28]
    again = make_engine(max_batch_tokens=3, num_blocks=20).generate([[9] * 30, prompt], params)[1]
    assert [choice.token_ids for choice in again] == [choice.token_ids for choice in first]


def test_unseeded_requests_differ(make_engine: Callable[..., Engine]) -> None:
    answers = make_engine().generate([[1, 2]] * 8, SamplingParams(max_tokens=8))
    assert len({answer.token_ids for [answer] in answers}) == 8


def test_aborting_returns_the_blocks_at_any_moment(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_batch_tokens=8)
    for steps in range(6):
        engine.add("r", [3] * 20, dataclasses.replace(GREEDY, n=2))
        for _ in range(steps):
            engine.step()
        events = engine.abort("r")
        assert [(event.choice, event.finish_reason) for event in events] == [(0, "abort"), (1, "abort")]
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_free_blocks) == (0, 0, 64)
        assert not engine.has_work() and engine.abort("r") == []


def test_logits_that_are_not_numbers_fail_that_request_only(make_engine: Callable[..., Engine]) -> None:
    def answer(history: list[int]) -> torch.Tensor:
        return NAN if history[0] == 13 and len(history) > 5 else random_answer(history)

    engine = make_engine(answer)
    bad, good = engine.generate([[13, 1, 2], [14, 1, 2]], GREEDY)
    assert bad[0].finish_reason == "error" and "not finite" in str(bad[0].error)
    assert len(bad[0].token_ids) == 3 and list(good[0].token_ids) == alone([14, 1, 2], 8)
    assert engine.stats().num_free_blocks == 64 and engine.stats().finished_error == 1


def test_blocks_of_a_failed_request_are_not_reused(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(lambda history: NAN)
    for _ in range(2):
        [[answer]] = engine.generate([[13] * 9], GREEDY)
        assert answer.num_cached_tokens == 0


def test_a_step_that_fails_ends_the_running_and_spares_the_waiting(
    make_engine: Callable[..., Engine],
) -> None:
    engine = make_engine(max_running=1)
    engine.add("running", [1] * 9, GREEDY)
    engine.step()
    engine.add("waiting", [1] * 9, GREEDY)
    engine.model.fail_next = RuntimeError("boom")
    with pytest.raises(RuntimeError, match="boom"):
        engine.step()
    [event] = engine.fail_running("boom")
    assert (event.request_id, event.finish_reason, event.error) == ("running", "error", "boom")
    events = drain(engine)
    assert [token for event in events for token in event.token_ids] == alone([1] * 9, 8)
    assert events[0].num_cached_tokens == 0, "the cache of a failed step is not trusted"
    assert engine.stats().num_free_blocks == 64


def test_generate_leaves_a_usable_engine_when_a_step_fails(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_running=1)
    engine.model.fail_next = RuntimeError("boom")
    with pytest.raises(RuntimeError, match="boom"):
        engine.generate([[1] * 9, [2] * 9], GREEDY)
    assert not engine.has_work() and engine.stats().num_free_blocks == 64
    assert list(engine.generate([[1] * 9], GREEDY)[0][0].token_ids) == alone([1] * 9, 8)


def test_counters_add_up(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.generate([[1] * 9, [1] * 9], GREEDY)
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens, stats.finished_length) == (18, 16, 2)
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (18, 8)
    assert stats.computed_tokens == 18 - 8 + 2 * 7


@pytest.mark.parametrize(
    ("prompt", "given", "param"),
    [
        ([], {}, "prompt"),
        ([1, VOCAB_SIZE], {}, "prompt"),
        ([-1], {}, "prompt"),
        ([1] * 64, {}, "prompt"),
        ([1] * 65, {"max_tokens": 0}, "prompt"),
        ([1] * 60, {"max_tokens": 5}, "max_tokens"),
        ([1] * 60, {"min_tokens": 5}, "min_tokens"),
        ([1], {"logit_bias": {VOCAB_SIZE: 1.0}}, "logit_bias"),
        ([1], {"stop_token_ids": (VOCAB_SIZE,)}, "stop_token_ids"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_at_admission(
    make_engine: Callable[..., Engine], prompt: list[int], given: dict[str, Any], param: str
) -> None:
    engine = make_engine(max_context=64)
    with pytest.raises(RequestError) as caught:
        engine.add("r", prompt, SamplingParams(**given))
    assert caught.value.param == param and not engine.has_work()


def test_the_refusal_of_a_long_prompt_says_what_to_do(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(max_context=64)
    with pytest.raises(ContextLengthExceeded, match="has 100 tokens and the context is 64 .* --max-context"):
        engine.check([1] * 100, GREEDY)
    with pytest.raises(ContextLengthExceeded, match="lower max_tokens to 4 or less"):
        engine.check([1] * 60, GREEDY)


def test_the_longest_request_that_is_admitted_also_ends(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine(num_blocks=16, max_context=64, max_batch_tokens=5)
    params = SamplingParams(temperature=0.0, ignore_eos=True, n=3)
    [choices] = engine.generate([[1] * 10], params)
    assert [len(choice.token_ids) for choice in choices] == [54] * 3


def test_request_ids_in_use_are_refused(make_engine: Callable[..., Engine]) -> None:
    engine = make_engine()
    engine.add("r", [1], GREEDY)
    with pytest.raises(RequestError, match="'r' is in use"):
        engine.add("r", [1], GREEDY)


def test_the_cache_plan_names_the_knobs(tokenizer: Tokenizer) -> None:
    def engine(**options: Any) -> Engine:
        return Engine(
            FakeModel(config=FakeConfig(max_position_embeddings=100)), tokenizer, EngineConfig(**options)
        )

    assert engine(max_running=2).cache_size.num_blocks == 14  # two full contexts
    assert engine(cache_bytes=5 * 16 * 8).max_context == 80  # what the cache holds
    with pytest.raises(ConfigError, match=r"--cache-bytes 1MiB .*--num-blocks.*--max-context"):
        engine(max_context=100, cache_bytes=5 * 16 * 8)
    with pytest.raises(ConfigError, match="the model was made for at most 100"):
        engine(max_context=101)
    with pytest.raises(ConfigError, match="cache holds 0 tokens"):
        engine(cache_bytes=1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, SamplingParams()),
        (
            {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
            SamplingParams(temperature=0.6, top_p=0.95, top_k=20),
        ),
        ({"do_sample": False, "temperature": 0.7}, SamplingParams(temperature=0.0)),
        ({"do_sample": True, "repetition_penalty": 1.05}, SamplingParams(repetition_penalty=1.05)),
        ({"temperature": None, "top_k": 50, "eos_token_id": 3}, SamplingParams(top_k=50)),
    ],
)
def test_generation_config_gives_the_defaults(
    tmp_path: Path, values: dict[str, Any], expected: SamplingParams
) -> None:
    folder = tiny_checkpoint(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps(values))
    assert Engine.load(folder, EngineConfig(num_blocks=32)).default_params == expected


@pytest.mark.parametrize("values", [{"temperature": -1}, {"top_p": "0.9"}, {"top_k": True}, {"top_k": 1.5}])
def test_a_wrong_generation_config_stops_the_start(tmp_path: Path, values: dict[str, Any]) -> None:
    folder = tiny_checkpoint(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        Engine.load(folder, EngineConfig(num_blocks=32))


@pytest.mark.usefixtures("compute_device")
def test_a_loaded_engine_has_all_parts_and_answers_a_chat(tmp_path: Path) -> None:
    engine = Engine.load(tiny_checkpoint(tmp_path), EngineConfig(num_blocks=32))
    assert engine.chat is not None
    prompt = engine.chat.encode([{"role": "user", "content": "hi"}])
    [[answer]] = engine.generate([prompt], GREEDY)
    assert answer.finish_reason in ("stop", "length") and answer.num_prompt_tokens == len(prompt)
    assert answer.text == engine.tokenizer.decode(answer.token_ids)


def test_a_tokenizer_with_ids_beyond_the_model_stops_the_start(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    library = Library.from_file(str(folder / "tokenizer.json"))
    library.add_tokens([f"word-{token_id}" for token_id in range(MESSAGE_END + 1, VOCAB_SIZE + 1)])
    library.save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: token 'word-272' has id 272.* of 272"):
        Engine.load(folder, EngineConfig(num_blocks=8))


def test_the_echo_model_echoes(make_engine: Callable[..., Engine]) -> None:
    [[answer]] = make_engine(echo_answer).generate(
        [[*b"canary\n"]], dataclasses.replace(GREEDY, max_tokens=12)
    )
    assert answer.text == "canary\ncanar"


@pytest.mark.parametrize(("backend", "expected"), [("cpu", 1), ("reference", 2)])
def test_torch_keeps_one_thread_where_our_kernels_serve(tmp_path: Path, backend: str, expected: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    Engine.load(tiny_checkpoint(tmp_path), EngineConfig(num_blocks=32, backend=backend))
    assert torch.get_num_threads() == expected
    torch.set_num_threads(before)
