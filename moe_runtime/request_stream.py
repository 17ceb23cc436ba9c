"""The way of one request's events from the engine's thread to the event loop that reads them."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from moe_runtime.output import TokenEvent


@dataclass(slots=True, eq=False)
class Route:
    """Where the events of one request go, and which of its choices have not had their last."""

    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[TokenEvent]
    open_choices: set[int]


class RequestStream:
    """The events of one request: ``async for event in stream``, until every choice has had its last.

    Leaving early (``aclose``, cancelling the task that waits in ``__anext__``, dropping the stream) aborts
    the request and frees its blocks. To wait with a time limit, keep the waiting task and use
    ``asyncio.wait``: ``asyncio.wait_for`` cancels.
    """

    def __init__(self, abort: Callable[[str], None], request_id: str, route: Route) -> None:
        self.request_id = request_id
        self._abort = abort
        self._events = route.events
        self._open_choices = set(route.open_choices)
        self._closed = False

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> TokenEvent:
        if self._closed or not self._open_choices:
            raise StopAsyncIteration
        try:
            event = await self._events.get()
        except asyncio.CancelledError:
            self._close()
            raise
        if event.finish_reason is not None:
            self._open_choices.discard(event.choice)
        return event

    async def aclose(self) -> None:
        """Abort the request unless it has ended. Safe to call twice."""
        self._close()

    async def __aenter__(self) -> "RequestStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        if not self._closed:
            self._closed = True
            if self._open_choices:
                self._abort(self.request_id)
