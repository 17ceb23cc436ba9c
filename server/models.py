"""GET /v1/models and /v1/models/{id}."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from moe_runtime.server.service import Service
from moe_runtime.server.wire import json_response


async def list_models(service: Service, request: Request) -> Response:
    """The model of this server and its scenarios."""
    return json_response({"object": "list", "data": _cards(service)})


async def get_model(service: Service, request: Request) -> Response:
    """One model by name. Raises ModelNotFound."""
    wanted = request.path_params["model_id"]
    cards = {card["id"]: card for card in _cards(service)}
    if wanted not in cards:
        service.require_model(wanted)  # raises: what is not listed cannot be asked for
    return json_response(cards[wanted])


def _cards(service: Service) -> list[dict[str, Any]]:
    return service.scenarios.cards(service.model.as_object(service.engine.engine.max_context))
