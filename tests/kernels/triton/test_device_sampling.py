"""The engine with tokens chosen on the device says what it says with tokens chosen on the host."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from fake_model import Answer, FakeModel, byte_tokenizer, random_answer  # noqa: E402
from world import VOCAB_SIZE, tiny_checkpoint  # noqa: E402

from moe_runtime.config import EngineConfig  # noqa: E402
from moe_runtime.engine import Engine  # noqa: E402
from moe_runtime.kernels import choose  # noqa: E402
from moe_runtime.output import Completion, TokenEvent, TokenLogprob  # noqa: E402
from moe_runtime.sampling import SamplingParams  # noqa: E402

# Of a log-probability, see test_sampling.py.
ROUNDING = 2.0**-21
# With float32 weights a model's logits differ from the reference's by 5e-6 of the largest (test_models.py),
# which is below 8; a log-probability is a difference of two.
MODEL_BOUND = 2 * 5e-6 * 8

REQUESTS: dict[str, SamplingParams] = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=6, logprobs=2),
    "plain": SamplingParams(seed=1, max_tokens=4),
    "filters": SamplingParams(seed=2, max_tokens=6, top_k=40, top_p=0.9, min_p=0.01, n=2, logprobs=0),
    "penalties": SamplingParams(
        seed=3, max_tokens=6, repetition_penalty=1.4, presence_penalty=1.0, frequency_penalty=0.5
    ),
    "bias": SamplingParams(
        seed=4, max_tokens=6, min_tokens=3, logit_bias={258: 9.0, 40: 6.0}, temperature=0.6, logprobs=20
    ),
    "prompt": SamplingParams(seed=5, max_tokens=3, prompt_logprobs=1, logprobs=1),
    "only_prompt": SamplingParams(max_tokens=0, prompt_logprobs=0),
    "no_answer": SamplingParams(max_tokens=0),
}


def drain(engine: Engine) -> list[TokenEvent]:
    events = []
    while engine.has_work():
        events += engine.step()
    return events


def answers(engine: Engine) -> dict[tuple[str, int], Completion]:
    """All requests side by side, fed in chunks, with a cache so small that some of them are preempted."""
    for number, (name, params) in enumerate(REQUESTS.items()):
        engine.add(name, [number, *range(10 + number)], params)
    events: dict[tuple[str, int], list[TokenEvent]] = {}
    for event in drain(engine):
        events.setdefault((event.request_id, event.choice), []).append(event)
    assert engine.stats().preemptions > 0
    return {key: Completion.of(said) for key, said in events.items()}


def logprobs_of(answer: Completion) -> Iterator[TokenLogprob]:
    yield from answer.logprobs or ()
    yield from (each for each in answer.prompt_logprobs or () if each is not None)


def assert_same(ours: Completion, expected: Completion, bound: float) -> None:
    assert dataclasses.replace(ours, logprobs=None, prompt_logprobs=None) == dataclasses.replace(
        expected, logprobs=None, prompt_logprobs=None
    )
    for mine, truth in zip(logprobs_of(ours), logprobs_of(expected), strict=True):
        pairs = [(mine, truth), *zip(mine.top, truth.top, strict=True)]
        for told, known in pairs:
            assert (told.token_id, told.text, told.bytes) == (known.token_id, known.text, known.bytes)
            assert abs(told.logprob - known.logprob) <= bound + ROUNDING * (1 + abs(known.logprob))


@pytest.fixture
def make_engine(tmp_path: Path, device: torch.device) -> Callable[..., Engine]:
    tokenizer = byte_tokenizer(tmp_path)
    sampler = choose("triton", device=device).sample_rows

    class DeviceModel(FakeModel):
        def forward(self, *arguments: Any) -> torch.Tensor:
            return super().forward(*arguments).to(device)

    def make(answer: Answer = random_answer, *, on_device: bool = True, num_blocks: int = 9) -> Engine:
        config = EngineConfig(block_size=4, num_blocks=num_blocks, max_batch_tokens=16, graphs=False)
        model = DeviceModel(answer) if on_device else FakeModel(answer)
        return Engine(model, tokenizer, config, sampler=sampler if on_device else None)

    return make


def test_every_kind_of_request_gets_what_the_host_would_choose(make_engine: Callable[..., Engine]) -> None:
    ours, expected = answers(make_engine()), answers(make_engine(on_device=False))
    assert ours.keys() == expected.keys()
    for key, answer in ours.items():
        assert_same(answer, expected[key], 0.0)
    told = {key[0] for key, answer in ours.items() if answer.prompt_logprobs is not None}
    assert told == {"prompt", "only_prompt"}


def test_the_host_reads_one_small_tensor_per_step(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(num_blocks=64)
    names = ("greedy", "plain", "penalties", "bias")
    for name in names:
        engine.add(name, [1, 2, 3], REQUESTS[name])
    read = []
    plain = torch.Tensor.numpy

    def noted(tensor: torch.Tensor, *, force: bool = False) -> Any:
        if force:
            read.append((tensor.dtype, tuple(tensor.shape)))
        return plain(tensor, force=force)

    monkeypatch.setattr(torch.Tensor, "numpy", noted)
    assert len(engine.step()) == len(engine.step()) == len(names)
    assert read == [(torch.int32, (len(names), 3 + 2 * 20))] * 2


def test_only_the_rows_that_a_prompt_is_asked_about_go_to_the_host(
    make_engine: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(num_blocks=64)
    engine.add("a", [1, 2, 3], REQUESTS["plain"])
    engine.add("b", [1, 2, 3], REQUESTS["prompt"])
    read = []
    plain = torch.Tensor.numpy

    def noted(tensor: torch.Tensor, *, force: bool = False) -> Any:
        if force:
            read.append(tuple(tensor.shape))
        return plain(tensor, force=force)

    monkeypatch.setattr(torch.Tensor, "numpy", noted)
    engine.step()
    assert read == [(3, VOCAB_SIZE), (1, 2)]
    engine.step()
    assert read[2:] == [(2, 3 + 2)]


def test_logits_that_are_not_finite_fail_their_request_alone(make_engine: Callable[..., Engine]) -> None:
    def answer(history: list[int]) -> torch.Tensor:
        return torch.full((VOCAB_SIZE,), torch.nan) if history[0] == 7 else random_answer(history)

    engine = make_engine(answer)
    engine.add("bad", [7, 1], SamplingParams(max_tokens=3, logprobs=1))
    engine.add("greedy", [7, 2], SamplingParams(temperature=0.0, max_tokens=3))
    engine.add("good", [8, 1], SamplingParams(temperature=0.0, max_tokens=2))
    engine.add("nothing", [9], SamplingParams(max_tokens=2, repetition_penalty=1e-45))
    said = {event.request_id: (event.finish_reason, event.error) for event in drain(engine)}
    not_finite = "the model computed logits that are not finite numbers for this request"
    assert said == {
        "bad": ("error", not_finite),
        "greedy": ("error", not_finite),
        "good": ("length", None),
        "nothing": ("error", "penalties, logit_bias and min_tokens leave no token to choose"),
    }


def test_a_whole_model_says_what_the_reference_says(tmp_path: Path, device: torch.device) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen3_moe", num_hidden_layers=1)

    def load(backend: Any, place: Any) -> Engine:
        config = EngineConfig(device=place, backend=backend, block_size=4, num_blocks=16, graphs=False)
        return Engine.load(folder, config)

    ours, reference = load("triton", "cuda" if device.type == "cuda" else "cpu"), load("reference", "cpu")
    assert ours._sampler is not None and reference._sampler is None
    for name in ("penalties", "bias"):
        params = dataclasses.replace(REQUESTS[name], max_tokens=3, min_tokens=0, n=2, logprobs=3)
        found, expected = (engine.generate([[1, 2, 3, 4]], params)[0] for engine in (ours, reference))
        for answer, other in zip(found, expected, strict=True):
            assert_same(answer, other, MODEL_BOUND)
