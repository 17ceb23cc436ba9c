"""A server on a free port for tests, and an engine that does as it is told: answers, waits, fails."""

import asyncio
import contextlib
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from moe_runtime.engine import EngineStats, TokenEvent, TokenLogprob, TopLogprob
from moe_runtime.errors import ContextLengthExceeded, EngineStopped, Overloaded, RequestError
from moe_runtime.sampling import SamplingParams
from moe_runtime.server.limits import Gate
from moe_runtime.server.metrics import Metrics
from moe_runtime.server.serve import Server
from moe_runtime.server.service import ModelCard, Service
from moe_runtime.server.settings import ServerConfig

MODEL = "tiny"
END_TOKEN = 256
ANSWER = "The rate is 4.35 %, 利率为 4.35 %。"


class ByteTokenizer:
    """Token id = byte; 256 ends a text."""

    special_ids = frozenset({END_TOKEN})

    def encode(self, text: str, *, add_special_tokens: bool = False, plain: bool = False) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return bytes(token_id for token_id in token_ids if token_id < 256).decode(errors="replace")

    def piece(self, token_id: int) -> tuple[str, bytes]:
        exact = bytes([token_id]) if token_id < 256 else b""
        return exact.decode(errors="replace"), exact


class PlainTemplate:
    """role: content, one turn per line."""

    def encode(self, messages: Sequence[dict[str, str]], **variables: Any) -> list[int]:
        return list("".join(f"{message['role']}: {message['content']}\n" for message in messages).encode())


@dataclass
class FakeEngine:
    """AsyncEngine's face: says ``answer`` byte by byte, each after ``delay`` seconds."""

    answer: str = ANSWER
    delay: float = 0.0
    prefill: float = 0.0
    max_open: int = 100
    refusals: list[Exception] = field(default_factory=list)  # raised by the next submits, one each
    fail_after: int | None = None  # tokens before an event with finish_reason "error"
    logprob: float = -0.5
    is_alive: bool = True
    refusal: str = ""
    max_context: int = 4096
    submitted: list[tuple[list[int], SamplingParams]] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    open: dict[str, asyncio.Event] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.engine = SimpleNamespace(
            tokenizer=ByteTokenizer(),
            chat=PlainTemplate(),
            default_params=SamplingParams(),
            max_context=self.max_context,
        )

    def start(self) -> None:
        self.is_alive = True

    def stop(self) -> None:
        self.is_alive = False
        for stopped in list(self.open.values()):
            stopped.set()

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self.open), num_blocks=8, num_free_blocks=6, prompt_tokens=11)

    def abort(self, request_id: str) -> None:
        stopped = self.open.pop(request_id, None)
        if stopped is not None:
            self.aborted.append(request_id)
            stopped.set()

    def submit(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        salt: str = "",
        scenario: str | None = None,
    ) -> AsyncIterator[TokenEvent]:
        if self.refusals:
            raise self.refusals.pop(0)
        if not self.is_alive:
            raise EngineStopped("the engine has stopped")
        if not prompt_ids:
            raise RequestError("the prompt is empty", param="prompt")
        if not all(0 <= token_id <= END_TOKEN for token_id in prompt_ids):
            raise RequestError("token ids must be in the vocabulary", param="prompt")
        if any(token_id > END_TOKEN for token_id in params.logit_bias):
            raise RequestError("token ids must be in the vocabulary", param="logit_bias")
        if len(prompt_ids) + 1 > self.max_context:
            raise ContextLengthExceeded(f"prompt has {len(prompt_ids)} tokens, context {self.max_context}")
        if len(self.open) >= self.max_open:
            raise Overloaded("the queue is full")
        self.submitted.append((list(prompt_ids), params))
        self.open[request_id] = asyncio.Event()
        return self._events(request_id, list(prompt_ids), params)

    async def _events(
        self, request_id: str, prompt_ids: list[int], params: SamplingParams
    ) -> AsyncIterator[TokenEvent]:
        stopped = self.open[request_id]
        try:
            if not await _pause(stopped, self.prefill):
                yield TokenEvent(request_id, 0, finish_reason="abort")
                return
            for choice in range(params.n):
                async for event in self._choice(request_id, choice, prompt_ids, params, stopped):
                    yield event
        finally:
            self.open.pop(request_id, None)

    async def _choice(
        self,
        request_id: str,
        choice: int,
        prompt_ids: list[int],
        params: SamplingParams,
        stopped: asyncio.Event,
    ) -> AsyncIterator[TokenEvent]:
        ids = [*self.answer.encode(), END_TOKEN]
        if params.max_tokens is not None:
            ids = ids[: params.max_tokens]
        prompt_logprobs = None
        if choice == 0 and params.prompt_logprobs is not None:
            known = [self._logprob(token_id, params.prompt_logprobs) for token_id in prompt_ids[1:]]
            prompt_logprobs = (None, *known)
        common = {"num_prompt_tokens": len(prompt_ids), "num_cached_tokens": 3}
        if not ids:
            yield TokenEvent(
                request_id, choice, finish_reason="length", prompt_logprobs=prompt_logprobs, **common
            )
        held = b""
        for position, token_id in enumerate(ids):
            if not await _pause(stopped, self.delay):
                yield TokenEvent(request_id, choice, finish_reason="abort")
                return
            if position == self.fail_after:
                yield TokenEvent(request_id, choice, finish_reason="error", error="logits are not finite")
                return
            held += bytes([token_id]) if token_id < 256 else b""
            text, held = (held.decode(), b"") if _whole(held) else ("", held)
            last = position == len(ids) - 1
            reason = ("stop" if token_id == END_TOKEN else "length") if last else None
            logprobs = None if params.logprobs is None else (self._logprob(token_id, params.logprobs),)
            yield TokenEvent(
                request_id,
                choice,
                text,
                (token_id,),
                logprobs,
                reason,
                prompt_logprobs=prompt_logprobs,
                **common,
            )
            prompt_logprobs = None

    def _logprob(self, token_id: int, num_top: int) -> TokenLogprob:
        piece = self.engine.tokenizer.piece
        top = tuple(TopLogprob(other, *piece(other), self.logprob) for other in range(65, 65 + num_top))
        return TokenLogprob(token_id, *piece(token_id), self.logprob, top)


