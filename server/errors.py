"""Every error that leaves this server, as OpenAI's ``{"error": {message, type, param, code}}``.

Nothing else writes one. An exception class is looked up in ROWS along its ``__mro__``, so a new class is
answered by its parent's row until it has its own. Messages of errors raised on purpose go to the client;
those of bugs stay in the log.
"""

import json
from dataclasses import dataclass

from starlette.exceptions import HTTPException
from starlette.responses import Response

from moe_runtime.errors import (
    CheckpointError,
    ConfigError,
    ContextLengthExceeded,
    DeviceLost,
    EngineStopped,
    IsaUnavailable,
    KernelError,
    ModelNotFound,
    MoeRuntimeError,
    OutsideScenario,
    Overloaded,
    PlanError,
    RequestError,
    RequestFailed,
    ScenarioUnavailable,
)


class EdgeError(Exception):
    """The HTTP request is wrong before its body means anything; for example it is above --max-body-bytes."""

    def __init__(self, status: int, message: str, *, code: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after = retry_after


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


@dataclass(frozen=True)
class Row:
    """How one class of error looks on the wire; ``public``: may its message leave the house?"""

    status: int
    type: str
    code: str | None = None
    public: bool = True


INTERNAL_ERROR = "internal_error"  # a bug of ours: the log has the traceback
ROWS: dict[type[BaseException], Row] = {
    RequestError: Row(400, "invalid_request_error"),
    ContextLengthExceeded: Row(400, "invalid_request_error", "context_length_exceeded"),
    ModelNotFound: Row(404, "invalid_request_error", "model_not_found"),
    OutsideScenario: Row(409, "invalid_request_error", "outside_scenario"),
    ScenarioUnavailable: Row(503, "server_error", "scenario_unavailable"),
    Overloaded: Row(503, "server_error", "overloaded"),
    EngineStopped: Row(503, "server_error", "engine_stopped"),
    DeviceLost: Row(503, "server_error", "engine_stopped"),
    RequestFailed: Row(500, "server_error", "request_failed"),
    # The next five are raised while starting; met later, they are bugs like any other exception.
    ConfigError: Row(500, "server_error", INTERNAL_ERROR, public=False),
    CheckpointError: Row(500, "server_error", INTERNAL_ERROR, public=False),
    PlanError: Row(500, "server_error", INTERNAL_ERROR, public=False),
    KernelError: Row(500, "server_error", INTERNAL_ERROR, public=False),
    IsaUnavailable: Row(500, "server_error", INTERNAL_ERROR, public=False),
    MoeRuntimeError: Row(500, "server_error", INTERNAL_ERROR, public=False),
    Exception: Row(500, "server_error", INTERNAL_ERROR, public=False),
}

# What Starlette's router says in one word, said so that a client can act on it.
ROUTING = {
    404: ("unknown_url", "There is nothing at this URL; chat is at /v1/chat/completions."),
    405: ("method_not_allowed", "This URL does not take this method; the Allow header names those it takes."),
}
INTERNAL = "The server failed to answer; its log has the reason under this request id."


@dataclass(frozen=True)
class ErrorReply:
    """An error ready to be sent: ``body`` is the JSON object, also used as a stream's last event."""

    status: int
    body: bytes
    headers: dict[str, str]
    code: str | None


def error_body(message: str, kind: str, code: str | None, param: str | None = None) -> bytes:
    """The bytes of one error object."""
    fields = {"message": message, "type": kind, "param": param, "code": code}
    return json.dumps({"error": fields}, ensure_ascii=True).encode()


def describe(error: BaseException) -> ErrorReply:
    """Any exception -> status, body and headers. Never raises, never shows the inside of a bug."""
    headers: dict[str, str] = {}
    if isinstance(error, EdgeError):
        if error.retry_after is not None:
            headers["retry-after"] = str(error.retry_after)
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        return ErrorReply(error.status, error_body(str(error), kind, error.code), headers, error.code)
    if isinstance(error, HTTPException):
        routing_code, message = ROUTING.get(error.status_code, ("invalid_request", error.detail))
        body = error_body(message, "invalid_request_error", routing_code)
        return ErrorReply(error.status_code, body, dict(error.headers or {}), routing_code)
    row = next(ROWS[kind] for kind in type(error).__mro__ if kind in ROWS)
    code = getattr(error, "code", None) or row.code
    if row.status == 503:
        headers["retry-after"] = str(getattr(error, "retry_after", 1))
        if isinstance(error, EngineStopped):
            headers["connection"] = "close"  # the next try should reach another server
    elif row.status in (409, 500):  # which clients take for errors that pass
        headers["x-should-retry"] = "false"  # the same request would fail the same way
    message = str(error) if row.public else INTERNAL
    return ErrorReply(
        row.status, error_body(message, row.type, code, getattr(error, "param", None)), headers, code
    )


def error_response(error: BaseException) -> Response:
    """The HTTP response for any exception."""
    reply = describe(error)
    return Response(reply.body, reply.status, reply.headers, media_type="application/json")
