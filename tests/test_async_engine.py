"""The engine thread: streams, aborts, overload, failures and shutdown, over the fake model.

``Gate`` holds the model's thread inside a step until the test lets it go, so no test waits for luck.
"""

import asyncio
import dataclasses
import logging
import random
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_model import FakeModel, byte_tokenizer, random_answer

from moe_runtime.async_engine import AsyncEngine, RequestStream
from moe_runtime.batch import Batch
from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine, TokenEvent
from moe_runtime.errors import ContextLengthExceeded, EngineStopped, Overloaded, RequestError
from moe_runtime.kernels import RouteMeter
from moe_runtime.sampling import SamplingParams
from moe_runtime.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
LONG = dataclasses.replace(GREEDY, max_tokens=400)
PROMPT = list(b"hello there")
SECONDS = 20.0  # for what takes milliseconds


class Gate(FakeModel):
    """A fake model that says when a step has begun and, while closed, waits in it."""

    def __init__(self) -> None:
        super().__init__(random_answer)
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()

    def forward(self, batch: Batch, cache: torch.Tensor, meter: RouteMeter | None = None) -> torch.Tensor:
        self.entered.set()
        assert self.open.wait(SECONDS)
        return super().forward(batch, cache, meter)

    async def hold(self) -> None:
        """Close the gate and wait until the thread stands in it."""
        self.open.clear()
        self.entered.clear()
        assert await asyncio.to_thread(self.entered.wait, SECONDS)


def in_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(asyncio.wait_for(test(**fixtures), 60.0))

    return run


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@asynccontextmanager
async def running(tokenizer: Tokenizer, **options: Any) -> AsyncIterator[tuple[AsyncEngine, Gate]]:
    model = Gate()
    config = EngineConfig(**{"block_size": 4, "num_blocks": 128, "max_batch_tokens": 32} | options)
    engine = AsyncEngine(Engine(model, tokenizer, config))
    engine.start()
    try:
        yield engine, model
    finally:
        model.open.set()
        await asyncio.to_thread(engine.stop)
        assert not engine.is_alive
        stats = engine.engine.stats()
        assert stats.num_free_blocks == stats.num_blocks, "blocks were lost"


async def collect(stream: RequestStream) -> list[TokenEvent]:
    return [event async for event in stream]


async def idle(engine: AsyncEngine) -> None:
    while engine.num_open:
        await asyncio.sleep(0.001)


def alone() -> list[int]:
    tokens = list(PROMPT)
    for _ in range(8):
        tokens.append(int(random_answer(tokens).argmax()))
    return tokens[len(PROMPT) :]


@in_loop
async def test_a_stream_gives_every_token_and_ends(tokenizer: Tokenizer) -> None:
    async with running(tokenizer) as (engine, _):
        events = await collect(engine.submit("r", PROMPT, GREEDY))
        assert [token for event in events for token in event.token_ids] == alone()
        assert [event.finish_reason for event in events] == [None] * 7 + ["length"]


@in_loop
async def test_many_streams_and_choices_at_once(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, num_blocks=24, max_context=40) as (engine, _):
        two = dataclasses.replace(GREEDY, n=2)
        streams = [engine.submit(f"{i}", PROMPT, two) for i in range(30)]
        for events in await asyncio.gather(*map(collect, streams)):
            for choice in (0, 1):
                own = [event for event in events if event.choice == choice]
                assert [token for event in own for token in event.token_ids] == alone()
                assert own[-1].finish_reason == "length"
        assert engine.stats().generation_tokens == 30 * 2 * 8


@in_loop
async def test_readers_that_leave_at_random_disturb_nobody(tokenizer: Tokenizer) -> None:
    draw = random.Random(3)
    async with running(tokenizer, num_blocks=24, max_context=40, max_batch_tokens=8) as (engine, _):

        async def read(name: str, patience: int) -> list[int]:
            tokens: list[int] = []
            async with engine.submit(name, PROMPT, GREEDY) as stream:
                async for event in stream:
                    tokens += event.token_ids
                    if len(tokens) > patience:
                        break
            return tokens

        readers = [asyncio.create_task(read(f"{i}", draw.choice([0, 3, 99]))) for i in range(120)]
        for reader in draw.sample(readers, 40):
            await asyncio.sleep(0.002)
            reader.cancel()
        for tokens in await asyncio.gather(*readers, return_exceptions=True):
            assert isinstance(tokens, asyncio.CancelledError) or tokens == alone()[: len(tokens)]
        await idle(engine)


