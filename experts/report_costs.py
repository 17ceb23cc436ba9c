"""Pictures of what plans cost: bytes against KL, the blast radius, and other cuts of the same size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, NullLocator

from moe_runtime.experts.report_experts import cell_of, frame_cells
from moe_runtime.experts.report_numbers import NO_VALUE, baseline_panels, kl_text, set_names
from moe_runtime.experts.report_style import BAD, COST, EMPTY, HEAT, INK, MUTED, QUIET, drawn, shorten

Body = Mapping[str, Any]
FRAME = "#f2800d"  # of a plan's own cells: seen on pale and dark, on any ground
LINEAR_BELOW = 1e-3  # nats: above it KL's axis is logarithmic, below it reaches 0


def _kl_axis(axis: Any, highest: float, steps: Sequence[int] = (1,)) -> None:
    """Ticks ``steps`` times 0.001, 0.01 ... up to ``highest``, and 0 where the axis has it."""
    ticks = [step * 10.0**power for power in range(-4, 3) for step in steps]
    low, _ = axis.get_view_interval()
    shown = [tick for tick in ticks if max(low, LINEAR_BELOW * (low == 0)) <= tick <= highest * 1.5]
    axis.set_ticks([0.0, *shown] if low == 0 else shown)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def pareto(body: Body, colours: Mapping[str, str]) -> str:
    """Bytes kept against mean KL: what planning measured, its frontier, limits, and the held-out test."""
    full = max(plan["bytes"]["full"] for plan in body["plans"])
    unit, name = (1e9, "GB") if full >= 1e9 else (1e6, "MB")

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        highest, handles = LINEAR_BELOW, []
        for plan in body["plans"]:
            shade = colours[plan["label"]]
            handles.append(Line2D([], [], color=shade, lw=2.5, label=shorten(plan["label"])))
            highest = max([highest, *(point["kl_mean"] for point in plan["curve"])])
            if plan["curve"]:
                _curve(axes, [*plan["curve"], {"bytes": full, "kl_mean": 0.0, "within": True}], shade, unit)
        highest = max(highest, _tested(axes, body, colours, unit))
        limits = sorted({*_limits(body)})
        for limit in limits:
            axes.axhline(limit, color=BAD, lw=1.5, ls=(0, (5, 3)), zorder=1)
        if limits:  # told together: lines are often too close for a label each
            told = " and ".join(f"{limit:g}" for limit in limits)
            axes.annotate(
                f"limit: {told} nats", (1.0, limits[-1]), (0, 4), axes.get_yaxis_transform(), "offset points",
                color=BAD, ha="right", va="bottom", fontsize=11,
            )  # fmt: skip
        highest = max([highest, *limits])
        axes.set_yscale("symlog", linthresh=LINEAR_BELOW, linscale=0.5)
        axes.set_ylim(0, highest * 2)
        _kl_axis(axes.yaxis, highest)
        axes.set_xlabel(f"weights kept, {name} (the full model has {full / unit:.3g})")
        axes.set_ylabel("mean KL, nats")
        axes.grid()
        figure.legend(handles=handles, loc="outside upper left", ncols=4)
        axes.legend(handles=_marks(), loc="lower left")

    return drawn("pareto", 470, draw)


def _marks() -> list[Line2D]:
    """What the shapes of its points mean."""
    return [
        Line2D([], [], color=QUIET, marker="o", lw=0, ms=7, label="measured while planning, within limits"),
        Line2D([], [], color=QUIET, marker="o", mfc="none", lw=0, ms=7, label="measured, over a limit"),
        Line2D(
            [], [], color=INK, marker="D", mfc=QUIET, lw=1.5, ms=8, label="the plan on the test texts, 95 %"
        ),
    ]


def _curve(axes: Axes, curve: Sequence[Body], shade: str, unit: float) -> None:
    points = sorted((point["bytes"] / unit, point["kl_mean"], point["within"]) for point in curve)
    for within in (True, False):
        chosen = [(x, y) for x, y, kept_to in points if kept_to == within]
        axes.plot(
            [x for x, _ in chosen], [y for _, y in chosen], "o", ms=5.5, mec=shade, mew=1.3, alpha=0.8,
            mfc=shade if within else "none",
        )  # fmt: skip
    frontier: list[tuple[float, float]] = []
    for x, y, _ in points:  # from the smallest on: a larger plan counts when it costs less
        if not frontier or y < frontier[-1][1]:
            frontier.append((x, y))
    axes.plot([x for x, _ in frontier], [y for _, y in frontier], color=shade, lw=2, alpha=0.9)


def _tested(axes: Axes, body: Body, colours: Mapping[str, str], unit: float) -> float:
    """The plans on their own test texts; the highest KL of them."""
    plans = {plan["label"]: plan for plan in body["plans"]}
    highest = 0.0
    for row in body["evaluations"]:
        for found in (found for found in row["sets"] if found["in_scenario"]):
            kl = found["divergence"]["kl_mean"]
            spread = [[kl["value"] - kl["low"]], [kl["high"] - kl["value"]]]
            axes.errorbar(
                plans[row["plan"]]["bytes"]["kept"] / unit, kl["value"], yerr=spread, fmt="D", ms=9, mec=INK,
                mfc=colours[row["plan"]], ecolor=INK, elinewidth=1.5, capsize=4, zorder=6,
            )  # fmt: skip
            highest = max(highest, kl["high"])
    return highest


def _limits(body: Body) -> list[float]:
    planned = [float(plan["budget"]["max_kl"]) for plan in body["plans"] if "max_kl" in plan["budget"]]
    return planned + [row["limits"]["kl_mean"] for row in body["evaluations"]]


def blast_radius(body: Body) -> str:
    """Evaluations down, test sets across: mean KL, and right answers, masked and full."""
    columns, rows = set_names(body), body["evaluations"]
    beside = len(columns) <= 5
    labels = [shorten(row["label"], 22) for row in rows]

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2) if beside else figure.subplots(2, 1)
        for axes, fill in ((left, _kl_cell), (right, _match_cell)):
            for row, evaluation in enumerate(rows):
                sets = {found["name"]: found for found in evaluation["sets"]}
                for column, name in enumerate(columns):
                    shade, text, note = fill(sets[name]) if name in sets else (EMPTY, NO_VALUE, "")
                    cell_of(axes, row, column, shade, text, note)
                    if name in sets and sets[name]["in_scenario"]:
                        corner = (column - 0.48, row - 0.47)
                        axes.add_patch(Rectangle(corner, 0.96, 0.94, fill=False, edgecolor=FRAME, lw=3))
            frame_cells(axes, labels, [shorten(name, 18) for name in columns])
        left.set_title("mean KL, nats (p99 below)", pad=30)
        right.set_title("answers exactly right (full model below)", pad=30)
        if beside:
            right.set_yticks([])

    height = 70 + 66 * len(rows)
    return drawn("blast", height if beside else 2 * height, draw)


def _kl_cell(found: Body) -> tuple[str, str, str]:
    kl = found["divergence"]["kl_mean"]["value"]
    place = min(1.0, max(0.0, kl / 0.05) ** 0.5 / 8)  # 0.05 nats is an eighth of the scale, 3.2 its end
    return to_hex(COST(place)), kl_text(kl), kl_text(found["divergence"]["kl_p99"]["value"])


def _match_cell(found: Body) -> tuple[str, str, str]:
    match = (found["answers"] or {}).get("exact_match")
    if match is None:
        return EMPTY, NO_VALUE, "no answers known"
    return to_hex(HEAT(0.85 * match["masked"])), f"{match['masked']:.1%}", f"{match['full']:.1%}"


def baselines(body: Body, colours: Mapping[str, str]) -> str:
    """Mean KL with intervals of every cut of the same bytes, best on top."""
    panels = baseline_panels(body)
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    highest = max(found["kl_mean"]["high"] for _, _, masks in panels for found in masks.values())
    lowest = min(found["kl_mean"]["low"] for _, _, masks in panels for found in masks.values())
    most = max(len(masks) for _, _, masks in panels)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(down, across, squeeze=False, sharex=True)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        for axes, (row, name, masks) in zip(grid.flat, panels, strict=False):
            _baseline_panel(axes, masks, colours[row["plan"]])
            axes.axvline(row["limits"]["kl_mean"], color=BAD, lw=1.5, ls=(0, (5, 3)), zorder=1)
            same = row["label"] == name
            axes.set_title(shorten(name if same else f"{row['label']} on {name}", 34), color=INK)
            if lowest > 0:
                axes.set_xscale("log")
                axes.set_xlim(lowest / 1.4, highest * 1.4)
                _kl_axis(axes.xaxis, highest, [1, 2, 5])
            else:  # a cut that changes nothing: planted models have them
                axes.set_xscale("symlog", linthresh=LINEAR_BELOW, linscale=0.4)
                axes.set_xlim(0, highest * 1.5)
                _kl_axis(axes.xaxis, highest)
            axes.set_xlabel("mean KL, nats")
            axes.grid(axis="x")

    return drawn("baselines", (90 + 26 * most) * down, draw)


def _baseline_panel(axes: Axes, masks: Mapping[str, Any], shade: str) -> None:
    names = sorted(masks, key=lambda name: (masks[name]["kl_mean"]["value"], name))
    for place, name in enumerate(names):
        kl = masks[name]["kl_mean"]
        mine, chance = name == "this plan", name.startswith("random")
        colour = shade if mine else QUIET if chance else MUTED
        axes.errorbar(
            kl["value"], place, xerr=[[kl["value"] - kl["low"]], [kl["high"] - kl["value"]]],
            fmt="D" if mine else "o", ms=9 if mine else 6.5, color=colour, mec=INK if mine else colour,
            elinewidth=2, capsize=0, mfc=colour if mine or not chance else "none", zorder=4,
        )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    for tick, name in zip(axes.get_yticklabels(), names, strict=True):
        tick.set_fontweight("bold" if name == "this plan" else "normal")
        tick.set_color(INK if name == "this plan" else MUTED)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
