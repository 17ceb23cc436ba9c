"""HTTP/1.1 below the app: uvicorn's h11 protocol, with deadlines, strict heads and OpenAI's error object.

uvicorn answers a broken request with a line of plain text, waits for ever for a head that trickles in and for
a client that never reads. h11 takes bare line feeds and a request with two lengths. Each of the four has been
an attack on some server; all four end here.
"""

import asyncio
import logging
import re
import socket
import sys
import uuid
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from moe_runtime.server.errors import error_body
from moe_runtime.server.settings import ServerConfig

HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")
BARE_LINE_FEED = re.compile(rb"(?<!\r)\n")
FOLDED_LINE = re.compile(rb"\n[ \t]")
# A chunk costs the parser far more than its bytes: a body in crumbs is an attack, not a client.
MAX_SMALL_CHUNKS = 1024
SMALL_CHUNK_BYTES = 32
LINGER_SECONDS = 5.0
logger = logging.getLogger("moe_runtime.server")


class RefusedRequest(h11.RemoteProtocolError):
    """A request that h11 would take and we do not; its message may go to the client."""


class StrictConnection(h11.Connection):
    """h11, refusing what it forgives: bare line feeds, folded lines, two lengths, odd hosts, crumbs."""

    def __init__(self, config: ServerConfig) -> None:
        super().__init__(h11.SERVER, config.max_header_bytes)
        self.config = config
        self.num_chunks = 0
        self.num_body_bytes = 0

    def next_event(self) -> Any:
        """The next event. Raises RefusedRequest, or h11's own error, with a status hint."""
        waiting = self.their_state is h11.IDLE
        before = self.trailing_data[0] if waiting else b""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.num_chunks = self.num_body_bytes = 0
            self._check_head(event, before[: len(before) - len(self.trailing_data[0])])
        elif isinstance(event, h11.Data):
            self.num_chunks += event.chunk_start
            self.num_body_bytes += len(event.data)
            if self.num_chunks > MAX_SMALL_CHUNKS + self.num_body_bytes // SMALL_CHUNK_BYTES:
                raise RefusedRequest("the body comes in too many small chunks", error_status_hint=400)
        return event

    def _check_head(self, request: h11.Request, head: bytes) -> None:
        if len(head) > self.config.max_header_bytes or len(request.headers) > self.config.max_headers:
            raise RefusedRequest("the request head is too large", error_status_hint=431)
        if BARE_LINE_FEED.search(head):
            raise RefusedRequest("a header line ends without a carriage return", error_status_hint=400)
        if FOLDED_LINE.search(head):
            raise RefusedRequest("folded header lines are not accepted", error_status_hint=400)
        names = [name for name, _ in request.headers]
        if b"transfer-encoding" in names and b"content-length" in names:
            raise RefusedRequest("the request states two body lengths", error_status_hint=400)
        for name, value in request.headers:
            if name == b"host" and not HOST.fullmatch(value):
                raise RefusedRequest("the Host header is not a host", error_status_hint=400)


class Protocol(H11Protocol):
    """One connection, with timers for the head, the rest of a body nobody wants, and unread answers."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: ServerConfig,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.limits = limits
        self.conn = StrictConnection(limits)
        self.refused = False
        self.timers: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # asyncio does this only where the listening socket names its protocol; without it each answer of two
        # writes waits 40 ms for the client's kernel.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(503, "the server has no connection left; try again later", "overloaded")
            return
        self._start("head", self.limits.header_timeout, self._head_timeout)

    def data_received(self, data: bytes) -> None:
        if self.refused:
            return
        super().data_received(data)
        if self.refused or self.transport.is_closing():
            return
        if self.conn.their_state is not h11.SEND_BODY:
            self._stop("linger")
        if self.conn.their_state is not h11.IDLE:
            self._stop("head")
        elif self.conn.trailing_data[0] and "head" not in self.timers:
            self._start("head", self.limits.header_timeout, self._head_timeout)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # Answered before the body was in, for example with 413. Read on and forget, so that the client gets
        # to see the answer, but not for ever.
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._start("linger", LINGER_SECONDS, self.transport.abort)
        else:
            self._stop("linger")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start("write", self.limits.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop("write")

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in self.timers.values():
            timer.cancel()
        self.timers.clear()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        if not self.refused:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn while it handles h11's error, which knows more than ``msg``."""
        error = sys.exception()
        status = getattr(error, "error_status_hint", 400)
        # h11's own messages may quote the request, which ours never do.
        message = str(error) if isinstance(error, RefusedRequest) else "the request is not valid HTTP/1.1"
        self._refuse(status, message, "invalid_http")

    def _head_timeout(self) -> None:
        if self.transport.is_closing():
            return
        if self.conn.trailing_data[0]:
            seconds = self.limits.header_timeout
            message = f"the request head did not arrive within {seconds:g} seconds (--header-timeout)"
            self._refuse(408, message, "request_timeout")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer without the app, close, and take nothing more from this connection."""
        self.refused = True
        self._unset_keepalive_if_required()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.cycle.response_started:
                self.transport.close()
                return
        request_id = f"req_{uuid.uuid4().hex}"
        kind = "server_error" if status >= 500 else "invalid_request_error"
        body = error_body(message, kind, code)
        head = [
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
            "content-type: application/json",
            f"content-length: {len(body)}",
            "connection: close",
            f"x-request-id: {request_id}",
        ]
        if status == 503:
            head.append("retry-after: 1")
        self.transport.write("\r\n".join(head).encode() + b"\r\n\r\n" + body)
        logger.info("%s refused before the app: %d %s", request_id, status, code)
        self.transport.close()

    def _start(self, name: str, seconds: float, action: Callable[[], None]) -> None:
        self._stop(name)
        self.timers[name] = self.loop.call_later(seconds, action)

    def _stop(self, name: str) -> None:
        timer = self.timers.pop(name, None)
        if timer is not None:
            timer.cancel()