async def _pause(stopped: asyncio.Event, seconds: float) -> bool:
    """Wait; False when the request was stopped meanwhile."""
    if seconds == 0:
        await asyncio.sleep(0)
        return not stopped.is_set()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stopped.wait(), seconds)
    return not stopped.is_set()


def _whole(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


@dataclass
class Running:
    """A served app and where to find it."""

    port: int
    engine: Any
    service: Service
    server: Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def wait_until(self, condition: Callable[[], bool], seconds: float = 5.0) -> bool:
        """Poll ``condition``; its last value."""
        deadline = time.monotonic() + seconds
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.005)
        return condition()

    def raw(self, request: bytes, *, timeout: float = 10.0) -> bytes:
        """Send bytes, read until the server closes or falls silent for ``timeout`` seconds."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(request)
            return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    """Everything until the peer closes."""
    answer = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(65536):
            answer += chunk
    return answer


@contextlib.contextmanager
def serving(engine: Any, *, max_prompt_characters: int = sys.maxsize, **limits: Any) -> Iterator[Running]:
    """Serve ``engine`` (an AsyncEngine or a FakeEngine) on a free port until the block ends."""
    config = ServerConfig(port=0, **limits)
    card = ModelCard(MODEL, 1_700_000_000, "fp_test")
    service = Service(engine, card, config, Gate(), Metrics(MODEL, engine.stats), max_prompt_characters)
    with serving_service(service) as running:
        yield running


@contextlib.contextmanager
def serving_service(service: Service) -> Iterator[Running]:
    """Serve a service that is put together already."""
    ready = threading.Event()
    server = Server(service, on_ready=ready.set)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
        thread.start()
        if not ready.wait(30):
            raise TimeoutError("the server did not start")
        try:
            yield Running(port, service.engine, service, server)
        finally:
            server.should_exit = True
            thread.join(30)
            if thread.is_alive():
                raise TimeoutError("the server did not stop")


def tiny_engine(folder: Path, **options: Any) -> Any:
    """A real AsyncEngine over a random tiny checkpoint."""
    from world import tiny_checkpoint

    from moe_runtime.async_engine import AsyncEngine
    from moe_runtime.config import EngineConfig
    from moe_runtime.engine import Engine

    settings = {"cache_bytes": 1 << 24, "threads": 1} | options
    return AsyncEngine(Engine.load(tiny_checkpoint(folder), EngineConfig(**settings)))
