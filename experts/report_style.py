"""How a report's pictures look: colours, type, and SVG that lives inside a page.

Colours of ink, lines and ground are named in the SVG by the page's CSS variables, so pictures follow it into
dark mode and onto paper. Text stays text, in the page's own font. The same numbers are the same bytes.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline

# Stand-ins that no data has; the page has a variable for each.
INK, MUTED, LINE, EMPTY, SHARED, PAPER = "#101828", "#667085", "#e4e7ec", "#f0f2f5", "#344054", "#fefefe"
VARIABLES = {
    INK: "--ink", MUTED: "--muted", LINE: "--line", EMPTY: "--empty", SHARED: "--shared", PAPER: "--paper",
}  # fmt: skip

# Told apart also by readers who see few colours: they differ in lightness, too.
PALETTE = ("#3a6fd8", "#ef8a32", "#17a58a", "#a259c9", "#d6466f", "#8a9a1f", "#22a5c9", "#a5673f")
GOOD, BAD, QUIET = "#1a9c5b", "#d64545", "#98a2b3"
HEAT = LinearSegmentedColormap.from_list("heat", ["#eef4ff", "#a9c6f7", "#5b8def", "#2f55b8", "#1b2f6e"])
COST = LinearSegmentedColormap.from_list("cost", ["#e9f7ef", "#fdf3d3", "#f9c784", "#ea7a4c", "#b3263e"])

WIDTH = 1080  # pixels of the page's column: pictures are drawn in its pixels
POINTS = 72  # one inch of matplotlib's; at 72 dots its points are our pixels
SETTINGS: Any = {
    "svg.fonttype": "none", "svg.hashsalt": "moe-experts report", "text.parse_math": False,
    "figure.dpi": POINTS, "savefig.dpi": POINTS, "figure.facecolor": "none", "axes.facecolor": "none",
    "font.family": "DejaVu Sans", "font.size": 12, "axes.titlesize": 13, "axes.labelsize": 12,
    "text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED,
    "axes.edgecolor": LINE, "axes.linewidth": 1.0, "grid.color": LINE, "grid.linewidth": 1.0,
    "axes.titlelocation": "left", "axes.titlepad": 10, "axes.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "xtick.major.size": 0, "ytick.major.size": 0, "xtick.minor.size": 0, "ytick.minor.size": 0,
    "legend.frameon": False, "lines.solid_capstyle": "round", "axes.unicode_minus": True,
}  # fmt: skip


def drawn(name: str, height: float, draw: Callable[[Figure], None], width: float = WIDTH) -> str:
    """An ``<svg>`` element of ``width`` x ``height`` pixels that ``draw`` fills; ids begin with ``name``."""
    data = io.StringIO()
    with mpl.rc_context(SETTINGS), warnings.catch_warnings():
        # Text is set by the page, whose fonts have more letters (Chinese names) than the one measured with.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=(width / POINTS, height / POINTS), layout="constrained")
        draw(figure)
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(data, format="svg", transparent=True, metadata=nothing)
    return inlined(data.getvalue(), name)


def inlined(svg: str, name: str) -> str:
    """A whole SVG file as an element of a page: no prologue, no namespaces, ids of its own, our variables."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(
        r'(<svg\b[^>]*?) width="([\d.]+)pt"', r'\1 width="\2"', svg, count=1
    )  # our points are pixels
    svg = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(?<= id=")', f"{name}-", svg)
    svg = re.sub(r'(?<=url\(#)|(?<=xlink:href="#)', f"{name}-", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r"\n\s*", "\n", svg).strip()


def colours(scenarios: Sequence[str], plans: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """By scenario, and by plan's label: the first plan for a scenario has the scenario's."""
    free = iter(range(10**6))
    found = {name: PALETTE[next(free) % len(PALETTE)] for name in scenarios}
    taken = set()
    for plan in plans:
        scenario = plan["scenarios"][0] if len(plan["scenarios"]) == 1 else None
        if scenario in found and scenario not in taken:
            taken.add(scenario)
            found[plan["label"]] = found[scenario]
        else:
            found[plan["label"]] = PALETTE[next(free) % len(PALETTE)]
    return found


def rectangles(axes: Axes, boxes: npt.ArrayLike, colour: str) -> None:
    """All ``boxes``, [N, 4] of left, bottom, width, height, as one path: thousands of cells stay small."""
    left, bottom, width, height = np.asarray(boxes, dtype=float).reshape(-1, 4).T
    right, top = left + width, bottom + height
    corners = np.stack(
        [
            np.stack(corner, -1)
            for corner in ((left, bottom), (right, bottom), (right, top), (left, top), (left, bottom))
        ],
        axis=1,
    )
    codes = [Outline.MOVETO, Outline.LINETO, Outline.LINETO, Outline.LINETO, Outline.CLOSEPOLY]
    outline = Outline(corners.reshape(-1, 2), np.tile(codes, len(left)))
    axes.add_patch(PathPatch(outline, facecolor=colour, edgecolor="none", linewidth=0))


def legible(colour: Any) -> str:
    """Black or white, whichever is read better on ``colour`` (WCAG's relative luminance, without gamma)."""
    red, green, blue = to_rgb(colour)
    return "#ffffff" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.55 else "#1d2939"


def shorten(label: str, letters: int = 28) -> str:
    """A label that cannot push a picture out of shape."""
    label = " ".join(label.split())
    return label if len(label) <= letters else label[: letters - 1] + "…"
