"""The parts that answers of both generating endpoints share."""

import time
from dataclasses import dataclass
from typing import Any, Self

from starlette.responses import Response

from moe_runtime.server.generation import Generation
from moe_runtime.server.sse import to_json


@dataclass(frozen=True)
class Envelope:
    """What surrounds the choices: equal in all chunks of one answer."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def of(cls, generation: Generation, prefix: str, kind: str) -> Self:
        """The envelope of one answer; its id and the request id share their digits."""
        digits = generation.record.request_id.removeprefix("req_")
        fingerprint = generation.service.model.fingerprint
        return cls(f"{prefix}-{digits}", kind, int(time.time()), generation.model, fingerprint)

    def wrap(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
            "choices": choices,
        }


def json_response(value: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    """A whole answer."""
    return Response(to_json(value), 200, headers, media_type="application/json")


def ignored_header(names: list[str]) -> dict[str, str]:
    """The header that names accepted fields which were not obeyed; empty when there are none."""
    return {"x-moe-ignored-fields": ",".join(names)} if names else {}
