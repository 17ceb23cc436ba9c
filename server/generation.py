"""From a checked body to the engine and back: admission, then one stream of events for all prompts.

Everything that can be wrong with a request is found in ``prepare`` and ``Generation``, before the response
starts.
"""

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from moe_runtime.async_engine import RequestStream
from moe_runtime.engine import TokenEvent
from moe_runtime.errors import EngineStopped, OutsideScenario, RequestError, RequestFailed
from moe_runtime.sampling import SamplingParams
from moe_runtime.server.errors import ClientGone, EdgeError
from moe_runtime.server.metrics import Metrics
from moe_runtime.server.request_log import RequestRecord
from moe_runtime.server.schema import Common
from moe_runtime.server.service import Service

Result = TypeVar("Result")
SMALL_BODY_BYTES = 8 * 1024  # below this, parsing and tokenising take less time than a change of thread


async def prepare(request: Request, work: Callable[[bytes], Result]) -> Result:
    """``work(body)`` (parse, check, tokenise), away from the event loop when the body is long."""
    content_type = request.headers.get("content-type", "").replace(" ", "").lower()
    if content_type not in ("application/json", "application/json;charset=utf-8"):
        raise EdgeError(
            415, "send the body as 'content-type: application/json'", code="unsupported_media_type"
        )
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise EdgeError(415, "compressed bodies are not accepted", code="unsupported_media_type")
    body = await request.body()
    if len(body) <= SMALL_BODY_BYTES:
        return work(body)
    return await asyncio.to_thread(work, body)


def sampling_params(body: Common, defaults: SamplingParams, **overrides: Any) -> SamplingParams:
    """The request's parameters over the model's own defaults. Raises RequestError on a value out of range."""
    names = ("n", "max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
             "frequency_penalty", "repetition_penalty", "seed", "ignore_eos")  # fmt: skip
    given: dict[str, Any] = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    if body.logit_bias is not None:
        given["logit_bias"] = {int(token_id): bias for token_id, bias in body.logit_bias.items()}
    if body.stop is not None:
        given["stop"] = tuple(body.stop)
    if body.stop_token_ids is not None:
        given["stop_token_ids"] = tuple(body.stop_token_ids)
    if body.include_stop_str_in_output is not None:
        given["include_stop"] = body.include_stop_str_in_output
    return dataclasses.replace(defaults, **given | overrides)


