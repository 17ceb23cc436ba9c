"""POST /v1/chat/completions: parse, submit, render."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from moe_runtime.errors import ContextLengthExceeded, RequestError
from moe_runtime.sampling import MAX_LOGPROBS, SamplingParams
from moe_runtime.server.generation import Generation, prepare, sampling_params, while_connected
from moe_runtime.server.json_body import parse_object
from moe_runtime.server.logprobs import chat_logprobs
from moe_runtime.server.request_log import record_of
from moe_runtime.server.schema import ChatBody, ignored_fields, validate
from moe_runtime.server.service import Service
from moe_runtime.server.sse import EventStream
from moe_runtime.server.wire import Envelope, ignored_header, json_response


async def create_chat_completion(service: Service, request: Request) -> Response:
    """One chat completion, whole or as a stream of chunks."""

    def admit(raw: bytes) -> tuple[ChatBody, list[int], SamplingParams]:
        body = validate(ChatBody, parse_object(raw))
        service.require_model(body.model)
        return body, _encode(service, body), _params(service, body)

    body, prompt, params = await prepare(request, admit)
    with _own_names(body):
        generation = Generation(
            service, record_of(request), [prompt], params, body.model, body.cache_salt or ""
        )
    headers = ignored_header(ignored_fields(body))
    if body.stream:
        return EventStream(generation, _chunks(generation, body), headers)
    answer = await while_connected(request.receive, _whole(generation, body))
    return json_response(answer, headers | generation.headers())


def _encode(service: Service, body: ChatBody) -> list[int]:
    template = service.engine.engine.chat
    if template is None:
        raise RequestError("this model has no chat template; use /v1/completions", param="messages")
    max_context = service.engine.engine.max_context
    if len(body.messages) > max_context:  # a turn takes a token at least; to render them would take long
        raise ContextLengthExceeded(
            f"{len(body.messages)} messages cannot fit the context of {max_context} tokens", param="messages"
        )
    service.require_room(sum(len(message.content) for message in body.messages), "messages")
    return template.encode([message.as_template_input() for message in body.messages])


def _params(service: Service, body: ChatBody) -> SamplingParams:
    logprobs = None
    if body.logprobs:
        logprobs = body.top_logprobs or 0
        if not 0 <= logprobs <= MAX_LOGPROBS:
            raise RequestError(
                f"top_logprobs must be from 0 to {MAX_LOGPROBS}, got {logprobs}", param="top_logprobs"
            )
    elif body.top_logprobs:
        raise RequestError("'top_logprobs' needs 'logprobs' to be true", param="top_logprobs")
    max_tokens = body.max_tokens
    if body.max_completion_tokens is not None:
        if max_tokens not in (None, body.max_completion_tokens):
            message = "'max_tokens' and 'max_completion_tokens' disagree; send the second alone"
            raise RequestError(message, param="max_tokens")
        max_tokens = body.max_completion_tokens
    if max_tokens == 0:
        raise RequestError("max_tokens must be at least 1", param="max_tokens")
    defaults = service.engine.engine.default_params
    with _own_names(body):
        return sampling_params(body, defaults, logprobs=logprobs, max_tokens=max_tokens)


@contextmanager
def _own_names(body: ChatBody) -> Iterator[None]:
    """Errors of the engine name its own parameters; the client wants to read the names it sent."""
    try:
        yield
    except RequestError as error:
        if error.param == "prompt":
            error.param = "messages"
        elif error.param == "max_tokens" and body.max_completion_tokens is not None:
            error.param = "max_completion_tokens"
        raise


async def _whole(generation: Generation, body: ChatBody) -> dict[str, Any]:
    texts = [""] * generation.num_choices
    logprobs: list[list[dict[str, Any]]] = [[] for _ in texts]
    finish_reasons = [""] * generation.num_choices
    async with aclosing(generation.events()) as events:
        async for choice, event in events:
            texts[choice] += event.text
            logprobs[choice] += chat_logprobs(event.logprobs or ())
            finish_reasons[choice] = event.finish_reason or ""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": {"content": logprobs[index], "refusal": None} if body.logprobs else None,
            "finish_reason": finish_reasons[index],
        }
        for index, text in enumerate(texts)
    ]
    envelope = Envelope.of(generation, "chatcmpl", "chat.completion")
    return envelope.wrap(choices) | {"usage": generation.usage()}


async def _chunks(generation: Generation, body: ChatBody) -> AsyncGenerator[dict[str, Any], None]:
    envelope = Envelope.of(generation, "chatcmpl", "chat.completion.chunk")
    usage = {"usage": None} if body.include_usage else {}
    opened: set[int] = set()
    async with aclosing(generation.events()) as events:
        async for choice, event in events:
            delta: dict[str, Any] = {}
            if choice not in opened:
                opened.add(choice)
                delta = {"role": "assistant", "content": "", "refusal": None}
            if event.text:
                delta["content"] = event.text
            if not delta and not event.logprobs and event.finish_reason is None:
                continue  # half a character, or what may become a stop string
            logprobs = {"content": chat_logprobs(event.logprobs), "refusal": None} if event.logprobs else None
            yield envelope.wrap([
                {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": event.finish_reason}
            ]) | usage  # fmt: skip
    if body.include_usage:
        yield envelope.wrap([]) | {"usage": generation.usage()}