@in_loop
async def test_a_wrong_request_is_refused_at_the_call(tokenizer: Tokenizer) -> None:
    async with running(tokenizer) as (engine, _):
        with pytest.raises(RequestError, match="empty"):
            engine.submit("r", [], GREEDY)
        with pytest.raises(ContextLengthExceeded):
            engine.submit("r", [1] * 600, GREEDY)
        stream = engine.submit("r", PROMPT, LONG)
        with pytest.raises(RequestError, match="in use"):
            engine.submit("r", PROMPT, GREEDY)
        await stream.aclose()


@in_loop
async def test_closing_a_stream_aborts_in_prefill_and_in_decode(tokenizer: Tokenizer) -> None:
    for num_events in (0, 1, 5):
        async with running(tokenizer, max_batch_tokens=2) as (engine, _):
            stream = engine.submit("r", PROMPT, LONG)
            for _ in range(num_events):
                await anext(stream)
            await stream.aclose()
            await stream.aclose()
            await idle(engine)
            assert engine.stats().finished_abort == 1
            assert await collect(stream) == []


@in_loop
async def test_cancelling_the_reader_aborts(tokenizer: Tokenizer) -> None:
    async with running(tokenizer) as (engine, model):
        reader = asyncio.create_task(collect(engine.submit("r", PROMPT, LONG)))
        await model.hold()
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        model.open.set()
        await idle(engine)
        assert engine.stats().finished_abort == 1


@in_loop
async def test_dropping_a_stream_aborts(tokenizer: Tokenizer) -> None:
    async with running(tokenizer) as (engine, _):
        stream = engine.submit("r", PROMPT, LONG)
        await anext(stream)
        del stream
        await idle(engine)
        assert engine.stats().finished_abort == 1


@in_loop
async def test_a_request_aborted_before_its_first_step_gets_its_last_event(tokenizer: Tokenizer) -> None:
    async with running(tokenizer) as (engine, model):
        first = engine.submit("first", PROMPT, LONG)
        await model.hold()
        second = engine.submit("second", PROMPT, dataclasses.replace(LONG, n=2))
        engine.abort("second")
        engine.abort("nobody")
        model.open.set()
        assert [event.finish_reason for event in await collect(second)] == ["abort", "abort"]
        await first.aclose()


@in_loop
async def test_beyond_the_queue_requests_are_refused_with_the_knob(tokenizer: Tokenizer) -> None:
    async with running(tokenizer, max_running=2, max_queue=3) as (engine, model):
        streams = [engine.submit("0", PROMPT, LONG)]
        await model.hold()
        streams += [
            engine.submit(f"{i}", PROMPT, LONG) for i in range(1, 5)
        ]  # one place and three in the queue
        with pytest.raises(Overloaded, match="raise --max-queue"):
            engine.submit("5", PROMPT, GREEDY)
        for stream in streams:
            await stream.aclose()
        model.open.set()
        await idle(engine)
        streams = [engine.submit(f"{i}", PROMPT, GREEDY) for i in range(5)]
        assert [len(await collect(stream)) for stream in streams] == [8] * 5


@in_loop
async def test_a_failing_step_fails_its_batch_and_the_engine_goes_on(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tokenizer, max_running=1) as (engine, model):
        broken = engine.submit("broken", PROMPT, LONG)
        await model.hold()
        waiting = engine.submit("waiting", PROMPT, GREEDY)
        model.fail_next = MemoryError("boom")
        with caplog.at_level(logging.CRITICAL, "moe_runtime.async_engine"):
            model.open.set()
            events = await collect(broken)
        assert (events[-1].finish_reason, events[-1].error) == (
            "error",
            "the engine failed on this batch: MemoryError",
        )
        assert [token for event in await collect(waiting) for token in event.token_ids] == alone()
        assert engine.is_alive


@in_loop
async def test_an_event_lost_in_a_failing_step_is_made_up_for(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("moe_runtime.async_engine"), "disabled", True)
    async with running(tokenizer) as (engine, _):
        close = engine.engine._close

        def close_then_fail(sequence_id: int, event: TokenEvent) -> TokenEvent:
            close(sequence_id, event)
            monkeypatch.setattr(engine.engine, "_close", close)
            raise RuntimeError("after the choice was closed")

        monkeypatch.setattr(engine.engine, "_close", close_then_fail)
        events = await collect(engine.submit("r", PROMPT, dataclasses.replace(GREEDY, n=2)))
        assert [event.finish_reason for event in events if event.finish_reason] == ["error", "error"]


