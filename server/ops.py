"""GET /health and /metrics: for the load balancer and for Prometheus."""

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from moe_runtime.errors import EngineStopped
from moe_runtime.server.service import Service
from moe_runtime.server.wire import json_response


async def health(service: Service, request: Request) -> Response:
    """200 while requests are taken. Raises EngineStopped once the engine is dead or the server drains."""
    if service.gate.draining:
        raise EngineStopped("the server is shutting down")
    if not service.engine.is_alive:
        raise EngineStopped(f"{service.engine.refusal or 'the engine has stopped'}; restart the server")
    return json_response({"status": "ok"})


async def metrics(service: Service, request: Request) -> Response:
    """Prometheus text format."""
    return Response(service.metrics.render(), media_type=CONTENT_TYPE_LATEST)
