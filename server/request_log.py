"""The outermost middleware: a request id, one log line without any prompt, an answer for every exception."""

import logging
import time
import uuid
from dataclasses import dataclass, field

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moe_runtime.server.errors import INTERNAL_ERROR, ClientGone, describe, error_response
from moe_runtime.server.metrics import Metrics

RECORD = "moe.record"  # the record's key in the ASGI scope
PROBES = ("/health", "/metrics")
logger = logging.getLogger("moe_runtime.server")


@dataclass(slots=True)
class RequestRecord:
    """What is worth knowing about one request afterwards; handlers fill it in as they learn it."""

    request_id: str = field(default_factory=lambda: f"req_{uuid.uuid4().hex}")
    started: float = field(default_factory=time.monotonic)
    status: int | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    outcome: str = "-"  # finish reasons, or the error's code


def record_of(request: Request) -> RequestRecord:
    """The record that RequestLog opened for this request."""
    record: RequestRecord = request.scope[RECORD]
    return record


class RequestLog:
    """Wraps everything. After it, no exception is left for uvicorn to answer in plain text."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = scope[RECORD] = RequestRecord()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.request_id
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except ClientGone:
            record.outcome = "client_gone"
        except Exception as error:
            reply = describe(error)
            record.outcome = reply.code or "error"
            if reply.code == INTERNAL_ERROR:
                logger.exception("%s failed", record.request_id)
            if record.status is not None:
                raise  # half an answer is out; only closing the connection tells the truth
            await error_response(error)(scope, receive, send_with_id)
        finally:
            self.metrics.observe_response(record.status)
            self._log(scope, record)

    def _log(self, scope: Scope, record: RequestRecord) -> None:
        # Probes come every few seconds; while they find nothing they are not worth a line.
        quiet = scope["path"] in PROBES and record.status == 200
        logger.log(
            logging.DEBUG if quiet else logging.INFO,
            "%s %s %s %s %.3fs prompt=%d cached=%d generated=%d %s",
            record.request_id,
            scope["method"],
            scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:200],
            record.status or "-",
            time.monotonic() - record.started,
            record.prompt_tokens,
            record.cached_tokens,
            record.completion_tokens,
            record.outcome,
        )
