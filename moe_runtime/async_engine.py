"""AsyncEngine: the engine on its own thread, an asyncio queue per request. (Signatures; body follows.)"""

import asyncio
from collections.abc import Sequence

from moe_runtime.engine import Engine
from moe_runtime.output import EngineStats, TokenEvent
from moe_runtime.sampling import SamplingParams


class RequestStream:
    """The events of one request, ``async for event in stream``. Closing or cancelling it aborts the request."""

    request_id: str

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> TokenEvent:
        raise NotImplementedError

    async def aclose(self) -> None:
        """Abort the request unless it has ended. Safe to call twice."""
        raise NotImplementedError


class AsyncEngine:
    """Runs ``engine.step`` on one thread. All methods but ``submit`` and ``abort`` are for the owner alone."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def start(self) -> None:
        raise NotImplementedError

    def submit(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams) -> RequestStream:
        """Queue a request; call from the event loop that will read it.

        Raises, before anything is queued: RequestError (as ``Engine.check``), Overloaded, EngineStopped.
        """
        raise NotImplementedError

    def abort(self, request_id: str) -> None:
        """End a request with finish_reason "abort"; unknown or ended ids are ignored."""
        raise NotImplementedError

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests, wait for the open ones; after ``timeout`` seconds abort them. True if none was."""
        raise NotImplementedError

    def stop(self) -> None:
        """Abort what is open and end the thread."""
        raise NotImplementedError

    def stats(self) -> EngineStats:
        raise NotImplementedError

    @property
    def is_alive(self) -> bool:
        raise NotImplementedError


__all__ = ["AsyncEngine", "RequestStream", "asyncio"]
