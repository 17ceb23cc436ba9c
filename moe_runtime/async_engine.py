"""AsyncEngine: the engine on a thread of its own, and a stream of events per request for asyncio.

The event loop only leaves orders (add, abort) in an inbox and reads streams; every call of the engine but
``check`` happens on the thread, between steps. Events go back with ``call_soon_threadsafe``, once per step
and loop. No stream is left waiting: each choice gets a last event, whatever happens to the engine.
"""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from moe_runtime.engine import Engine
from moe_runtime.errors import DeviceLost, EngineStopped, Overloaded, RequestError
from moe_runtime.output import EngineStats, FinishReason, TokenEvent
from moe_runtime.request_stream import RequestStream, Route
from moe_runtime.sampling import SamplingParams

__all__ = ["AsyncEngine", "RequestStream"]

Result = TypeVar("Result")
LOGGER = logging.getLogger(__name__)
JOIN_SECONDS = 60.0
ABORT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Order:
    """Something to do between steps: add a request, or without ``params`` abort it."""

    request_id: str
    prompt_ids: Sequence[int] = ()
    params: SamplingParams | None = None
    salt: str = ""
    scenario: str | None = None
    work: "Work | None" = None  # instead of all this


@dataclass(frozen=True, slots=True)
class Work:
    """A call of the engine and who waits for its result."""

    call: Callable[[Engine], Any]
    done: Future[Any]

    def do(self, engine: Engine) -> None:
        if self.done.set_running_or_notify_cancel():
            try:
                self.done.set_result(self.call(engine))
            except Exception as error:  # noqa: BLE001 (it goes to whoever waits)
                self.done.set_exception(error)


