"""Request bytes -> a JSON object that means one thing only, or a RequestError. Knows no field names.

Python's ``json`` accepts NaN, Infinity, 1e999, repeated keys and lone surrogates; each of these has crashed
or fooled a server of this kind, so each is refused here, before any code looks at a value.
"""

import json
import math
import re
from typing import Any, NoReturn

from moe_runtime.errors import RequestError

# A 64-bit integer has 19 digits; no field takes a longer one, and Python's int() is quadratic in the length.
MAX_INTEGER_DIGITS = 19
MAX_NUMBER_CHARACTERS = 64
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse_object(body: bytes) -> dict[str, Any]:
    """The body's JSON object. Raises RequestError (code ``invalid_json``) on anything doubtful."""
    if not body:
        raise _refuse("the body is empty; send a JSON object")
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_constant=_no_constant,
            parse_float=_finite_float,
            parse_int=_bounded_int,
        )
    except UnicodeDecodeError:
        raise _refuse("the body is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise _refuse(f"{error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise _refuse("the JSON is nested too deeply") from None
    if not isinstance(value, dict):
        raise _refuse("the body must be a JSON object")
    if SURROGATE_ESCAPE.search(body):
        _refuse_lone_surrogates(value)
    return value


def _refuse(reason: str) -> RequestError:
    return RequestError(f"We could not parse the JSON body of your request: {reason}.", code="invalid_json")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise _refuse("an object has the same key twice")
    return result


def _no_constant(name: str) -> NoReturn:
    raise _refuse(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    value = float(text) if len(text) <= MAX_NUMBER_CHARACTERS else math.inf
    if not math.isfinite(value):
        raise _refuse("a number is out of range")
    return value


def _bounded_int(text: str) -> int:
    if len(text.lstrip("-")) > MAX_INTEGER_DIGITS:
        raise _refuse("an integer is out of range")
    return int(text)


def _refuse_lone_surrogates(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (UnicodeEncodeError, RecursionError):
        raise _refuse("a string holds half of a surrogate pair") from None
