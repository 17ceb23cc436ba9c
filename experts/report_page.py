"""The report as one HTML file: no scripts, nothing loaded from anywhere, every text from a file escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any

from moe_runtime.experts.report_numbers import kl_text
from moe_runtime.experts.report_sections import Section, sections
from moe_runtime.experts.report_tables import Table, interval
from moe_runtime.placement import readable_bytes

Body = Mapping[str, Any]
STYLE = Path(__file__).with_name("report.css")
BADGES = {
    "passed": ("passed", "✓ passed"),
    "refused": ("refused", "✕ refused"),
    "not evaluated": ("open", "not evaluated"),
}
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(
    body: Body, digest: str, command: str, pictures: Mapping[str, str], colours: Mapping[str, str]
) -> str:
    """``digest`` and ``command`` of report.json, ``pictures``: ``<svg>`` by section's key."""
    parts = [
        _header(body),
        '<div class="cards">',
        *(_card(plan, body, colours[plan["label"]]) for plan in body["plans"]),
        "</div>",
        _missing(body["missing"]),
        *(_section(each, body, pictures) for each in sections(body)),
        _sources(body, digest, command),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title(body))}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n</head>\n"
        "<body>\n<main>\n" + "\n".join(part for part in parts if part) + "\n</main>\n</body>\n</html>\n"
    )


def title(body: Body) -> str:
    """What it is about: "Expert pruning: credit, wealth"."""
    names = [plan["label"] for plan in body["plans"]] or list(body["scenarios"])
    return "Expert pruning: " + ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")


def facts(body: Body) -> str:
    """The model and the number of plans, in one line."""
    shape, verdicts = body["shape"], [plan["verdict"] for plan in body["plans"]]
    told = [
        f"{len(shape['layers'])} layers with a router, {shape['num_experts']} experts each, "
        f"{shape['top_k']} per token",
        f"weights {body['model']['weights'][:12]}",
    ]
    told += [f"{verdicts.count(name)} {name}" for name in BADGES if name in verdicts]
    return " · ".join(told)


def _header(body: Body) -> str:
    return (
        '<header>\n<p class="eyebrow">moe-experts report</p>\n'
        f'<h1>{escape(title(body))}</h1>\n<p class="facts">{escape(facts(body))}</p>\n</header>'
    )


def _card(plan: Body, body: Body, colour: str) -> str:
    tone, badge = BADGES[plan["verdict"]]
    experts, size = plan["experts"], plan["bytes"]
    lines = [
        f'<article class="card" style="--tone: {colour}">',
        f'<h3>{escape(plan["label"])} <span class="badge {tone}">{badge}</span></h3>',
        f'<p class="big"><b>{experts["kept"] / experts["all"]:.0%}</b> <span>of the experts, '
        f"{experts['kept']} of {experts['all']}</span></p>",
        "<dl>",
        *_pair("weights", f"{readable_bytes(size['kept'])} of {readable_bytes(size['full'])}"),
    ]
    for row in (row for row in body["evaluations"] if row["plan"] == plan["label"]):
        for found in (found for found in row["sets"] if found["in_scenario"]):
            lines += _measured(found, row["limits"])
        lines += _recovered(row["recovery"])
    lines.append("</dl>")
    if plan["reasons"]:
        reasons = "".join(f"<li>{escape(reason)}</li>" for reason in plan["reasons"])
        lines.append(f'<ul class="reasons refused">{reasons}</ul>')
    return "\n".join([*lines, "</article>"])


def _measured(found: Body, limits: Mapping[str, float]) -> list[str]:
    divergence, match = found["divergence"], (found["answers"] or {}).get("exact_match")
    kl, p99 = divergence["kl_mean"], divergence["kl_p99"]["value"]
    lines = _pair(f"mean KL, at most {limits['kl_mean']:g}", interval(kl))
    lines.append(_meter(kl["high"], limits["kl_mean"]))
    lines += [*_pair(f"p99 KL, at most {limits['kl_p99']:g}", kl_text(p99)), _meter(p99, limits["kl_p99"])]
    if match:
        lines += _pair("right answers", f"{match['full']:.1%} → {match['masked']:.1%}")
    lines += _pair("test documents", f"{divergence['documents']:,} of {found['name']}")
    return lines


