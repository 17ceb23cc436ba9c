"""What may come in: the body cap and its deadline, the sum of all bodies, and the closed door while draining.

One ASGI middleware around every route, so that no handler, present or future, can read an unbounded body. It
knows nothing of JSON. Limits below HTTP (heads, connections, unread answers) are transport.py's.
"""

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_runtime.errors import EngineStopped, Overloaded
from moe_runtime.server.errors import ClientGone, EdgeError
from moe_runtime.server.settings import ServerConfig

METHODS_WITH_BODY = frozenset({"POST", "PUT", "PATCH", "DELETE"})


class Gate:
    """What the whole server holds at this moment. Used on the event loop only."""

    def __init__(self) -> None:
        self.draining = False
        self.open_requests = 0
        self.buffered_bytes = 0


class Limits:
    """Reads a request's whole body within the limits, then hands it to the app in one piece."""

    def __init__(self, app: ASGIApp, config: ServerConfig, gate: Gate) -> None:
        self.app = app
        self.config = config
        self.gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if scope["method"] not in METHODS_WITH_BODY:
            await self._run(scope, receive, send)
            return
        self._refuse_when_draining()
        body = bytearray()
        try:
            try:
                async with asyncio.timeout(self.config.body_timeout):
                    await self._read_body(scope, receive, body)
            except TimeoutError:
                message = (
                    f"the body did not arrive within {self.config.body_timeout:g} seconds (--body-timeout)"
                )
                raise EdgeError(408, message, code="request_timeout") from None
            self._refuse_when_draining()
            await self._run(scope, _replay(bytes(body), receive), send)
        finally:
            self.gate.buffered_bytes -= len(body)

    def _refuse_when_draining(self) -> None:
        if self.gate.draining:
            raise EngineStopped("the server is shutting down and takes no new requests")

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.gate.open_requests += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.gate.open_requests -= 1

    async def _read_body(self, scope: Scope, receive: Receive, body: bytearray) -> None:
        """Fill ``body``; every byte in it is counted in the gate, also when this raises."""
        limit = self.config.max_body_bytes
        declared = _content_length(scope)
        if declared > limit:
            raise _too_large(limit)
        if self.gate.buffered_bytes + declared > self.config.max_buffered_bytes:
            raise Overloaded("too many large requests at one time; try again later (--max-buffered-bytes)")
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk = message.get("body", b"")
            if len(body) + len(chunk) > limit:
                raise _too_large(limit)
            if self.gate.buffered_bytes + len(chunk) > self.config.max_buffered_bytes:
                raise Overloaded(
                    "too many large requests at one time; try again later (--max-buffered-bytes)"
                )
            body += chunk
            self.gate.buffered_bytes += len(chunk)
            if not message.get("more_body", False):
                return


def _too_large(limit: int) -> EdgeError:
    message = f"the request body is larger than {limit} bytes (--max-body-bytes)"
    return EdgeError(413, message, code="request_too_large")


def _content_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value)  # h11 lets only digits through, and only one such header
    return 0


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then whatever the connection says next, which can only be a disconnect."""
    pending: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