class Generation:
    """The prompts of one HTTP request inside the engine. Close it, and nothing of it runs on."""

    def __init__(
        self,
        service: Service,
        record: RequestRecord,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        model: str,
        salt: str = "",
    ) -> None:
        """Submit every prompt or none, under the scenario of ``model`` if it names one. ``salt``: as for
        Engine.add.

        Raises RequestError, ModelNotFound, ScenarioUnavailable, Overloaded, EngineStopped.
        """
        if len(prompts) * params.n > service.config.max_choices:
            raise RequestError(
                f"{len(prompts)} prompts times n={params.n} are more than {service.config.max_choices} "
                "choices (--max-choices)",
                param="n" if params.n > 1 else "prompt",
            )
        self.service = service
        self.record = record
        self.model = model
        # Asked again, here on the event loop: what is added to the engine next must be there.
        self.scenario = service.require_model(model)
        self.lost_mass: float | None = None  # of the prompts, the largest
        self.drift: str | None = None
        self.num_choices = params.n
        self.started = time.monotonic()
        self.total_choices = len(prompts) * params.n
        self.finish_reasons: list[str] = []
        self.request_ids = [f"{record.request_id}-{index}" for index in range(len(prompts))]
        self.cached_tokens: dict[str, int] = {}
        self.streams: list[RequestStream] = []
        try:
            for request_id, prompt in zip(self.request_ids, prompts, strict=True):
                self.streams.append(
                    service.engine.submit(
                        request_id,
                        prompt,
                        params,
                        salt=salt,
                        scenario=None if self.scenario is None else self.scenario.name,
                    )
                )
        except BaseException:
            self.abort()
            raise
        record.prompt_tokens = sum(len(prompt) for prompt in prompts)

    def abort(self) -> None:
        """Take what is left of this request out of the engine; ended ones are not touched."""
        for request_id in self.request_ids[: len(self.streams)]:
            self.service.engine.abort(request_id)

    async def events(self) -> AsyncGenerator[tuple[int, TokenEvent], None]:
        """(choice of the whole request, event) in order of arrival. Raises RequestFailed, EngineStopped."""
        clock = _Clock(self.service.metrics, self.started)
        held: list[tuple[int, TokenEvent]] = []
        try:
            async with aclosing(_merge(self.streams)) as merged:
                async for index, event in merged:
                    choice = index * self.num_choices + event.choice
                    self._account(event)
                    clock.tick(choice, len(event.token_ids))
                    held.append((choice, event))
                    if self._may_refuse and len(self.cached_tokens) < len(self.request_ids):
                        continue  # no token is shown while another prompt may still be refused
                    for item in held:
                        yield item
                        if item[1].finish_reason is not None:
                            self.finish_reasons.append(item[1].finish_reason)
                    held.clear()
            if len(self.finish_reasons) < self.total_choices:
                raise EngineStopped("the engine ended before the answer was complete")
            self.record.outcome = ",".join(sorted(set(self.finish_reasons)))
            clock.finish(self.record)
        finally:
            self.abort()

    @property
    def has_policy(self) -> bool:
        """Whether the first event may bring bad news that belongs into the head of the answer."""
        return self.scenario is not None and self.scenario.policy is not None

    @property
    def _may_refuse(self) -> bool:
        policy = None if self.scenario is None else self.scenario.policy
        return policy is not None and policy.action == "reject"

    def _account(self, event: TokenEvent) -> None:
        """Count an event; raises when it says that the answer will never be complete."""
        self._account_scenario(event)
        if event.finish_reason == "drift":
            raise OutsideScenario(event.error or "the scenario's policy refuses this prompt")
        if event.finish_reason == "error":
            raise RequestFailed(event.error or "the model's output was not a number")
        if event.finish_reason == "abort":
            raise EngineStopped(event.error or "the server stopped before the answer was complete")
        self.record.completion_tokens += len(event.token_ids)
        # Later choices of one prompt find it in the cache because of the first one; the client paid for that.
        self.cached_tokens.setdefault(event.request_id, event.num_cached_tokens)
        self.record.cached_tokens = sum(self.cached_tokens.values())

    def _account_scenario(self, event: TokenEvent) -> None:
        if self.scenario is None:
            return
        is_first = event.request_id not in self.cached_tokens and event.finish_reason not in (
            "error",
            "abort",
        )
        if is_first:
            self.service.prompt_read(
                self.scenario.name, event.num_prompt_tokens, event.lost_mass, event.drift
            )
            if event.lost_mass is not None:
                self.lost_mass = max(event.lost_mass, self.lost_mass or 0.0)
            self.drift = event.drift or self.drift
        self.service.metrics.scenarios.generated(self.scenario.name, len(event.token_ids))

    def headers(self) -> dict[str, str]:
        """What the policy of the scenario has to say; complete with the first event of every prompt."""
        return {} if self.drift is None else {"x-moe-drift": f"{self.drift}; lost_mass={self.lost_mass:.4f}"}

    def usage(self) -> dict[str, Any]:
        """OpenAI's usage object, complete once the events have ended; for a scenario also what its mask cost
        the prompt (the largest, of several).
        """
        record = self.record
        extra = {}
        if self.scenario is not None:
            extra["scenario"] = {
                "name": self.scenario.name,
                "lost_mass": None if self.lost_mass is None else round(self.lost_mass, 6),
                "drift": self.drift,
            }
        return extra | {
            "prompt_tokens": record.prompt_tokens,
            "completion_tokens": record.completion_tokens,
            "total_tokens": record.prompt_tokens + record.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
        }


class _Clock:
    """Latencies of one request's choices, into the histograms."""

    def __init__(self, metrics: Metrics, started: float) -> None:
        self.metrics = metrics
        self.started = started
        self.first: dict[int, float] = {}
        self.last: dict[int, float] = {}
        self.num_tokens: dict[int, int] = {}

    def tick(self, choice: int, num_tokens: int) -> None:
        if not num_tokens:
            return
        now = time.monotonic()
        if choice not in self.first:
            self.first[choice] = now
            self.metrics.time_to_first_token.observe(now - self.started)
        else:
            self.metrics.inter_token_latency.observe((now - self.last[choice]) / num_tokens)
        self.last[choice] = now
        self.num_tokens[choice] = self.num_tokens.get(choice, 0) + num_tokens

    def finish(self, record: RequestRecord) -> None:
        self.metrics.request_latency.observe(time.monotonic() - self.started)
        self.metrics.request_prompt_tokens.observe(record.prompt_tokens)
        self.metrics.request_generation_tokens.observe(record.completion_tokens)
        for choice, num_tokens in self.num_tokens.items():
            if num_tokens > 1:
                seconds = self.last[choice] - self.first[choice]
                self.metrics.time_per_output_token.observe(seconds / (num_tokens - 1))


async def _merge(streams: Sequence[RequestStream]) -> AsyncGenerator[tuple[int, TokenEvent], None]:
    """Events of several streams as they come, each with its stream's index."""
    if len(streams) == 1:
        async for event in streams[0]:
            yield 0, event
        return
    arrived: asyncio.Queue[tuple[int, TokenEvent] | None] = asyncio.Queue()

    async def pump(index: int, stream: RequestStream) -> None:
        async for event in stream:
            arrived.put_nowait((index, event))

    pumps = [asyncio.ensure_future(pump(index, stream)) for index, stream in enumerate(streams)]
    everything = asyncio.ensure_future(asyncio.gather(*pumps))
    everything.add_done_callback(lambda _: arrived.put_nowait(None))
    try:
        while (item := await arrived.get()) is not None:
            yield item
        await everything  # raises what a pump raised
    finally:
        everything.cancel()
        await asyncio.gather(*pumps, everything, return_exceptions=True)


async def while_connected(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """``work``'s result; cancels it and raises ClientGone when the client closes the connection first."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
