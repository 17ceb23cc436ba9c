"""The report as Markdown: the same sentences and tables as the page, without its pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moe_runtime.experts.report_page import facts, title
from moe_runtime.experts.report_sections import sections
from moe_runtime.experts.report_tables import Table

Body = Mapping[str, Any]
SPECIAL = str.maketrans(
    {mark: f"\\{mark}" for mark in "\\`*[]|#~"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
)


def markdown(body: Body, digest: str, command: str) -> str:
    """``digest`` and ``command`` of report.json."""
    lines = [f"# {plain(title(body))}", "", plain(facts(body)), ""]
    for plan in body["plans"]:
        lines.append(f"- **{plain(plan['label'])}: {plan['verdict']}**" + (":" if plan["reasons"] else ""))
        lines += [f"  - {plain(reason)}" for reason in plan["reasons"]]
    if body["missing"]:
        lines += ["", "Not in this report:", "", *_bullets(body["missing"])]
    for section in sections(body):
        lines += ["", f"## {plain(section.title)}", "", plain(section.see)]
        if section.picture:
            lines += ["", f"The picture is in report.html#{section.key}."]
        if found := body["findings"].get(section.key):
            lines += ["", *_bullets(found)]
        lines += ["", *_table(section.table), "", f"Made from {_made_from(section.files, body)}."]
    lines += ["", "## Where every number comes from", ""]
    lines += [f"This is report.json {digest}, made by {plain(command)}.", "", *_table(_sources(body))]
    return "\n".join(lines) + "\n"


def plain(text: str) -> str:
    """Text that Markdown and HTML leave as it is, in one line."""
    return " ".join(text.split()).translate(SPECIAL)


def _bullets(told: Iterable[str]) -> list[str]:
    return [f"- {plain(each)}" for each in told]


def _table(table: Table) -> list[str]:
    rules = ["---:" if numeric else "---" for numeric in table.numeric]
    rows = [table.columns, *table.rows]
    lines = ["| " + " | ".join(plain(cell) for cell in row) + " |" for row in rows]
    return [lines[0], "|" + "|".join(rules) + "|", *lines[1:]]


def _made_from(files: Iterable[str], body: Body) -> str:
    digests = {source["file"]: source["digest"][:12] for source in body["sources"]}
    return ", ".join(f"{plain(file)} ({digests[file]})" for file in dict.fromkeys(files))


def _sources(body: Body) -> Table:
    rows = [
        [
            source["file"],
            source["kind"],
            source["command"],
            source["digest"],
            ", ".join(f"{name} {digest}" for name, digest in source["inputs"].items()),
        ]
        for source in body["sources"]
    ]
    return Table(["file", "kind", "command", "digest", "made from"], [False] * 5, rows)
