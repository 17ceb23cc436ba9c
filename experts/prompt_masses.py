"""Lost mass of prompts under a mask, as a server measures it: each is answered by one token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from moe_runtime.engine import Engine
from moe_runtime.errors import PlanError, RequestFailed
from moe_runtime.plan import ExpertMask
from moe_runtime.recovery import Recovery
from moe_runtime.sampling import SamplingParams

ONE_TOKEN = SamplingParams(temperature=0.0, max_tokens=1)
SCENARIO = "measured"


def prompt_masses(
    engine: Engine,
    mask: ExpertMask,
    prompts: Sequence[Sequence[int]],
    advance: Callable[[int], None] = lambda prompts: None,
    recovery: Recovery | None = None,
) -> list[float]:
    """Of each prompt (token ids), 0 to 1. ``advance`` is told of prompts that are done; ``recovery`` is
    applied with the mask, as it changes what later layers see.

    Raises RequestError and RequestFailed for a prompt that cannot be read, PlanError for a mask of another
    model, and where nothing is measured because the last layer alone has experts.
    """
    engine.masks.add(SCENARIO, mask, recovery=recovery)
    try:
        for number, ids in enumerate(prompts):
            engine.add(str(number), ids, ONE_TOKEN, scenario=SCENARIO)
        found: dict[str, float] = {}
        while engine.has_work():
            for event in engine.step():
                if event.finish_reason == "error":
                    raise RequestFailed(f"prompt {event.request_id} cannot be read: {event.error}")
                if event.lost_mass is not None and event.request_id not in found:
                    found[event.request_id] = event.lost_mass
                    advance(1)
    except BaseException:
        for number in range(len(prompts)):
            engine.abort(str(number))
        raise
    finally:
        engine.masks.remove(SCENARIO)
    if len(found) < len(prompts):
        raise PlanError("lost mass is measured before the last layer, which alone has experts")
    return [found[str(number)] for number in range(len(prompts))]
