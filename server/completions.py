"""POST /v1/completions: the older, plainer endpoint; prompts may be text or token ids, one or many."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from moe_runtime.engine import TokenEvent, TokenLogprob
from moe_runtime.errors import RequestError, RequestFailed
from moe_runtime.sampling import SamplingParams
from moe_runtime.server.generation import Generation, prepare, sampling_params, while_connected
from moe_runtime.server.json_body import parse_object
from moe_runtime.server.logprobs import CompletionLogprobs, Piece
from moe_runtime.server.request_log import record_of
from moe_runtime.server.schema import CompletionBody, ignored_fields, validate
from moe_runtime.server.service import Service
from moe_runtime.server.sse import EventStream
from moe_runtime.server.wire import Envelope, ignored_header, json_response

Rendered = tuple[int, str, dict[str, Any] | None, str | None]  # choice, text, logprobs, finish reason
DEFAULT_MAX_TOKENS = 16  # OpenAI's, for this endpoint only


async def create_completion(service: Service, request: Request) -> Response:
    """Completions of all prompts, whole or as one stream of chunks."""

    def admit(raw: bytes) -> tuple[CompletionBody, list[list[int]], SamplingParams]:
        body = validate(CompletionBody, parse_object(raw))
        service.require_model(body.model)
        if len(body.prompt) > service.config.max_choices:
            message = f"{len(body.prompt)} prompts are more than {service.config.max_choices} (--max-choices)"
            raise RequestError(message, param="prompt")
        return body, _encode(service, body), _params(service, body)

    body, prompts, params = await prepare(request, admit)
    generation = Generation(service, record_of(request), prompts, params, body.model, body.cache_salt or "")
    choices = [
        _Choice(service, body, prompt_ids, prompt)
        for prompt_ids, prompt in zip(prompts, body.prompt, strict=True)
        for _ in range(params.n)
    ]
    headers = ignored_header(ignored_fields(body))
    if body.stream:
        return EventStream(generation, _chunks(generation, body, choices), headers)
    answer = await while_connected(request.receive, _whole(generation, body, choices))
    return json_response(answer, headers | generation.headers())


def _encode(service: Service, body: CompletionBody) -> list[list[int]]:
    tokenizer = service.engine.engine.tokenizer
    for prompt in body.prompt:
        if isinstance(prompt, str):
            service.require_room(len(prompt), "prompt")
    return [
        tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else prompt
        for prompt in body.prompt
    ]


def _params(service: Service, body: CompletionBody) -> SamplingParams:
    if body.best_of is not None and body.best_of != (body.n or 1):
        message = "'best_of' other than 'n' is not supported by this server"
        raise RequestError(message, param="best_of", code="unsupported_parameter")
    max_tokens = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens == 0 and not body.echo:
        raise RequestError("max_tokens=0 needs echo=true; nothing would be answered", param="max_tokens")
    return sampling_params(
        body,
        service.engine.engine.default_params,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )


class _Choice:
    """Turns one choice's events into pieces of text and logprobs; knows whether the prompt was echoed."""

    def __init__(
        self, service: Service, body: CompletionBody, prompt_ids: Sequence[int], prompt: str | Sequence[int]
    ) -> None:
        self.tokenizer = service.engine.engine.tokenizer
        self.prompt_ids = prompt_ids
        self.echo: str | None = None
        if body.echo and isinstance(prompt, str):
            self.echo = prompt
        elif body.echo:
            self.echo = self.tokenizer.decode(prompt_ids, skip_special_tokens=False)
        self.logprobs = CompletionLogprobs(self.tokenizer.special_ids) if body.logprobs is not None else None

    def render(
        self, event: TokenEvent, prompt_logprobs: Sequence[TokenLogprob | None] | None
    ) -> tuple[str, dict[str, Any] | None]:
        """The text and logprobs that ``event`` adds; its first call also adds the echoed prompt."""
        text = event.text
        parts = []
        if self.echo is not None:
            text = self.echo + text
            if self.logprobs is not None:
                pieces = [Piece(*self.tokenizer.piece(token_id)) for token_id in self.prompt_ids]
                known = prompt_logprobs or [None] * len(pieces)
                parts.append(self.logprobs.prompt(self.echo, self.prompt_ids, pieces, known))
            self.echo = None
        if self.logprobs is not None and event.logprobs:
            parts.append(self.logprobs.answer(event.logprobs))
        return text, _join(parts) if parts else None


async def _rendered(
    generation: Generation, body: CompletionBody, choices: Sequence[_Choice]
) -> AsyncGenerator[Rendered, None]:
    """What each event adds.

    The engine gives a prompt's log-probabilities once, to choice 0; its other choices wait for them.
    """
    wanted = bool(body.echo) and body.logprobs is not None
    known: dict[int, Sequence[TokenLogprob | None]] = {}
    held: list[tuple[int, TokenEvent]] = []

    def ready(choice: int) -> bool:
        return not wanted or choice // generation.num_choices in known

    async with aclosing(generation.events()) as events:
        async for choice, event in events:
            held.append((choice, event))
            if event.prompt_logprobs is not None:
                known[choice // generation.num_choices] = event.prompt_logprobs
            for index, ripe in [item for item in held if ready(item[0])]:
                text, logprobs = choices[index].render(ripe, known.get(index // generation.num_choices))
                yield index, text, logprobs, ripe.finish_reason
            held = [item for item in held if not ready(item[0])]
    if held:
        raise RequestFailed("the engine gave no log-probabilities for the prompt")


async def _whole(generation: Generation, body: CompletionBody, choices: Sequence[_Choice]) -> dict[str, Any]:
    texts = [""] * len(choices)
    parts: list[list[dict[str, Any]]] = [[] for _ in choices]
    finish_reasons: list[str | None] = [None] * len(choices)
    async with aclosing(_rendered(generation, body, choices)) as rendered:
        async for index, text, logprobs, finish_reason in rendered:
            texts[index] += text
            if logprobs is not None:
                parts[index].append(logprobs)
            finish_reasons[index] = finish_reason
    return Envelope.of(generation, "cmpl", "text_completion").wrap([
        {
            "index": index,
            "text": texts[index],
            "logprobs": None if body.logprobs is None else _join(parts[index]),
            "finish_reason": finish_reasons[index],
        }
        for index in range(len(choices))
    ]) | {"usage": generation.usage()}  # fmt: skip


def _join(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [item for part in parts for item in part[name]] for name in names}


async def _chunks(
    generation: Generation, body: CompletionBody, choices: Sequence[_Choice]
) -> AsyncGenerator[dict[str, Any], None]:
    envelope = Envelope.of(generation, "cmpl", "text_completion")
    usage = {"usage": None} if body.include_usage else {}
    async with aclosing(_rendered(generation, body, choices)) as rendered:
        async for index, text, logprobs, finish_reason in rendered:
            if text or logprobs or finish_reason:
                yield envelope.wrap([
                    {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
                ]) | usage  # fmt: skip
    if body.include_usage:
        yield envelope.wrap([]) | {"usage": generation.usage()}
