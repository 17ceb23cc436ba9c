"""The whole API on one screen: routes, and what every request passes through on its way to them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from moe_runtime.server.admin import add_scenario, drop_scenario, list_scenarios
from moe_runtime.server.chat import create_chat_completion
from moe_runtime.server.completions import create_completion
from moe_runtime.server.errors import describe, error_response
from moe_runtime.server.limits import Limits
from moe_runtime.server.models import get_model, list_models
from moe_runtime.server.ops import health, metrics
from moe_runtime.server.request_log import RequestLog, record_of
from moe_runtime.server.service import Service


def build_app(service: Service) -> Starlette:
    """The ASGI app. Its lifespan starts the engine's thread and stops it."""
    routes = [
        Route("/v1/models", partial(list_models, service), methods=["GET"]),
        Route("/v1/models/{model_id:path}", partial(get_model, service), methods=["GET"]),
        Route("/v1/chat/completions", partial(create_chat_completion, service), methods=["POST"]),
        Route("/v1/completions", partial(create_completion, service), methods=["POST"]),
        Route("/health", partial(health, service), methods=["GET"]),
        Route("/metrics", partial(metrics, service), methods=["GET"]),
    ]
    if service.admin_token:
        routes += [
            Route("/admin/scenarios", partial(list_scenarios, service), methods=["GET"]),
            Route("/admin/scenarios/{name}", partial(add_scenario, service), methods=["POST"]),
            Route("/admin/scenarios/{name}", partial(drop_scenario, service), methods=["DELETE"]),
        ]
    middleware = [  # outermost first
        Middleware(RequestLog, metrics=service.metrics),
        Middleware(Limits, config=service.config, gate=service.gate),
    ]

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.engine.start()
        try:
            yield
        finally:
            service.engine.stop()
            service.close()

    app = Starlette(
        routes=routes,
        middleware=middleware,
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_error},
    )
    app.router.redirect_slashes = False  # a redirect would be the one answer that is not JSON
    return app


async def _http_error(request: Request, error: Exception) -> Response:
    reply = describe(error)
    record_of(request).outcome = reply.code or "-"
    return error_response(error)
