"""ChatTemplate: messages -> prompt ids, through the jinja template of the model folder.

The template decides the control tokens of the prompt; the messages must not. Before rendering, the
characters that control tokens begin and end with are replaced, in everything that came from the request, by
stand-ins from a private plane of Unicode. What still looks like a control token after rendering was written
by the template. If the finished text, stand-ins undone, would be encoded with any other control tokens than
those, it is encoded in pieces, and the requests' parts as plain text.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moe_runtime.errors import CheckpointError, RequestError
from moe_runtime.tokenizer import CONFIG_FILE, Tokenizer, read_tokenizer_config

# What a request may set for the template, beside the messages. Anything else is refused.
ALLOWED_VARIABLES = frozenset({"tools", "enable_thinking", "thinking"})
ALWAYS_DEFINED = frozenset({"tools", "documents"})  # None when not given, as transformers has it
# Templates cut these out of earlier answers, so there they stay visible to the template.
REASONING_TAGS = re.compile(r"(</?think>)")
PRIVATE_PLANE = range(0xF0000, 0xFFFFE)
PROBES = (
    [{"role": "user", "content": "hello"}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}],
)


class ChatTemplate:
    """A compiled template and the tokenizer its text is meant for."""

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        """Raises CheckpointError when ``source`` does not compile, or a simple chat does not render."""
        self._tokenizer = tokenizer
        controls = sorted(tokenizer.control_tokens, key=len, reverse=True)
        self._control = re.compile("|".join(re.escape(token) for token in controls) or r"(?!)")
        self._guarded = sorted(
            {end for token in controls for end in (token[0], token[-1]) if not end.isalnum()}
        )
        self._unguarded = [token for token in controls if token[0].isalnum()]
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"line {error.lineno}: {error}", file="chat template") from error
        self._probe()

    @classmethod
    def load(cls, model_dir: Path, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """From ``chat_template.jinja``, else ``chat_template`` of tokenizer_config.json; None without."""
        path = model_dir / "chat_template.jinja"
        try:
            source = path.read_text(encoding="utf-8") if path.exists() else None
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"cannot be read: {error}", file=path.name) from error
        if source is None:
            source = _configured_template(read_tokenizer_config(model_dir))
        return None if source is None else cls(source, tokenizer)

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt as text. Raises RequestError (param ``messages``) when the template refuses."""
        stand_ins = self._stand_ins([messages, variables])
        return _undo(stand_ins, self._render(messages, stand_ins, add_generation_prompt, variables))

    def encode(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The prompt as token ids; control tokens written inside messages are plain text.

        ``messages``: dicts with ``role`` and ``content`` (a string, or a list of ``{"type": "text"}`` parts),
        as OpenAI has them. ``variables``: see ALLOWED_VARIABLES. Raises RequestError.
        """
        stand_ins = self._stand_ins([messages, variables])
        rendered = self._render(messages, stand_ins, add_generation_prompt, variables)
        ids = self._tokenizer.encode(_undo(stand_ins, rendered))
        genuine = [self._tokenizer.control_tokens[token] for token in self._control.findall(rendered)]
        if [token_id for token_id in ids if token_id in self._tokenizer.control_ids] == genuine:
            return ids
        return self._encode_in_pieces(rendered, stand_ins)

    def _encode_in_pieces(self, rendered: str, stand_ins: Mapping[str, str]) -> list[int]:
        ids: list[int] = []
        position = 0
        for match in self._control.finditer(rendered):
            ids += self._tokenizer.encode(_undo(stand_ins, rendered[position : match.start()]), plain=True)
            ids.append(self._tokenizer.control_tokens[match[0]])
            position = match.end()
        return ids + self._tokenizer.encode(_undo(stand_ins, rendered[position:]), plain=True)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        stand_ins: Mapping[str, str],
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        unknown = sorted(set(variables) - ALLOWED_VARIABLES)
        if unknown:
            raise RequestError(f"chat template variable {unknown[0]!r} is not allowed", param=unknown[0])

        table = {ord(character): stand_ins[character] for character in self._guarded}

        def disguise(text: str) -> str:
            for token in self._unguarded:
                text = text.replace(token, stand_ins[token[0]] + token[1:])
            return text.translate(table)

        try:
            return self._template.render(
                messages=[_disguised_message(message, disguise) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self._tokenizer.special_names,
                **{
                    name: _map_strings(variables.get(name), disguise)
                    for name in {*ALWAYS_DEFINED, *variables}
                },
            )
        except jinja2.TemplateError as error:
            raise RequestError(f"the chat template refuses: {error}", param="messages") from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
            # Content of a shape that this template was not written for, such as null.
            message = f"the chat template cannot show these messages: {type(error).__name__}: {error}"
            raise RequestError(message, param="messages") from error

    def _stand_ins(self, request: object) -> dict[str, str]:
        """A private character for each guarded one, none of which occurs in the request."""
        used: set[str] = set()

        def note(text: str) -> str:
            used.update(text)
            return text

        _map_strings(request, note)
        private = (chr(code) for code in PRIVATE_PLANE if chr(code) not in used)
        wanted = [*self._guarded, *sorted({token[0] for token in self._unguarded})]
        stand_ins = dict(zip(wanted, private, strict=False))
        if len(stand_ins) < len(set(wanted)):
            raise RequestError(
                "the messages use every character of a private plane of Unicode", param="messages"
            )
        return stand_ins

    def _probe(self) -> None:
        """Render something simple now, so that a broken template stops the start, not the first request."""
        failures: list[str] = []
        for messages in PROBES:
            try:
                self.encode(messages)
                return
            except RequestError as error:
                failures.append(str(error))
        raise CheckpointError(failures[0], file="chat template")


def _environment() -> ImmutableSandboxedEnvironment:
    """jinja2 as transformers sets it up for chat templates, which are written against that."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks the answers in training templates; here it only passes its body on."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own ``tojson`` escapes HTML; templates mean plain JSON."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _disguised_message(message: Mapping[str, Any], disguise: Callable[[str], str]) -> dict[str, Any]:
    """Text parts joined into one string, which every template understands; then every string disguised."""
    plain = dict(message)
    content = plain.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
            raise RequestError("only text parts are supported in content", param="messages")
        plain["content"] = content = "\n".join(part["text"] for part in content)
    disguised: dict[str, Any] = _map_strings(plain, disguise)
    if plain.get("role") == "assistant" and isinstance(content, str):
        parts = REASONING_TAGS.split(content)  # every second part is a tag
        disguised["content"] = "".join(part if i % 2 else disguise(part) for i, part in enumerate(parts))
    return disguised


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """``change`` applied to every string inside ``value``, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_map_strings(item, change) for item in value]
    return value


def _undo(stand_ins: Mapping[str, str], text: str) -> str:
    return text.translate({ord(private): character for character, private in stand_ins.items()})


def _configured_template(config: Mapping[str, object]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # older folders name several
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
        if template is None:
            message = f"chat_template has no template named 'default', only {sorted(map(str, named))}"
            raise CheckpointError(message, file=CONFIG_FILE)
    if template is not None and not isinstance(template, str):
        raise CheckpointError("chat_template must be a string or a list", file=CONFIG_FILE)
    return template
