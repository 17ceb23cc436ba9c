"""JSON documents of the expert domain: plans, certificates and the like, each hashed and written whole."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moe_runtime
from moe_runtime.canonical_json import digest
from moe_runtime.errors import PlanError
from moe_runtime.experts.whole_file import replacing
from moe_runtime.hf_config import parse_json

FORMAT = 1
FIELDS = {"kind", "format", "digest", "command", "tool", "inputs", "body"}
MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Document:
    """One step's result.

    kind     what it is, for example "plan"
    digest   SHA-256, hexadecimal, of everything in it but itself
    command  the command line that made it, without the folders of one machine
    tool     the version of this program that did
    inputs   digests, by name, of what it was made from
    body     what the kind says
    """

    kind: str
    digest: str
    command: str
    tool: str
    inputs: Mapping[str, str]
    body: Mapping[str, Any]


def save(path: Path, kind: str, body: Mapping[str, Any], inputs: Mapping[str, str]) -> Document:
    """Write a document: complete or not at all. Raises PlanError when it cannot be written, ValueError for a
    body that JSON cannot hold, such as NaN.
    """
    value: dict[str, Any] = {
        "kind": kind,
        "format": FORMAT,
        "command": command_line(sys.argv),
        "tool": moe_runtime.__version__,
        "inputs": dict(inputs),
        "body": dict(body),
    }
    # Through JSON and back first: keys become text, so that the digest is what a reader will find.
    value = json.loads(json.dumps(value, allow_nan=False))
    value["digest"] = digest(value)
    with replacing(path) as file:
        file.write(_render(value))
    return load(path, kind)


def load(path: Path, kind: str) -> Document:
    """Raises PlanError for a file that cannot be read, was changed, or is of another kind or format."""
    name = path.name
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise PlanError(f"{name}: larger than {MAX_BYTES} bytes")
        value = parse_json(data)
    except OSError as error:
        raise PlanError(f"{name}: {error.strerror}") from error
    except ValueError as error:
        raise PlanError(f"{name}: not a JSON document: {error}") from error
    if not isinstance(value, dict) or value.keys() != FIELDS:
        raise PlanError(f"{name}: not a document of moe-experts")
    if value["format"] != FORMAT:
        raise PlanError(f"{name}: format {value['format']!r}, this version reads {FORMAT}")
    if value["kind"] != kind:
        raise PlanError(f"{name}: a {value['kind']!r}, expected a {kind!r}")
    rest = {key: part for key, part in value.items() if key != "digest"}
    # The second comparison finds changes that mean nothing, too: nobody has to judge whether they do.
    if value["digest"] != digest(rest) or data != _render(value):
        raise PlanError(f"{name}: it was changed since it was written (the digest differs); make it again")
    if not (isinstance(rest["body"], dict) and isinstance(rest["inputs"], dict)):
        raise PlanError(f"{name}: its body and inputs must be objects")
    del rest["format"]
    return Document(digest=value["digest"], **rest)


def command_line(argv: Sequence[str]) -> str:
    """``argv`` in one line, absolute paths as their last part: the same on every machine."""
    return " ".join([Path(argv[0]).name, *(_without_folder(word) for word in argv[1:])])


def _without_folder(word: str) -> str:
    flag, equals, value = word.rpartition("=")
    return flag + equals + (Path(value).name if Path(value).is_absolute() else value)


def _render(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False).encode() + b"\n"