@in_loop
async def test_a_lost_device_ends_everything_with_its_reason(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("moe_runtime.async_engine"), "disabled", True)
    fault = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def synchronize(_: torch.device) -> None:
        raise fault

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    async with running(tokenizer, max_running=1) as (engine, model):
        model.device = torch.device("cuda", 0)
        stream = engine.submit("r", PROMPT, LONG)
        await model.hold()
        waiting = engine.submit("waiting", PROMPT, GREEDY)
        model.fail_next = fault
        model.open.set()
        for events in (await collect(stream), await collect(waiting)):
            assert events[-1].finish_reason == "error"
            assert (events[-1].error or "").startswith("cuda:0 has failed (CUDA error: an illegal memory")
        assert "cuda:0 has failed" in engine.refusal
        await asyncio.to_thread(engine._thread.join)  # type: ignore[union-attr]
        assert not engine.is_alive and not engine.num_open
        with pytest.raises(EngineStopped, match="computes no more in this process"):
            engine.submit("late", PROMPT, GREEDY)
        engine.engine.abort("waiting")  # nobody else will give its blocks back


@in_loop
async def test_the_death_of_the_thread_ends_every_stream(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    async with running(tokenizer) as (engine, model):
        stream = engine.submit("r", PROMPT, LONG)
        await model.hold()
        monkeypatch.setattr(engine.engine, "fail_running", None)
        monkeypatch.setattr(logging.getLogger("moe_runtime.async_engine"), "disabled", True)
        model.fail_next = RuntimeError("boom")
        model.open.set()
        events = await collect(stream)
        assert (events[-1].finish_reason, events[-1].error) == ("error", "the engine has died")
        with pytest.raises(EngineStopped, match="has died"):
            engine.submit("late", PROMPT, GREEDY)
        engine.engine.abort("r")  # nobody else will give its blocks back


@in_loop
async def test_draining_lets_open_requests_end_and_takes_no_new_ones(tokenizer: Tokenizer) -> None:
    async with running(tokenizer) as (engine, model):
        stream = engine.submit("r", PROMPT, GREEDY)
        await model.hold()
        drain = asyncio.create_task(engine.drain(SECONDS))
        await asyncio.sleep(0)
        with pytest.raises(EngineStopped, match="draining"):
            engine.submit("late", PROMPT, GREEDY)
        model.open.set()
        assert len(await collect(stream)) == 8
        assert await drain is True


@in_loop
async def test_draining_aborts_what_takes_too_long(tokenizer: Tokenizer) -> None:
    async with running(tokenizer) as (engine, model):
        streams = [engine.submit(f"{i}", PROMPT, LONG) for i in range(3)]
        await model.hold()
        drain = asyncio.create_task(engine.drain(0.01))
        await asyncio.sleep(0.05)
        model.open.set()
        assert await drain is False
        for stream in streams:
            assert (await collect(stream))[-1].finish_reason == "abort"


@in_loop
async def test_stopping_ends_every_stream(tokenizer: Tokenizer) -> None:
    async with running(tokenizer) as (engine, _):
        streams = [engine.submit(f"{i}", PROMPT, LONG) for i in range(3)]
        await anext(streams[0])
        await asyncio.to_thread(engine.stop)
        for stream in streams:
            assert (await collect(stream))[-1].finish_reason == "abort"
        with pytest.raises(EngineStopped, match="has stopped"):
            engine.submit("late", PROMPT, GREEDY)


def test_an_engine_that_was_not_started_refuses(tokenizer: Tokenizer) -> None:
    async def submit() -> None:
        engine = AsyncEngine(Engine(FakeModel(), tokenizer, EngineConfig(num_blocks=64)))
        with pytest.raises(EngineStopped, match="not started"):
            engine.submit("r", PROMPT, GREEDY)
        assert not engine.is_alive
        engine.stop()

    asyncio.run(submit())


def test_requests_of_a_closed_loop_are_aborted(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = Gate()
    engine = AsyncEngine(Engine(model, tokenizer, EngineConfig(num_blocks=64)))
    engine.start()
    streams: list[RequestStream] = []

    async def leave() -> None:
        streams.append(engine.submit("r", PROMPT, LONG))

    logging.getLogger("moe_runtime.async_engine").disabled = True
    asyncio.run(leave())
    assert engine._wait_until_idle(SECONDS)
    logging.getLogger("moe_runtime.async_engine").disabled = False
    engine.stop()
    assert engine.stats().finished_abort == 1 and engine.stats().num_free_blocks == 64
