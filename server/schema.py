"""OpenAI request bodies as typed data: names, types, what a null means. Ranges are SamplingParams' business.

A field is in one of four classes, and no field is dropped in silence:

    declared       in a model below: understood, checked, obeyed
    UNSUPPORTED    would change the answer and we cannot do it: 400, unless its value asks for nothing
    HARMLESS       does not change the answer: accepted
    anything else  accepted, and named in the response header ``x-moe-ignored-fields``
"""

from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import PydanticCustomError

from moe_runtime.errors import RequestError

Body = TypeVar("Body", bound="Strict")
NOTHING: tuple[Any, ...] = (None, False, [], {}, "")

# Field -> the values that ask for nothing and so pass. From OpenAI's API and from what its imitators add.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "tools": NOTHING,
    "tool_choice": (None, "none", "auto"),
    "functions": NOTHING,
    "function_call": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "audio": NOTHING,
    "reasoning_effort": (None, "none"),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
    "suffix": (None, ""),
    "prompt_embeds": NOTHING,
    "chat_template": NOTHING,
    "chat_template_kwargs": NOTHING,
    "documents": NOTHING,
    "add_generation_prompt": (None, True),
    "continue_final_message": NOTHING,
    "add_special_tokens": NOTHING,
    "truncate_prompt_tokens": (None,),
    "guided_json": NOTHING,
    "guided_regex": NOTHING,
    "guided_choice": NOTHING,
    "guided_grammar": NOTHING,
    "structured_outputs": NOTHING,
    "json_schema": NOTHING,
    "grammar": NOTHING,
    "use_beam_search": NOTHING,
    "length_penalty": (None, 1, 1.0),
    "bad_words": NOTHING,
    "allowed_token_ids": NOTHING,
    "logits_processors": NOTHING,
    "skip_special_tokens": (None, True),
    "prompt_logprobs": (None,),
    "typical_p": (None, 1, 1.0),
    "mirostat": (None, 0),
}
HARMLESS = frozenset({
    "user", "metadata", "store", "service_tier", "parallel_tool_calls", "safety_identifier",
    "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options", "prediction",
})  # fmt: skip


class Strict(BaseModel):
    """No coercion: ``"1"``, ``1.0`` and ``true`` are not the integer 1."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow", allow_inf_nan=False)


def _refusal(message: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{reason}", {"reason": message})


def _text_of_parts(content: Any) -> Any:
    """A list of text parts -> one text; other kinds of part are refused by name."""
    if not isinstance(content, list):
        return content
    if not content:
        raise _refusal("a list of content parts must not be empty")
    texts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise _refusal("a content part is an object with a 'type'")
        if kind != "text":
            raise _refusal(
                f"content parts of type {kind[:32]!r} are not supported; this server takes text only"
            )
        if not isinstance(part.get("text"), str):
            raise _refusal("a text part has its text, a string, in 'text'")
        texts.append(part["text"])
    return "\n".join(texts)


def _known_role(role: Any) -> str:
    if role in ("tool", "function"):
        raise _refusal(f"the role {role!r} is not supported; this server has no tools yet")
    if role not in ("system", "developer", "user", "assistant"):
        raise _refusal("a role is one of system, developer, user, assistant")
    return str(role)


class Message(Strict):
    """One turn. Clients send back whole messages, so other fields may be there, as long as they are empty."""

    role: Annotated[str, PlainValidator(_known_role)]
    content: Annotated[str, BeforeValidator(_text_of_parts)]

    def as_template_input(self) -> dict[str, str]:
        """What the chat template sees; developer is OpenAI's newer word for system, which templates know."""
        return {"role": "system" if self.role == "developer" else self.role, "content": self.content}


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis; none is sent


# Applied one by one to every token of every answer, in the step that all requests share.
MAX_LOGIT_BIAS = 1024
LogitBias = dict[Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,8})$")], float]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Common(Strict):
    """What both generating endpoints take. None always means: as if the field were absent."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[LogitBias, Field(max_length=MAX_LOGIT_BIAS)] | None = None
    seed: int | None = None
    stop: Annotated[list[str], BeforeValidator(_as_list)] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    # vLLM's field: cached prefixes are reused only between requests of equal salt.
    cache_salt: Annotated[str, Field(max_length=256)] | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatBody(Common):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


Prompt = str | list[int]
PROMPT_SHAPES = "a prompt is a string, a list of strings, a list of token ids, or a list of such lists"


def _prompts(value: Any) -> list[Prompt]:
    """Text, texts, token ids or lists of token ids -> a list of prompts, none of them empty."""
    if not isinstance(value, str | list):
        raise _refusal(PROMPT_SHAPES)
    prompts = value if isinstance(value, list) else [value]
    if prompts and all(type(item) is int for item in prompts):
        prompts = [prompts]
    if not prompts:
        raise _refusal("at least one prompt is needed")
    for prompt in prompts:
        ids = isinstance(prompt, list) and all(type(item) is int for item in prompt)
        if not ids and not isinstance(prompt, str):
            raise _refusal(PROMPT_SHAPES)
        if not prompt:
            raise _refusal("a prompt must not be empty")
    return prompts


class CompletionBody(Common):
    prompt: Annotated[list[Prompt], PlainValidator(_prompts)]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None


def validate(kind: type[Body], value: dict[str, Any]) -> Body:
    """The typed body. Raises RequestError; its ``param`` is the field's path, as ``messages[0].content``."""
    for name, harmless in UNSUPPORTED.items():
        if name in value and not any(
            value[name] == item and type(value[name]) is type(item) for item in harmless
        ):
            raise RequestError(
                f"'{name}' is not supported by this server", param=name, code="unsupported_parameter"
            )
    try:
        body = kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        param = _path(first["loc"])
        raise RequestError(f"Invalid value for '{param}': {first['msg']}", param=param) from None
    _check_stream_options(body)
    _check_messages(body)
    return body


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part != "[key]":
            path += f".{part[:64]}" if path else part[:64]
    return path


def _check_stream_options(body: Strict) -> None:
    if isinstance(body, Common) and body.stream_options is not None and not body.stream:
        raise RequestError("'stream_options' is only allowed when 'stream' is true", param="stream_options")


def _check_messages(body: Strict) -> None:
    if not isinstance(body, ChatBody):
        return
    for index, message in enumerate(body.messages):
        for name in ("tool_calls", "function_call", "tool_call_id", "audio", "prefix"):
            if (message.model_extra or {}).get(name) not in NOTHING:
                param = f"messages[{index}].{name}"
                raise RequestError(
                    f"'{param}' is not supported by this server", param=param, code="unsupported_parameter"
                )


def ignored_fields(body: Strict) -> list[str]:
    """Names that were accepted and not obeyed, for the response header; values are never shown."""
    return sorted(set(_ignored(body, "")))[:32]


def _ignored(body: Strict, prefix: str) -> Iterator[str]:
    for name, value in (body.model_extra or {}).items():
        if value is None or name in HARMLESS or name in UNSUPPORTED:
            continue
        if prefix == "messages." and value in NOTHING:
            continue
        yield prefix + "".join(
            letter if letter.isascii() and letter.isprintable() else "?" for letter in name[:64]
        )
    if isinstance(body, ChatBody):
        for message in body.messages:
            yield from _ignored(message, "messages.")
    if isinstance(body, Common) and body.stream_options is not None:
        yield from _ignored(body.stream_options, "stream_options.")
