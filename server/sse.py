"""Server-sent events: chunks, then ``[DONE]``; or an error object and neither ``[DONE]`` nor a finish reason.

Clients take a stream that simply ends for a complete answer, so a failure must say so in the stream itself.
"""

import json
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moe_runtime.server.errors import INTERNAL_ERROR, describe
from moe_runtime.server.generation import Generation, while_connected

logger = logging.getLogger("moe_runtime.server")
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",  # a proxy that buffers would hold the tokens back
}


def event(data: bytes) -> bytes:
    """One event. ``data`` must be a single line, as compact JSON is."""
    return b"data: " + data + b"\n\n"


def to_json(value: dict[str, Any]) -> bytes:
    """Compact JSON; refuses NaN rather than sending what no parser takes."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


class EventStream(Response):
    """Sends ``chunks`` of ``generation``; aborts it when the client leaves, in prefill as in decode."""

    def __init__(
        self, generation: Generation, chunks: AsyncGenerator[dict[str, Any], None], headers: dict[str, str]
    ) -> None:
        super().__init__(status_code=200, headers=HEADERS | headers)
        del self.headers["content-length"]
        self.generation = generation
        self.chunks = chunks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send_chunks(send))
        finally:
            self.generation.abort()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_chunks(self, send: Send) -> None:
        first = []
        if self.generation.has_policy:
            # A prompt that is refused is refused with a status, before anything is sent.
            first = [await anext(self.chunks)]
            self.headers.update(self.generation.headers())
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        last = b"[DONE]"
        try:
            for chunk in first:
                await _send_event(send, to_json(chunk))
            async with aclosing(self.chunks) as chunks:
                async for chunk in chunks:
                    await _send_event(send, to_json(chunk))
        except Exception as error:
            reply = describe(error)
            self.generation.record.outcome = reply.code or "error"
            if reply.code == INTERNAL_ERROR:
                logger.exception("%s failed while streaming", self.generation.record.request_id)
            last = reply.body
        await _send_event(send, last)


async def _send_event(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": event(data), "more_body": True})
