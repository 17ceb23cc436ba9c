"""``moe-experts report``: plans and what they cost as one page to look at, as JSON and as Markdown."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_runtime.errors import ConfigError
from moe_runtime.experts import documents
from moe_runtime.experts.report import KIND, Inputs, gather
from moe_runtime.experts.report_markdown import markdown
from moe_runtime.experts.report_page import page
from moe_runtime.experts.whole_file import replacing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Put statistics, plans and evaluations together: report.html, one file with pictures that needs "
        "nothing else, and the same as report.json and report.md. What is not given is left out, and said "
        "to be."
    )
    parser.add_argument("--statistics", type=Path, required=True, metavar="FILE", help="of `profile`")
    parser.add_argument("--plan", type=Path, nargs="+", default=[], metavar="FILE", help="of `plan`")
    parser.add_argument(
        "--evaluation", type=Path, nargs="+", default=[], metavar="FILE", help="of `evaluate --out`"
    )
    parser.add_argument(
        "--serving", type=Path, metavar="FILE", help="speed and memory, as bench/scenarios.py writes them"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="for the three files; made if it is not there"
    )


def run(arguments: argparse.Namespace) -> int:
    """0 when all three files are written."""
    body = gather(Inputs(arguments.statistics, arguments.plan, arguments.evaluation, arguments.serving))
    pictures, colours = _drawn(body)
    try:
        arguments.out.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {arguments.out}: {error.strerror}; name a folder") from error
    digests = {source["file"]: source["digest"] for source in body["sources"]}
    document = documents.save(arguments.out / "report.json", KIND, body, digests)
    made = (document.digest, document.command)
    contents = {"report.html": page(body, *made, pictures, colours), "report.md": markdown(body, *made)}
    for name, content in contents.items():
        with replacing(arguments.out / name) as file:
            file.write(content.encode())
    print(json.dumps({"digest": document.digest, **body}) if arguments.json else _told(body, arguments.out))
    return 0


def _drawn(body: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    try:
        # Here, because matplotlib is an extra that no other command needs.
        from moe_runtime.experts.report_pictures import pictures
    except ModuleNotFoundError as error:
        raise ConfigError("a report needs matplotlib: pip install matplotlib") from error
    return pictures(body)


def _told(body: Mapping[str, Any], folder: Path) -> str:
    lines = [f"{plan['label']}: {plan['verdict']}" for plan in body["plans"]]
    lines += [f"not in it: {each}" for each in body["missing"]]
    return "\n".join([*lines, f"{folder / 'report.html'}, report.json, report.md"])
