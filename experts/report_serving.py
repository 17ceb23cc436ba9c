"""Serving measurements for a report: rows by hand, or what bench/scenarios.py writes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_runtime.errors import PlanError
from moe_runtime.hf_config import parse_json

WAYS = ("full", "virtual", "mixed", "physical")
STARTED_AS = {
    "full": "all experts",
    "virtual": "all experts",
    "physical": "kept experts",
}  # bench/scenarios.py
SIZES = ("bytes", "rss_bytes", "start_s")


def read_serving(path: Path) -> dict[str, Any]:
    """``digest`` (SHA-256 of the file), ``command``, ``machine`` in words and ``rows``: each a ``way`` to
    serve (all experts; a scenario's mask over all of them; masks mixed in one batch; the kept experts alone),
    the ``scenario``, and as far as measured ``bytes`` of weights, ``rss_bytes``, ``start_s`` in seconds and
    ``tokens_per_s`` by the number of concurrent requests.

    Raises PlanError for a file that is anything else.
    """
    try:
        data = path.read_bytes()
        value: Any = parse_json(data)
    except OSError as error:
        raise PlanError(f"{path.name}: {error.strerror}") from error
    except ValueError as error:
        raise PlanError(f"{path.name}: not JSON: {error}") from error
    try:
        rows = value["rows"] if "rows" in value else _bench_rows(value)
        found = [_row(row) for row in rows]
        machine = value.get("machine", "not said")
        command = str(value.get("command", "not said"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"{path.name}: not serving measurements: {error!r}") from error
    if not found:
        raise PlanError(f"{path.name}: no row was measured")
    return {
        "digest": hashlib.sha256(data).hexdigest(),
        "command": command,
        "machine": _machine(machine),
        "rows": found,
    }


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    if row["way"] not in WAYS:
        raise ValueError(f"way {row['way']!r}: must be one of {', '.join(WAYS)}")
    speeds = {str(int(streams)): _positive(value) for streams, value in row.get("tokens_per_s", {}).items()}
    sizes = {name: None if row.get(name) is None else _positive(row[name]) for name in SIZES}
    return {
        "way": row["way"],
        "scenario": str(row.get("scenario") or ""),
        **sizes,
        "tokens_per_s": dict(sorted(speeds.items(), key=lambda item: int(item[0]))),
    }


def _positive(value: Any) -> float:
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{value!r}: a number above 0 was expected")
    return number


def _bench_rows(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Medians of its rounds."""
    ways = {way for of in value["concurrency"].values() for way in of}
    rows = []
    for way in (way for way in WAYS if way in ways):
        start = value["starts"].get(STARTED_AS.get(way, ""), {})
        rows.append(
            {
                "way": way,
                "scenario": {"full": "", "mixed": ""}.get(way, value["scenario"]),
                "rss_bytes": start["rss_bytes"]["median"] if start else None,
                "start_s": start["ready_s"]["median"] if start else None,
                "tokens_per_s": {
                    streams: of[way]["tokens_per_s"]["median"]
                    for streams, of in value["concurrency"].items()
                    if way in of
                },
            }
        )
    return rows


def _machine(machine: Any) -> str:
    if not isinstance(machine, Mapping):
        return str(machine)
    told = {
        name: ", ".join(map(str, value)) if isinstance(value, list) else value
        for name, value in machine.items()
    }
    return "; ".join(f"{name} {value}" for name, value in told.items() if name != "command")