def _recovered(told: Body | None) -> list[str]:
    """What the card's numbers hold with."""
    if told is None or told["applied"] is None:
        return []
    added = readable_bytes(told["tried"][told["applied"]]["bytes"])
    return _pair("with recovery", f"{told['applied']}, {added}")


def _pair(name: str, value: str) -> list[str]:
    return [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"]


def _meter(value: float, limit: float) -> str:
    """How much of a limit is used."""
    tone = "passed" if value <= limit else "refused"
    return f'<dd class="meter {tone}"><i style="width: {min(1.0, value / limit):.1%}"></i></dd>'


def _missing(told: Iterable[str]) -> str:
    items = "".join(f"<li>{_prose(each)}</li>" for each in told)
    return (
        f'<section class="panel missing"><h2>Not in this report</h2><ul>{items}</ul></section>'
        if items
        else ""
    )


def _prose(text: str) -> str:
    """Escaped, `commands` as code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", escape(text))


def _section(section: Section, body: Body, pictures: Mapping[str, str]) -> str:
    found = "".join(f"<li>{escape(each)}</li>" for each in body["findings"].get(section.key, ()))
    parts = [
        f'<section class="panel" id="{section.key}">',
        f"<h2>{escape(section.title)}</h2>",
        f'<p class="see">{escape(section.see)}</p>',
    ]
    if section.picture:
        parts.append(
            f'<figure role="img" aria-label="{escape(section.title)}">\n{pictures[section.key]}\n</figure>'
        )
    if found:
        parts.append(f'<ul class="found">{found}</ul>')
    parts += [_table(section.table), _made_from(section.files, body), "</section>"]
    return "\n".join(parts)


def _table(table: Table, style: str = "") -> str:
    kinds = [' class="number"' if numeric else "" for numeric in table.numeric]

    def cells(tag: str, texts: Iterable[str]) -> str:
        row = zip(kinds, texts, strict=True)
        return "<tr>" + "".join(f"<{tag}{kind}>{escape(text)}</{tag}>" for kind, text in row) + "</tr>"

    rows = "\n".join(cells("td", row) for row in table.rows)
    return (
        f'<div class="scroll"><table{style}>\n<thead>{cells("th", table.columns)}</thead>\n'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _made_from(files: Iterable[str], body: Body) -> str:
    numbers = {source["file"]: number for number, source in enumerate(body["sources"])}
    links = [
        f'<a href="#source-{numbers[file]}">{escape(file)} '
        f'<span class="digest">{body["sources"][numbers[file]]["digest"][:12]}</span></a>'
        for file in dict.fromkeys(files)
    ]
    return f'<p class="made">Made from {", ".join(links)}</p>'


def _sources(body: Body, digest: str, command: str) -> str:
    """Every file with the command that made it and all digests in full."""
    rows = []
    for number, source in enumerate(body["sources"]):
        inputs = "<br>".join(
            f'{escape(name)} <span class="digest">{escape(each)}</span>'
            for name, each in source["inputs"].items()
        )
        rows.append(
            f'<tr id="source-{number}"><td>{escape(source["file"])}<br>{escape(source["kind"])}</td>'
            f"<td><code>{escape(source['command'])}</code></td>"
            f'<td><span class="digest">{escape(source["digest"])}</span></td><td>{inputs}</td></tr>'
        )
    return (
        '<section class="panel" id="sources"><h2>Where every number comes from</h2>\n<p class="see">Each '
        "file carries its own digest and the command that made it; a file with one changed byte is refused. "
        f'This page shows report.json <span class="digest">{escape(digest)}</span>, made by '
        f"<code>{escape(command)}</code>. "
        f'Model: weights <span class="digest">{body["model"]["weights"]}</span>, config '
        f'<span class="digest">{body["model"]["config"]}</span>, tokenizer '
        f'<span class="digest">{body["model"]["tokenizer"]}</span>.</p>\n'
        '<div class="scroll"><table class="sources">\n<thead><tr><th>file</th><th>command</th><th>digest</th>'
        "<th>made from</th></tr></thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody></table></div></section>"
    )
