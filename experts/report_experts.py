"""Pictures of which experts scenarios keep: keep map, overlap, importance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter

from moe_runtime.experts.report_style import (
    EMPTY,
    HEAT,
    INK,
    LINE,
    MUTED,
    SHARED,
    drawn,
    legible,
    rectangles,
    shorten,
)

Body = Mapping[str, Any]
GAP = 0.08  # of a cell, between cells


def keep_map(body: Body, colours: Mapping[str, str]) -> str:
    """Layers down, experts across; a cell has the colours of the plans that keep it."""
    layers, num_experts = body["shape"]["layers"], body["shape"]["num_experts"]
    row = min(34.0, max(7.0, 900.0 / len(layers)))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for colour, boxes in _cells(body["plans"], layers, num_experts, colours).items():
            rectangles(axes, boxes, colour)
        axes.set_xlim(-0.5, num_experts - 0.5)
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.spines[:].set_visible(False)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))
        step = -(-len(layers) // 24)
        axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        handles = [Patch(color=colours[plan["label"]]) for plan in body["plans"]]
        names = [f"{shorten(plan['label'])}" for plan in body["plans"]]
        if len(body["plans"]) > 1:
            handles.append(Patch(color=SHARED))
            names.append("all of them")
        handles.append(Patch(color=EMPTY))
        names.append("none")
        figure.legend(handles, names, loc="outside upper left", ncols=6, handlelength=1.1, handleheight=1.1)

    return drawn("keep-map", 96 + row * len(layers), draw)


def _cells(
    plans: Sequence[Body], layers: Sequence[int], num_experts: int, colours: Mapping[str, str]
) -> dict[str, list[tuple[float, float, float, float]]]:
    """By colour, boxes; a cell of several plans is cut into upright strips, one of all is SHARED."""
    boxes: dict[str, list[tuple[float, float, float, float]]] = {}
    kept = {plan["label"]: [{*plan["kept"][str(layer)]} for layer in layers] for plan in plans}
    for row in range(len(layers)):
        for expert in range(num_experts):
            owners = [label for label, by_layer in kept.items() if expert in by_layer[row]]
            shades = [colours[label] for label in owners] or [EMPTY]
            if len(owners) == len(plans) > 1:
                shades = [SHARED]
            width = (1 - GAP) / len(shades)
            for place, shade in enumerate(shades):
                left = expert - 0.5 + GAP / 2 + place * width
                boxes.setdefault(shade, []).append((left, row - 0.5 + GAP / 2, width, 1 - GAP))
    return boxes


def overlap(body: Body) -> str:
    """Jaccard of every two plans."""
    labels = [shorten(label) for label in body["overlap"]["plans"]]
    matrix = np.array(body["overlap"]["jaccard"])
    cell = 64.0 if len(labels) <= 6 else 44.0

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for row, column in np.ndindex(matrix.shape):
            shade = HEAT(float(matrix[row, column]) ** 0.8)
            cell_of(axes, row, column, to_hex(shade), f"{matrix[row, column]:.0%}")
        frame_cells(axes, labels, labels)

    return drawn("overlap", 60 + cell * len(labels), draw, width=min(1080.0, 200 + 110.0 * len(labels)))


def cell_of(axes: Axes, row: int, column: int, shade: str, text: str, note: str = "") -> None:
    """One cell of a matrix, with its number and below it a smaller one."""
    box = Rectangle((column - 0.48, row - 0.47), 0.96, 0.94, facecolor=shade, edgecolor="none")
    axes.add_patch(box)
    ink = MUTED if shade == EMPTY else legible(shade)
    up = 0.13 if note else 0.0
    axes.text(column, row - up, text, ha="center", va="center", color=ink, fontsize=13, fontweight="bold")
    if note:
        axes.text(column, row + 0.22, note, ha="center", va="center", color=ink, fontsize=10.5)


def frame_cells(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Names beside the cells, columns' on top."""
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.xaxis.tick_top()
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(labelsize=12, labelcolor=INK, pad=6)
    axes.spines[:].set_visible(False)


def importance(body: Body, colours: Mapping[str, str]) -> str:
    """Cumulated share of the score by rank, a panel per scenario, a line per layer; Gini by layer."""
    names = list(body["scenarios"])
    across = min(3, len(names))
    down = -(-len(names) // across)
    layers = body["shape"]["layers"]

    def draw(figure: Figure) -> None:
        figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.1)  # inches
        grid = figure.add_gridspec(down + 1, across, height_ratios=[1.0] * down + [0.72])
        for number, name in enumerate(names):
            axes = figure.add_subplot(grid[number // across, number % across])
            _importance_panel(axes, body, name, colours[name])
            axes.set_ylabel("share of the score" if number % across == 0 else "")
            axes.set_xlabel("experts, most needed first")
        axes = figure.add_subplot(grid[down, :])
        for name in names:
            shade = colours[name]
            axes.plot(
                range(len(layers)), body["scenarios"][name]["gini"], "o-", color=shade, lw=2, ms=6,
                label=shorten(name),
            )  # fmt: skip
        axes.set_title("Gini coefficient by layer: 0 is all experts alike, 1 is one expert alone")
        step = -(-len(layers) // 24)
        axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axes.set_ylim(0, 1)
        axes.set_xlabel("layer")
        axes.grid(axis="y")
        axes.legend(loc="lower right", ncols=min(4, len(names)))

    return drawn("importance", 40 + 290 * down + 220, draw)


def _importance_panel(axes: Axes, body: Body, name: str, shade: str) -> None:
    layers, num_experts = body["shape"]["layers"], body["shape"]["num_experts"]
    ranks = np.arange(num_experts + 1)
    axes.plot([0, num_experts], [0, 1], color=LINE, lw=1.5, ls=(0, (4, 3)))
    for row, curve in enumerate(body["scenarios"][name]["cumulated"]):
        depth = 1.0 if len(layers) == 1 else row / (len(layers) - 1)
        axes.plot(ranks, [0.0, *curve], color=shade, lw=1.8, alpha=0.35 + 0.65 * depth)
    for plan in body["plans"]:
        if plan["scenarios"] == [name]:
            kept = [len(plan["kept"][str(layer)]) for layer in layers]
            axes.plot(
                kept,
                plan["share_kept"][name],
                "o",
                color=shade,
                ms=7,
                mec=INK,
                mew=1.2,
                zorder=5,
                clip_on=False,
            )
    axes.set_title(shorten(name), color=INK)
    axes.set_xlim(0, num_experts)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.grid()
