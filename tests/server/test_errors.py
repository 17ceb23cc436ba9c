"""Errors, JSON bodies and field policies, without a socket."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from moe_runtime import errors
from moe_runtime.errors import MoeRuntimeError, RequestError
from moe_runtime.server.errors import INTERNAL, ROWS, EdgeError, describe
from moe_runtime.server.json_body import parse_object
from moe_runtime.server.schema import (
    HARMLESS,
    UNSUPPORTED,
    ChatBody,
    CompletionBody,
    ignored_fields,
    validate,
)

CLASSES = [
    item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, MoeRuntimeError)
]


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_class_has_a_row(kind: type[MoeRuntimeError]) -> None:
    assert kind in ROWS


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_is_openais_object(kind: type[MoeRuntimeError]) -> None:
    reply = describe(kind("what happened"))
    error = json.loads(reply.body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] in {"what happened", INTERNAL}
    assert ("retry-after" in reply.headers) == (reply.status == 503)
    assert error["type"] == ("server_error" if reply.status >= 500 else "invalid_request_error")


@pytest.mark.parametrize(
    ("error", "status"),
    [(EdgeError(413, "large", code="c"), 413), (HTTPException(404), 404), (HTTPException(418), 418),
     (KeyError("inside"), 500), (RecursionError("inside"), 500)],
)  # fmt: skip
def test_errors_from_elsewhere_have_the_same_form(error: Exception, status: int) -> None:
    reply = describe(error)
    assert reply.status == status
    assert set(json.loads(reply.body)["error"]) == {"message", "type", "param", "code"}
    assert b"inside" not in reply.body


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
LEAVES = st.none() | st.booleans() | st.integers(-(10**18), 10**18) | TEXTS
JSON_VALUES = st.recursive(
    LEAVES | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(TEXTS, JSON_VALUES, max_size=5)


@settings(deadline=None)
@given(OBJECTS)
def test_sound_json_is_read_as_python_reads_it(value: dict[str, Any]) -> None:
    for ascii_only in (True, False):
        assert parse_object(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@settings(deadline=None)
@given(st.binary(max_size=40) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_other_bytes_are_a_request_error(data: bytes) -> None:
    try:
        assert isinstance(parse_object(data), dict)
    except RequestError as error:
        assert error.code == "invalid_json"


FIELDS = sorted({*ChatBody.model_fields, *CompletionBody.model_fields, *UNSUPPORTED, *HARMLESS})


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([ChatBody, CompletionBody]),
    st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=6),
)
def test_any_values_in_known_fields_are_taken_or_refused_by_name(
    kind: type[Any], fields: dict[str, Any]
) -> None:
    good = {"model": "m", "messages": [{"role": "user", "content": "a"}], "prompt": "a"}
    try:
        body = validate(kind, good | fields)
    except RequestError as error:
        assert error.param
        return
    assert not set(ignored_fields(body)) & (set(UNSUPPORTED) | HARMLESS)


def test_no_field_is_in_two_classes() -> None:
    declared = {*ChatBody.model_fields, *CompletionBody.model_fields}
    assert not declared & set(UNSUPPORTED)
    assert not declared & HARMLESS
    assert not set(UNSUPPORTED) & HARMLESS


@pytest.mark.parametrize(("entries", "taken"), [(1024, True), (1025, False)])
def test_more_biases_than_a_step_can_bear_are_refused(entries: int, taken: bool) -> None:
    body = {"model": "m", "prompt": "a", "logit_bias": {str(token_id): 1.0 for token_id in range(entries)}}
    if taken:
        assert len(validate(CompletionBody, body).logit_bias or {}) == entries
        return
    with pytest.raises(RequestError, match="at most 1024 items") as error:
        validate(CompletionBody, body)
    assert error.value.param == "logit_bias"
