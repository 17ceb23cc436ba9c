"""/admin/scenarios: scenarios come and go while the server runs. Closed without --admin-token-file.

An added scenario is read from the folder of scenarios and checked as at the start. One that is dropped
refuses new requests with a 503 from that moment, and the answers under way go on to their end. On a server
that was started with --scenarios their experts are read from the checkpoint, and given up, with them.
"""

import asyncio
import hmac
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response

from moe_runtime.engine import Engine
from moe_runtime.errors import CheckpointError, ConfigError, PlanError
from moe_runtime.experts.registry import Registry
from moe_runtime.server.errors import EdgeError
from moe_runtime.server.service import Service
from moe_runtime.server.wire import json_response

logger = logging.getLogger("moe_runtime.server")
Result = TypeVar("Result")
POLL_SECONDS = 0.05


async def list_scenarios(service: Service, request: Request) -> Response:
    """Those that are served, their state and how many sequences use them now."""
    _authorise(service, request)
    return json_response(
        {"scenarios": [await _shown(service, scenario.name) for scenario in service.scenarios]}
    )


async def add_scenario(service: Service, request: Request) -> Response:
    """Serve a scenario of the folder, as it is on disk now."""
    _authorise(service, request)
    name, scenarios = request.path_params["name"], service.scenarios
    if name in scenarios:
        raise _conflict(f"scenario '{name[:64]}' is {scenarios.state(name)} already")
    registry = scenarios.registry
    if registry is None:
        raise _refused("this server has no folder of scenarios; start it with --scenario-dir")
    try:
        # Shielded: a client that leaves must not leave half a scenario behind.
        await asyncio.shield(scenarios.begin(_bring(service, registry, name)))
    except (PlanError, ConfigError, CheckpointError) as error:
        raise _refused(str(error)) from error
    return json_response(await _shown(service, name))


async def drop_scenario(service: Service, request: Request) -> Response:
    """Take one away. Answers when its last request has ended, or, with its state, after --drain-seconds."""
    _authorise(service, request)
    name, scenarios = request.path_params["name"], service.scenarios
    if name not in scenarios:
        raise EdgeError(404, f"there is no scenario '{name[:64]}'", code="scenario_not_found")
    if scenarios.exported is not None:
        raise _conflict(f"scenario '{name}' is the model itself")
    if scenarios.state(name) == "leaving":
        raise _conflict(f"scenario '{name}' is leaving already")
    scenarios.leave(name)
    task = scenarios.begin(_take_away(service, name))
    done, _ = await asyncio.wait({task}, timeout=service.config.drain_seconds)
    if not done:
        return json_response(await _shown(service, name))
    task.result()
    return json_response({"name": name, "state": "gone"})


async def _bring(service: Service, registry: Registry, name: str) -> None:
    """From disk to the engine: its experts beside the running steps, then its mask between two of them."""
    scenarios, live = service.scenarios, service.engine.engine.live
    with scenarios.joining(name):
        async with scenarios.changing:
            scenario = await asyncio.to_thread(registry.open, name)
            wanted = {} if live is None else live.lacking(scenario.mask)
            if live is not None:
                await asyncio.to_thread(live.read, wanted)

            def begin(engine: Engine) -> None:
                if live is not None:
                    live.admit(wanted, engine.masks.absent)
                try:
                    engine.masks.add(scenario.name, scenario.mask, scenario.policy, scenario.recovery)
                except Exception:
                    _trim(engine)
                    raise

            await _between_steps(service, begin)
            scenarios.add(scenario)
    service.show_holdings()
    logger.info("scenario %s was added with %d experts", name, sum(map(len, wanted.values())))


async def _take_away(service: Service, name: str) -> None:
    """Wait until nobody uses it; then it never was. Goes on when the client has left."""
    while await _users(service, name):
        await asyncio.sleep(POLL_SECONDS)

    def end(engine: Engine) -> int:
        engine.masks.remove(name)
        return _trim(engine)

    async with service.scenarios.changing:
        dropped = await _between_steps(service, end)
        service.scenarios.forget(name)
        service.show_holdings()
    logger.info("scenario %s was taken away with %d experts", name, dropped)


def _trim(engine: Engine) -> int:
    """Give up what no scenario uses, where experts may go at all; how many that were."""
    if engine.live is None:
        return 0
    return engine.live.trim(engine.masks.scenarios.values(), engine.masks.absent)


async def _shown(service: Service, name: str) -> dict[str, Any]:
    return {"name": name, "state": service.scenarios.state(name), "running": await _users(service, name)}


async def _users(service: Service, name: str) -> int:
    return await _between_steps(service, lambda engine: engine.masks.users(name))


async def _between_steps(service: Service, work: Callable[[Engine], Result]) -> Result:
    return await asyncio.wrap_future(service.engine.between_steps(work))


def _authorise(service: Service, request: Request) -> None:
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), service.admin_token)
    if kind.lower() != "bearer" or not right:
        raise EdgeError(401, "send the token of --admin-token-file as a bearer token", code="unauthorized")


def _conflict(message: str) -> EdgeError:
    return EdgeError(409, message, code="scenario_conflict")


def _refused(message: str) -> EdgeError:
    return EdgeError(422, message, code="scenario_refused")
