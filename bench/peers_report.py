"""What peers.py leaves: one JSON that later runs of the same day add to, and the table made from it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import result_path, save  # type: ignore[import-not-found]
from peers_environments import ROOT  # type: ignore[import-not-found]
from peers_sides import Place, Side  # type: ignore[import-not-found]


class Report:
    """``add`` writes both files each time; a part measured again takes the place of the old one."""

    def __init__(self, name: str, place: Place, header: dict[str, Any]) -> None:
        self._name = name
        self._header = header
        self._threads = place.threads
        # A result must not tell where on this machine things lie; the longest path goes first.
        private = {str(place.work): "WORK", str(place.checkpoint): "CHECKPOINT", str(ROOT): "."}
        self._private = sorted(private.items(), key=lambda item: -len(item[0]))

    def add(self, part: str, group: str, result: dict[str, Any], sides: list[Side]) -> None:
        """``part`` is groups, starts or http; ``sides`` for the commands and environments that were used."""
        path: Path = result_path(self._name)
        content = json.loads(path.read_text()) if path.exists() else {}
        commands = {
            side.name: [f"{name}={value}" for name, value in side.environment.items()] + side.command
            for side in sides
        }
        entry = {"machine": self._header, "threads": self._threads, "commands": commands, **result}
        content.setdefault(part, {})[group] = self._portable(entry)
        save(self._name, content)
        table = path.with_suffix(".md")
        table.write_text("\n".join(markdown(content)) + "\n")
        print("saved", path, table, flush=True)

    def _portable(self, entry: dict[str, Any]) -> Any:
        text = json.dumps(entry)
        for place, name in self._private:
            text = text.replace(place, name)
        return json.loads(text)


def _spread(value: dict[str, float], digits: int = 2) -> str:
    return f"{value['median']:.{digits}f} ({value['q1']:.{digits}f}-{value['q3']:.{digits}f})"


def markdown(content: dict[str, Any]) -> Iterator[str]:
    """The table: medians with quartiles; ratios are medians of ratios within one round."""
    yield "# Peers on the slice M1"
    for group, entry in content.get("groups", {}).items():
        yield from _heading(group, entry)
        yield from _group_table(entry)
    for entry in content.get("starts", {}).values():
        yield from _heading("each alone", entry)
        yield "| engine | process start to first token, s | peak RSS then, GB |"
        yield "|---|---|---|"
        for name in entry["commands"]:
            row = entry[name]
            memory = row["peak_rss_bytes"]["median"] / 1e9
            yield f"| {name} | {_spread(row['first_token_seconds'])} | {memory:.2f} |"
    for group, entry in content.get("http", {}).items():
        yield from _heading(group, entry)
        yield from _http_table(entry)
    yield from _flags(content)


def _heading(title: str, entry: dict[str, Any]) -> Iterator[str]:
    header = entry["machine"]
    yield ""
    yield f"## {title}"
    yield ""
    yield (
        f"{header['cpu']} ({', '.join(header['isa'])}), {entry['threads']} threads, "
        f"commit {header['commit']}, {header['date']}: `{header['command']}`"
    )
    yield ""


def _group_table(entry: dict[str, Any]) -> Iterator[str]:
    yield "| measure | engine | tokens/s | reads, MB | of the memory bound | ours / it | bandwidth, GB/s |"
    yield "|---|---|---|---|---|---|---|"
    for measure, sides in entry["measures"].items():
        for side in entry["commands"]:
            row = sides[side]
            bound = _spread(row["bound_fraction"]) if "bound_fraction" in row else "-"
            size = f"{row['megabytes']['median']:.0f}" if "megabytes" in row else "-"
            ratios = "; ".join(
                f"{_spread(value)} {pair.partition(' / ')[0]}"
                for pair, value in entry["ratios"][measure].items()
                if pair.endswith(f" / {side}")
            )
            yield (
                f"| {measure} | {side} | {_spread(row['tokens_per_s'], 1)} | {size} | {bound} "
                f"| {ratios or '-'} | {_spread(row['read_gb_per_s'], 1)} |"
            )


def _http_table(entry: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{entry['streams']} streams at once, {entry['prompt_tokens']} + {entry['answer_tokens']} tokens; "
        "times in ms; ratios are above 1 where ours is better."
    )
    yield ""
    yield "| server | tokens/s | TTFT p50 | ITL p50 | ITL p99 | peak RSS, GB | tokens/s, TTFT: ours / it |"
    yield "|---|---|---|---|---|---|---|"
    for name, row in entry["servers"].items():
        times = " | ".join(
            f"{row[key]['median'] * 1e3:.0f} ({row[key]['q1'] * 1e3:.0f}-{row[key]['q3'] * 1e3:.0f})"
            for key in ("ttft_p50", "itl_p50", "itl_p99")
        )
        ratios = "; ".join(
            f"{_spread(value['tokens_per_s'])}, {_spread(value['ttft_p50'])} {pair.partition(' / ')[0]}"
            for pair, value in entry["ratios"].items()
            if pair.endswith(f" / {name}")
        )
        memory = entry["peak_rss_bytes"][name] / 1e9
        yield f"| {name} | {_spread(row['tokens_per_s'], 1)} | {times} | {memory:.2f} | {ratios or '-'} |"


def _flags(content: dict[str, Any]) -> Iterator[str]:
    """How each engine was run, once per engine."""
    yield from ("", "## Versions and flags", "")
    told: set[str] = set()
    for entry in content.get("groups", {}).values():
        for name, info in entry["peers"].items():
            if name not in told:
                told.add(name)
                words = "; ".join(f"{key}: {_plain(value)}" for key, value in info.items())
                yield f"- **{name}**: {words}"
    for entry in content.get("http", {}).values():
        for name, command in entry["commands"].items():
            if f"http {name}" not in told:
                told.add(f"http {name}")
                yield f"- **{name} over HTTP**: `{' '.join(command)}`"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)
