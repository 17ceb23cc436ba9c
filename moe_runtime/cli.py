"""Command line flags from dataclasses: ``max_context: int`` becomes ``--max-context INT``.

Every field made with ``config.option`` is a flag; help, type and default come from the field, the limits
from the dataclass's own ``__post_init__``.
"""

import argparse
import dataclasses
import re
import types
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from moe_runtime.errors import ConfigError

Options = TypeVar("Options")
BYTE_SUFFIXES: Mapping[str, int] = types.MappingProxyType(
    {
        "": 1,
        "k": 10**3,
        "m": 10**6,
        "g": 10**9,
        "t": 10**12,
        "ki": 2**10,
        "mi": 2**20,
        "gi": 2**30,
        "ti": 2**40,
    }
)


def add_arguments(
    parser: argparse.ArgumentParser, options: type[Any], only: Collection[str] | None = None
) -> None:
    """Add one flag per field of the dataclass ``options`` that has help text; of ``only`` those, if given."""
    hints = get_type_hints(options)
    for field in dataclasses.fields(options):
        if "help" not in field.metadata or (only is not None and field.name not in only):
            continue
        default = "" if field.default in (None, "") else f" (default: {_show(field)})"
        settings: dict[str, Any] = {
            "dest": field.name,
            "default": argparse.SUPPRESS,  # an absent flag leaves the dataclass's default in force
            "help": (field.metadata["help"] + default).replace("%", "%%"),
        }
        settings |= _type_settings(hints[field.name], field.metadata.get("unit", ""))
        parser.add_argument(f"--{field.name.replace('_', '-')}", **settings)


def from_args(arguments: argparse.Namespace, options: type[Options]) -> Options:
    """Build ``options`` from the flags that were given. Raises ConfigError when a value is out of range."""
    fields = dataclasses.fields(options)  # type: ignore[arg-type]
    given = {field.name: getattr(arguments, field.name) for field in fields if hasattr(arguments, field.name)}
    return options(**given)


def parse_bytes(text: str) -> int:
    """``2GiB`` -> 2147483648, ``500MB`` -> 500000000, ``4096`` -> 4096. Raises ConfigError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?|)b?\s*", text.lower())
    if match is None:
        raise ConfigError(f"{text!r} is not a size; write for example 2GiB, 500MB or 4096")
    return int(float(match[1]) * BYTE_SUFFIXES[match[2]])


def _show(field: "dataclasses.Field[Any]") -> str:
    if field.metadata.get("unit") == "bytes" and isinstance(field.default, int):
        for suffix, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
            if field.default and field.default % size == 0:
                return f"{field.default // size}{suffix}"
    return str(field.default)


def _type_settings(hint: Any, unit: str) -> dict[str, Any]:
    """argparse's ``type`` / ``choices`` / ``action`` for one annotation."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Literal:
        return {"choices": get_args(hint)}
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if unit == "bytes":
        return {"type": _argument(parse_bytes), "metavar": "BYTES"}
    return {"type": hint, "metavar": hint.__name__.upper()}


def _argument(parse: Callable[[str], int]) -> Callable[[str], int]:
    def argument(text: str) -> int:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return argument
