"""GET /v1/models and /v1/models/{id}."""

from starlette.requests import Request
from starlette.responses import Response

from moe_runtime.server.service import Service
from moe_runtime.server.wire import json_response


async def list_models(service: Service, request: Request) -> Response:
    """The one model of this server, as a list."""
    card = service.model.as_object(service.engine.engine.max_context)
    return json_response({"object": "list", "data": [card]})


async def get_model(service: Service, request: Request) -> Response:
    """One model by name. Raises ModelNotFound."""
    service.require_model(request.path_params["model_id"])
    return json_response(service.model.as_object(service.engine.engine.max_context))
