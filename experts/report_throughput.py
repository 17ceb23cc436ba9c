"""The picture of what scenarios save when they are served: speed, memory, time to start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moe_runtime.experts.report_style import INK, drawn, shorten

COLOURS = {"full": "#98a2b3", "virtual": "#3a6fd8", "mixed": "#a259c9", "physical": "#17a58a"}  # by way


def serving(rows: Sequence[Mapping[str, Any]]) -> str:
    """Tokens per second by concurrency, then memory and start, a bar per way and scenario."""
    streams = sorted({int(each) for row in rows for each in row["tokens_per_s"]})
    sizes = []
    for what, name in (("memory", "rss_bytes"), ("weights", "bytes"), ("start", "start_s")):
        largest = max((row[name] or 0.0 for row in rows), default=0.0)
        scale, unit = (1.0, "seconds") if what == "start" else (1e9, "GB") if largest >= 1e9 else (1e6, "MB")
        if largest:
            sizes.append((f"{what}, {unit}", name, scale))

    def draw(figure: Figure) -> None:
        top = figure.add_gridspec(2 if streams and sizes else 1, 1, height_ratios=None)
        if streams:
            _speeds(figure.add_subplot(top[0]), rows, streams)
        if sizes:
            below = top[-1].subgridspec(1, len(sizes))
            for place, (title, name, unit) in enumerate(sizes):
                axes = figure.add_subplot(below[place])
                _bars(axes, rows, name, unit)
                axes.set_title(title, color=INK)
                if place:
                    axes.set_yticklabels([])

    return drawn("serving", (270 if streams else 0) + (70 + 34 * len(rows) if sizes else 0), draw)


def name_of(row: Mapping[str, Any]) -> str:
    """``virtual, credit``; ``full``."""
    return ", ".join(part for part in (row["way"], shorten(row["scenario"], 20)) if part)


def _speeds(axes: Axes, rows: Sequence[Mapping[str, Any]], streams: Sequence[int]) -> None:
    width = 0.8 / len(rows)
    for place, row in enumerate(rows):
        found = [
            (at, row["tokens_per_s"][str(each)])
            for at, each in enumerate(streams)
            if str(each) in row["tokens_per_s"]
        ]
        left = [at - 0.4 + (place + 0.5) * width for at, _ in found]
        bars = axes.bar(
            left, [speed for _, speed in found], width * 0.9, color=COLOURS[row["way"]], label=name_of(row)
        )
        axes.bar_label(bars, fmt="%.0f", color=INK, fontsize=11, padding=2)
    axes.set_xticks(range(len(streams)), [f"{each} at once" if each > 1 else "1 alone" for each in streams])
    axes.set_title("tokens per second, all requests together", color=INK)
    axes.grid(axis="y")
    axes.margins(y=0.15)
    axes.legend(loc="upper left", ncols=min(4, len(rows)))


def _bars(axes: Axes, rows: Sequence[Mapping[str, Any]], name: str, unit: float) -> None:
    values = [(row[name] or 0.0) / unit for row in rows]
    bars = axes.barh(range(len(rows)), values, 0.7, color=[COLOURS[row["way"]] for row in rows])
    labels = ["not measured" if row[name] is None else f"{row[name] / unit:.3g}" for row in rows]
    axes.bar_label(bars, labels, color=INK, fontsize=11, padding=4)
    axes.set_yticks(range(len(rows)), [name_of(row) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks([])
    axes.margins(x=0.2)
    axes.spines["bottom"].set_visible(False)
