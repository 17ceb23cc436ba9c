"""The promise: what a request gets does not depend on what else the engine is doing, to the last bit.

The same requests are answered alone, each in a fresh engine, and in random mixes: different neighbours and
arrival times, aborts, token budgets, block sizes, tiny caches that force preemptions, prefix cache on and
off. Tokens and logprobs must be equal as numbers, not nearly. Then the same with canaries: nobody's text
may ever appear in another's answer.
"""

import dataclasses
import random
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import pytest
from devices import ComputeDevice
from fake_model import FakeModel, byte_tokenizer, echo_answer
from world import ARCHITECTURES, tiny_checkpoint

import moe_runtime._C as _C
from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine, TokenEvent
from moe_runtime.loader import load_model
from moe_runtime.sampling import SamplingParams
from moe_runtime.tokenizer import Tokenizer

MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "qwen3_moe": ({}, 200),
    "qwen3_moe bfloat16": ({"torch_dtype": "bfloat16"}, 30),
    "deepseek_v3 bfloat16": ({"torch_dtype": "bfloat16"}, 30),
    "qwen3_moe int8 cache": ({"torch_dtype": "bfloat16"}, 30),
    "deepseek_v3 int8 cache": ({}, 15),
} | {name: ({}, 15) for name in ARCHITECTURES if name != "qwen3_moe"}
GREEDY = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True, logprobs=3)
SEEDED = SamplingParams(
    seed=5, max_tokens=16, ignore_eos=True, logprobs=0, top_p=0.9, presence_penalty=0.5, n=2
)
Result = dict[int, list[TokenEvent]]
KvDtype = Literal["auto", "int8"]


def random_prompts(draw: random.Random, count: int) -> list[list[int]]:
    """Half of them begin alike, so that cached prefixes matter."""
    common = [draw.randrange(256) for _ in range(20)]
    own = [[draw.randrange(256) for _ in range(draw.randint(1, 16))] for _ in range(count)]
    return [common[: draw.randint(8, 20)] + ids if draw.random() < 0.5 else ids for ids in own]


def random_config(draw: random.Random, longest: int, kv_dtype: KvDtype) -> EngineConfig:
    block_size = draw.choice([2, 4, 8])
    least = -(-longest // block_size)
    return EngineConfig(
        max_context=longest,
        block_size=block_size,
        num_blocks=draw.randint(least, 2 * least),
        max_batch_tokens=draw.choice([3, 16, 64, 256]),
        max_running=draw.choice([2, 16]),
        prefix_caching=draw.random() < 0.7,
        kv_dtype=kv_dtype,
    )


def content(events: list[TokenEvent]) -> list[Any]:
    """Everything that must be equal; which tokens were found in the cache may differ."""
    return [dataclasses.replace(event, request_id="", num_cached_tokens=0) for event in events]


def run_mix(
    engine: Engine,
    requests: dict[str, tuple[list[int], SamplingParams]],
    draw: random.Random,
    aborted: float = 0.25,
) -> dict[str, Result]:
    """Requests arrive at random moments; a share of them is aborted at one."""
    results: dict[str, Result] = {name: defaultdict(list) for name in requests}
    arriving = list(requests.items())
    draw.shuffle(arriving)
    doomed = {name: draw.randint(0, 40) for name in requests if draw.random() < aborted}
    moment = 0
    while arriving or engine.has_work():
        while arriving and draw.random() < 0.5:
            name, (prompt, params) = arriving.pop()
            engine.add(name, prompt, params)
        for name in [name for name, when in doomed.items() if when == moment]:
            engine.abort(name)
        for event in engine.step():
            results[event.request_id][event.choice].append(event)
        moment += 1
    assert engine.stats().num_free_blocks == engine.stats().num_blocks
    return results


@pytest.mark.slow
@pytest.mark.every_isa
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_equal_to_the_last_bit_alone_and_in_any_mix(
    name: str, compute_device: ComputeDevice, tmp_path: Path
) -> None:
    overrides, num_mixes = MODELS[name]
    if compute_device.isa != _C.supported_isas()[0]:
        # The best set gets the long run; mixes are the engine's, bits the kernels'.
        num_mixes = min(num_mixes, 8)
    folder = tiny_checkpoint(tmp_path, name.split()[0], **overrides)
    model = load_model(folder, compute_device.kernels())
    tokenizer = Tokenizer.load(folder)
    draw = random.Random(name)
    prompts = random_prompts(draw, 24)
    kv_dtype: KvDtype = "int8" if "int8 cache" in name else "auto"
    alone = EngineConfig(prefix_caching=False, max_batch_tokens=1024, kv_dtype=kv_dtype, graphs=False)
    expected: list[Result] = []
    for index, prompt in enumerate(prompts):
        engine = compute_device.engine(model, tokenizer, alone)
        params = SEEDED if index % 3 == 0 else GREEDY
        request = {"alone": (prompt, params)}
        expected.append(run_mix(engine, request, random.Random(1), aborted=0.0)["alone"])
        assert all(events[-1].finish_reason == "length" for events in expected[-1].values())
    preemptions = hits = 0
    for _ in range(num_mixes):
        config = random_config(draw, max(map(len, prompts)) + 16, kv_dtype)
        engine = compute_device.engine(model, tokenizer, config)
        chosen = draw.sample(range(len(prompts)), 7)
        requests = {str(i): (prompts[i], SEEDED if i % 3 == 0 else GREEDY) for i in chosen}
        for request_id, result in run_mix(engine, requests, draw).items():
            for choice, events in result.items():
                wanted = content(expected[int(request_id)][choice])
                assert content(events) == wanted[: len(events)]  # shorter when it was aborted
        preemptions += engine.stats().preemptions
        hits += engine.stats().prefix_hit_tokens
    assert preemptions > num_mixes // 2 and hits > 5 * num_mixes, "the mixes must be rough"


def canary(number: int) -> str:
    return f"canary-{number:03d}-{number * 7919 % 1000:03d}"


@pytest.mark.parametrize("seed", range(8))
def test_no_canary_is_ever_seen_in_another_s_answer(
    seed: int, compute_device: ComputeDevice, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    engine = compute_device.engine(
        FakeModel(echo_answer),
        byte_tokenizer(tmp_path),
        EngineConfig(block_size=4, num_blocks=24, max_batch_tokens=16, max_running=12, max_context=64),
    )
    arriving = list(range(64))
    doomed = {f"{number}": draw.randint(0, 60) for number in draw.sample(arriving, 20)}
    texts: dict[str, str] = defaultdict(str)
    ended: dict[str, str | None] = {}
    moment = 0
    while arriving or engine.has_work():
        if arriving and draw.random() < 0.7:
            number = arriving.pop(0)
            prompt = f"{canary(number)}\n".encode()
            engine.add(
                str(number), list(prompt), dataclasses.replace(GREEDY, max_tokens=draw.randint(20, 40))
            )
        late = [name for name in doomed if name not in ended and draw.random() < 0.05]
        for event in [event for name in late for event in engine.abort(name)] + engine.step():
            texts[event.request_id] += event.text
            ended[event.request_id] = event.finish_reason
        moment += 1
    assert {ended[str(number)] for number in range(64) if str(number) not in doomed} == {"length"}
    assert sum(reason == "abort" for reason in ended.values()) >= 10
    assert engine.stats().preemptions > 20 and engine.stats().prefix_hit_tokens > 50
    for number in range(64):
        line = f"{canary(number)}\n"
        assert (line * 9).startswith(texts[str(number)])
        assert not any(canary(other) in texts[str(number)] for other in range(64) if other != number)
    assert engine.stats().num_free_blocks == 24
