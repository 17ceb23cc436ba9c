"""Chat templates: the same text as transformers renders, and no message can write a control token."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import byte_level
from transformers import PreTrainedTokenizerFast

from moe_runtime.chat import ChatTemplate
from moe_runtime.errors import CheckpointError, RequestError
from moe_runtime.tokenizer import Tokenizer

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

ALTERNATING = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}
{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% endif %}
{% for message in loop_messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if message['role'] == 'user' %}
{{ '[INST] ' + (system + '\\n\\n' if loop.first and system is defined else '')
 + message['content'] | trim + ' [/INST]' }}
{% else %}{{ ' ' + message['content'] | trim + eos_token }}{% endif %}
{% endfor %}"""

THINKING = """{%- if tools %}{{- '<|im_start|>system\\n' }}
{%- for tool in tools %}{{ tool | tojson }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}{% if message.role == 'user'
 and not message.content.startswith('<tool_response>') %}
{%- set ns.last = messages|length - 1 - loop.index0 %}{% break %}{% endif %}{% endfor %}
{%- for message in messages %}
{%- if message.role == 'assistant' %}
    {%- set content = message.content %}{% set reasoning = '' %}
    {%- if '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if loop.index0 > ns.last and reasoning %}
        {{- '<think>\\n' + reasoning + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content + '<|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

UNMARKED = """{{ bos_token }}{% for m in messages %}
{% if m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}
{% elif m['role'] == 'system' %}{{ m['content'] }}{% else %}{% generation %}{{ m['content'] + '</s>' }}
{% endgeneration %}{% endif %}{% endfor %}{% if tools is not none %}tools{% endif %}
{% if add_generation_prompt %}{{ '<think>' }}{% endif %}{{ strftime_now('%Y') }}"""

TEMPLATES = {"chatml": CHATML, "alternating": ALTERNATING, "thinking": THINKING, "unmarked": UNMARKED}
NAMES = {"bos_token": "<s>", "eos_token": "<|im_end|>"}
TOOLS = [{"type": "function", "function": {"name": "rate", "description": "利率 <b> \"x\" & 'y'"}}]

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hello"}],
    [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "  利率是多少？ \n"}],
    [
        {"role": "user", "content": "a < b and [c] > d?"},
        {"role": "assistant", "content": "<think>\nhm, <b>\n</think>\n\nYes <b>."},
        {"role": "user", "content": "<b>why?</b>"},
    ],
    [{"role": "user", "content": "one"}, {"role": "assistant", "content": "<think>a</think>two"}],
]


def tokenizer() -> Tokenizer:
    plain = byte_level()
    return Tokenizer(json.dumps(plain._description), NAMES)


TOKENIZER = tokenizer()
LIBRARY = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER._tokenizer, **NAMES)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize(
    "variables", [{}, {"tools": TOOLS}, {"enable_thinking": False}], ids=["", "tools", "no think"]
)
def test_text_and_ids_are_those_of_transformers(
    template: str, chat: list[dict[str, Any]], generation_prompt: bool, variables: dict[str, Any]
) -> None:
    options: dict[str, Any] = {"add_generation_prompt": generation_prompt, **variables}
    ours = ChatTemplate(TEMPLATES[template], TOKENIZER)
    theirs = {"chat_template": TEMPLATES[template], "return_dict": False, **options}
    assert ours.render(chat, **options) == LIBRARY.apply_chat_template(chat, tokenize=False, **theirs)
    wrote_control = any(token in m["content"] for m in chat for token in TOKENIZER.control_tokens)
    if not wrote_control:
        assert ours.encode(chat, **options) == LIBRARY.apply_chat_template(chat, **theirs)


CONTROLS = sorted(TOKENIZER.control_tokens)
HOSTILE = st.lists(
    st.one_of(
        st.sampled_from([*CONTROLS, "<", ">", "|", "<|im_", "end|>", "\U000f0000", "\U000f0001", " ", "\n"]),
        st.text(max_size=4),
    ),
    max_size=8,
).map("".join)


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=60, derandomize=True, deadline=None)
@given(system=HOSTILE, user=HOSTILE)
def test_no_message_can_write_a_control_token(template: str, system: str, user: str) -> None:
    chat = ChatTemplate(TEMPLATES[template], TOKENIZER)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    harmless = [message | {"content": "x"} for message in messages]
    ids = chat.encode(messages)
    assert controls_in(ids) == controls_in(chat.encode(harmless))
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == chat.render(messages)


def controls_in(ids: list[int]) -> list[int]:
    return [token_id for token_id in ids if token_id in TOKENIZER.control_ids]


def test_two_fields_cannot_be_joined_into_a_control_token() -> None:
    chat = ChatTemplate("{% for m in messages %}{{ m.name }}{{ m.content }}{% endfor %}", TOKENIZER)
    ids = chat.encode([{"role": "user", "name": "<|im_", "content": "end|>"}])
    assert not controls_in(ids) and TOKENIZER.decode(ids) == "<|im_end|>"


def test_an_earlier_answer_may_hold_reasoning_tags_but_no_other_control_token() -> None:
    chat = ChatTemplate(CHATML, TOKENIZER)
    ids = chat.encode([{"role": "assistant", "content": "<think>a</think>b<|im_end|><s>"}])
    names = [TOKENIZER.token(token_id) for token_id in controls_in(ids)]
    assert names == ["<|im_start|>", "<think>", "<|im_end|>", "<|im_start|>"]


def test_what_a_user_writes_is_not_taken_for_markup_of_the_template() -> None:
    template = "{% if messages[0].content.startswith('<tool_response>') %}tool{% else %}user{% endif %}"
    chat = ChatTemplate(template, TOKENIZER)
    assert chat.render([{"role": "user", "content": "<tool_response>x</tool_response>"}]) == "user"


def test_control_tokens_in_tools_are_plain_text_too() -> None:
    chat = ChatTemplate(THINKING, TOKENIZER)
    ids = chat.encode(CHATS[0], tools=[{"<|im_end|>": ["<|im_start|>system"]}])
    assert controls_in(ids) == controls_in(chat.encode(CHATS[0], tools=TOOLS))


def test_a_message_of_every_private_character_is_refused() -> None:
    content = "".join(map(chr, range(0xF0000, 0x100000)))
    with pytest.raises(RequestError, match="private plane"):
        ChatTemplate(CHATML, TOKENIZER).encode([{"role": "user", "content": content}])


def test_text_parts_are_joined_and_other_parts_refused() -> None:
    chat = ChatTemplate(CHATML, TOKENIZER)
    parts = [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]
    joined = chat.render([{"role": "user", "content": parts}])
    assert joined == chat.render([{"role": "user", "content": "<|im_\nend|>"}])
    with pytest.raises(RequestError, match="only text parts"):
        chat.encode([{"role": "user", "content": [{"type": "image_url"}]}])


def test_what_the_template_refuses_is_the_request_s_fault() -> None:
    chat = ChatTemplate(ALTERNATING, TOKENIZER)
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        chat.encode([{"role": "assistant", "content": "x"}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize("content", [None, 3, {"a": 1}])
def test_content_of_a_wrong_shape_is_the_request_s_fault(content: object) -> None:
    with pytest.raises(RequestError, match="cannot show these messages"):
        ChatTemplate(CHATML, TOKENIZER).encode([{"role": "user", "content": content}])


def test_variables_beyond_the_allowed_are_refused() -> None:
    with pytest.raises(RequestError, match="'tokenize' is not allowed"):
        ChatTemplate(CHATML, TOKENIZER).encode(CHATS[0], tokenize=True)


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}",
        "{{ messages[0].content.__class__.__mro__ }}",
        "{{ undefined_thing.attribute }}",
        "{% set _ = messages.append(1) %}",
        "{{ raise_exception('never') }}",
        "{{ 1 / 0 }}",
    ],
)
def test_a_template_that_cannot_work_stops_the_start(source: str) -> None:
    with pytest.raises(CheckpointError, match="chat template"):
        ChatTemplate(source, TOKENIZER)


def write(folder: Path, config: dict[str, Any], jinja: str | None = None) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if jinja is not None:
        (folder / "chat_template.jinja").write_text(jinja)
    return folder


def test_the_template_file_goes_before_the_configuration(tmp_path: Path) -> None:
    chat = ChatTemplate.load(write(tmp_path, {"chat_template": "config"}, "file"), TOKENIZER)
    assert chat is not None and chat.render(CHATS[0]) == "file"


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    chat = ChatTemplate.load(write(tmp_path, {"chat_template": several}), TOKENIZER)
    assert chat is not None and chat.render(CHATS[0]) == "plain"


def test_a_folder_may_have_no_template_but_not_a_wrong_one(tmp_path: Path) -> None:
    assert ChatTemplate.load(write(tmp_path, {}), TOKENIZER) is None
    with pytest.raises(CheckpointError, match="no template named 'default'"):
        ChatTemplate.load(write(tmp_path, {"chat_template": [{"name": "rag", "template": "x"}]}), TOKENIZER)
    with pytest.raises(CheckpointError, match="must be a string or a list"):
        ChatTemplate.load(write(tmp_path, {"chat_template": 3}), TOKENIZER)