class AsyncEngine:
    """Owns the engine from ``start`` to ``stop``. ``submit`` belongs to an event loop, the rest to anyone."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._lock = threading.Condition()  # guards what follows; an RLock, as a finalizer may abort anywhere
        self._inbox: list[Order] = []
        self._num_choices = 0  # open ones, of all routes
        self._routes: dict[str, Route] = {}
        self._stats = engine.stats()
        self._refusal = "the engine has not started"
        self._stopping = False
        self._lost = False  # the device, and with it everything that is open
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread. Once only."""
        if self._thread is not None:
            raise EngineStopped("the engine was started before; make a new AsyncEngine")
        self._refusal = ""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        salt: str = "",
        scenario: str | None = None,
    ) -> RequestStream:
        """Queue a request; call it in the event loop that will read the stream. See ``Engine.add``.

        Raises before anything is queued: RequestError or ContextLengthExceeded as ``Engine.check``,
        Overloaded when the queue is full, EngineStopped while draining and after.
        """
        self.engine.check(prompt_ids, params)
        route = Route(asyncio.get_running_loop(), asyncio.Queue(), set(range(params.n)))
        with self._lock:
            if self._refusal:
                raise EngineStopped(self._refusal)
            if request_id in self._routes:
                raise RequestError(f"request id {request_id!r} is in use", param="request_id")
            self._refuse_overload(params.n)
            self._routes[request_id] = route
            self._num_choices += params.n
            self._inbox.append(Order(request_id, tuple(prompt_ids), params, salt, scenario))
            self._lock.notify_all()
        return RequestStream(self.abort, request_id, route)

    def between_steps(self, work: Callable[[Engine], Result]) -> "Future[Result]":
        """Do ``work`` on the engine's thread, after all that was submitted before and before all that comes
        later; the steps wait for it. Its error is the future's. Raises EngineStopped.
        """
        done: Future[Result] = Future()
        with self._lock:
            if self._refusal:
                raise EngineStopped(self._refusal)
            self._inbox.append(Order("", work=Work(work, done)))
            self._lock.notify_all()
        return done

    def abort(self, request_id: str) -> None:
        """End a request with finish_reason "abort" before the next step; ignored if not open."""
        with self._lock:
            if request_id in self._routes:
                self._inbox.append(Order(request_id))
                self._lock.notify_all()

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait for the open ones; after ``timeout`` seconds abort what is left.

        Returns whether all ended by themselves.
        """
        self._refusal = self._refusal or "the engine is draining and takes no new requests"
        if await asyncio.to_thread(self._wait_until_idle, timeout):
            return True
        with self._lock:
            for request_id in self._routes:
                self.abort(request_id)
        await asyncio.to_thread(self._wait_until_idle, ABORT_SECONDS)
        return False

    def stop(self) -> None:
        """Abort what is open and end the thread; waits for the step in progress. Safe to call twice."""
        with self._lock:
            self._refusal = "the engine has stopped"
            self._stopping = True
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join(JOIN_SECONDS)

    def stats(self) -> EngineStats:
        """The numbers after the last step."""
        return self._stats

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs; False before ``start``, after ``stop``, and should a bug have ended it."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def refusal(self) -> str:
        """Why requests are refused; empty while they are taken."""
        return self._refusal

    @property
    def num_open(self) -> int:
        """Requests whose last event has not been sent."""
        return len(self._routes)

    def _refuse_overload(self, num_choices: int) -> None:
        limit = self.engine.config.max_running + self.engine.config.max_queue
        if self._num_choices + num_choices > limit:
            raise Overloaded(
                f"{self._num_choices} sequences run or wait and this request needs {num_choices} more, the "
                f"limit is {limit} (--max-running plus --max-queue); try again later or raise --max-queue"
            )

    def _wait_until_idle(self, timeout: float) -> bool:
        with self._lock:
            return self._lock.wait_for(lambda: not self._routes or not self.is_alive, timeout)

    # From here on: the engine's thread.

    def _run(self) -> None:
        try:
            while (orders := self._take_orders()) is not None:
                self._publish([event for order in orders for event in self._obey(order)])
                if self.engine.has_work():
                    self._publish(self._step())
            if not self._lost:
                self._publish([event for name in list(self._routes) for event in self.engine.abort(name)])
        finally:
            with self._lock:
                self._refusal = self._refusal or "the engine has died"
                for order in self._inbox:
                    if order.work is not None:
                        order.work.done.cancel()
                reason: FinishReason = "abort" if self._stopping else "error"
                self._publish(
                    TokenEvent(name, choice, finish_reason=reason, error=self._refusal)
                    for name, route in list(self._routes.items())
                    for choice in sorted(route.open_choices)
                )

    def _take_orders(self) -> list[Order] | None:
        """Wait for something to do; None when it is time to end."""
        with self._lock:
            self._lock.wait_for(lambda: self._inbox or self._stopping or self._lost or self.engine.has_work())
            orders, self._inbox = self._inbox, []
            return None if self._stopping or self._lost else orders

    def _obey(self, order: Order) -> list[TokenEvent]:
        if order.work is not None:
            order.work.do(self.engine)
            return []
        if order.params is None:
            return self.engine.abort(order.request_id)
        try:
            self.engine.add(
                order.request_id, order.prompt_ids, order.params, salt=order.salt, scenario=order.scenario
            )
        except Exception:  # this request only; the log has the story
            LOGGER.exception("request %s could not be added", order.request_id)
            self.engine.abort(order.request_id)
            self._end_lost("the engine could not take this request", [order.request_id])
        return []

    def _step(self) -> list[TokenEvent]:
        try:
            return self.engine.step()
        except Exception as error:  # one bad batch must not end the service; the log has the story
            LOGGER.exception("a step failed")
            message = f"the engine failed on this batch: {type(error).__name__}"
            if isinstance(error, DeviceLost):
                message = self._refusal = str(error)
                self._lost = True
            self._publish(self.engine.fail_running(message))
            with self._lock:
                # A choice may have ended inside the step that failed, its last event lost with it.
                not_yet_added = {order.request_id for order in self._inbox}
                self._end_lost(message, self._routes.keys() - not_yet_added)
            return []

    def _publish(self, events: Iterable[TokenEvent]) -> None:
        """Send events to their loops, drop the routes that end, let ``stats`` and ``drain`` see it."""
        deliveries: dict[asyncio.AbstractEventLoop, list[tuple[Route, TokenEvent]]] = {}
        with self._lock:
            for event in events:
                route = self._routes.get(event.request_id)
                if route is None:
                    continue
                deliveries.setdefault(route.loop, []).append((route, event))
                if event.finish_reason is not None:
                    route.open_choices.discard(event.choice)
                    self._num_choices -= 1
                    if not route.open_choices:
                        del self._routes[event.request_id]
            self._stats = self.engine.stats()
            self._lock.notify_all()
        for loop, batch in deliveries.items():
            self._send(loop, batch)

    def _send(self, loop: asyncio.AbstractEventLoop, batch: list[tuple[Route, TokenEvent]]) -> None:
        try:
            loop.call_soon_threadsafe(_deliver, batch)
        except RuntimeError:  # the loop was closed: nobody reads any more
            LOGGER.warning("the event loop of %d events is gone; their requests are aborted", len(batch))
            for _, event in batch:
                self.abort(event.request_id)

    def _end_lost(self, message: str, request_ids: Iterable[str]) -> None:
        """Last events for those choices of ``request_ids`` that the engine knows nothing about (any more)."""
        self._publish(
            [
                TokenEvent(name, choice, finish_reason="error", error=message)
                for name in request_ids
                for choice in sorted(self._routes[name].open_choices - self.engine.open_choices(name))
            ]
        )


def _deliver(batch: list[tuple[Route, TokenEvent]]) -> None:
    for route, event in batch:
        route.events.put_nowait(event)
