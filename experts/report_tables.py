"""A report's tables, as text in rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_runtime.experts.report_numbers import NO_VALUE, baseline_panels, kl_text, set_names
from moe_runtime.placement import readable_bytes

Body = Mapping[str, Any]


@dataclass(frozen=True)
class Table:
    """``columns``: headers; ``numeric``: of each, whether it holds numbers; ``rows``: text."""

    columns: Sequence[str]
    numeric: Sequence[bool]
    rows: Sequence[Sequence[str]]


def interval(found: Mapping[str, float]) -> str:
    """``0.0123 (0.0110–0.0140)``."""
    return f"{kl_text(found['value'])} ({kl_text(found['low'])}–{kl_text(found['high'])})"


def plan_table(body: Body) -> Table:
    rows = []
    for plan in body["plans"]:
        experts, size = plan["experts"], plan["bytes"]
        per_layer = [len(kept) for kept in plan["kept"].values()]
        spread = str(per_layer[0]) if len({*per_layer}) == 1 else f"{min(per_layer)}–{max(per_layer)}"
        asked = " ".join(f"{name}={value}" for name, value in plan["budget"].items())
        rows.append(
            [
                plan["label"],
                f"{experts['kept']} of {experts['all']}",
                spread,
                readable_bytes(size["kept"]),
                f"{size['kept'] / size['full']:.1%}",
                plan["score"],
                asked or NO_VALUE,
                str(plan["unseen"]),
                str(plan["protected"]),
            ]
        )
    columns = [
        "plan", "experts", "per layer", "weights", "of full", "score", "asked for", "never seen", "protected",
    ]  # fmt: skip
    return Table(columns, [False, True, True, True, True, False, False, True, True], rows)


def overlap_table(body: Body) -> Table:
    labels, common = body["overlap"]["plans"], body["overlap"]["common"]
    rows = [[label, *map(str, row)] for label, row in zip(labels, common, strict=True)]
    return Table(["experts in common", *labels], [False, *[True] * len(labels)], rows)


def importance_table(body: Body) -> Table:
    layers = body["shape"]["layers"]
    rows = []
    for name, found in body["scenarios"].items():
        gini = found["gini"]
        low, high = gini.index(min(gini)), gini.index(max(gini))
        rows.append(
            [
                name,
                f"{found['documents']:,}",
                f"{found['tokens']:,}",
                f"{sum(gini) / len(gini):.3f}",
                f"{gini[low]:.3f} (layer {layers[low]})",
                f"{gini[high]:.3f} (layer {layers[high]})",
                str(sum(found["unseen"])),
            ]
        )
    columns = ["scenario", "documents", "tokens", "Gini, mean", "lowest", "highest", "experts never chosen"]
    return Table(columns, [False, *[True] * 6], rows)


def curve_table(body: Body) -> Table:
    """The chosen plan on its planning texts beside the test's number."""
    tested = {}
    for row in body["evaluations"]:
        own = [found["divergence"]["kl_mean"] for found in row["sets"] if found["in_scenario"]]
        tested[row["plan"]] = max(own, key=lambda kl: kl["high"])
    rows = []
    for plan in (plan for plan in body["plans"] if plan["curve"]):
        at = [point for point in plan["curve"] if point["kept"] == plan["experts"]["kept"]]
        point = min(at, key=lambda point: point["kl_mean"]) if at else None
        rows.append(
            [
                plan["label"],
                str(len(plan["curve"])),
                readable_bytes(plan["bytes"]["kept"]),
                kl_text(point["kl_mean"]) if point else NO_VALUE,
                kl_text(point["kl_p99"]) if point else NO_VALUE,
                interval(tested[plan["label"]]) if plan["label"] in tested else NO_VALUE,
            ]
        )
    columns = [
        "plan",
        "cuts measured",
        "weights",
        "mean KL, planning",
        "p99 KL, planning",
        "mean KL, test (95 %)",
    ]
    return Table(columns, [False, *[True] * 5], rows)


def sets_table(body: Body) -> Table:
    rows = []
    for row in body["evaluations"]:
        by_name = {found["name"]: found for found in row["sets"]}
        for name in (name for name in set_names(body) if name in by_name):
            found = by_name[name]
            divergence = found["divergence"]
            rows.append(
                [
                    row["label"],
                    name + (" (own)" if found["in_scenario"] else ""),
                    f"{divergence['documents']:,}",
                    f"{divergence['tokens']:,}",
                    interval(divergence["kl_mean"]),
                    kl_text(divergence["kl_p99"]["value"]),
                    f"{divergence['top1']['value']:.1%}",
                    f"{divergence['nll_change']['value']:+.4f}",
                ]
            )
    columns = [
        "plan",
        "test set",
        "documents",
        "tokens",
        "mean KL (95 %)",
        "p99 KL",
        "same top-1",
        "NLL change",
    ]
    return Table(columns, [False, False, *[True] * 6], rows)


def baseline_table(body: Body) -> Table:
    rows = []
    for row, name, masks in baseline_panels(body):
        for mask in sorted(masks, key=lambda mask: (masks[mask]["kl_mean"]["value"], mask)):
            found = masks[mask]
            p99, top1 = kl_text(found["kl_p99"]["value"]), f"{found['top1']['value']:.1%}"
            rows.append([row["label"], name, mask, interval(found["kl_mean"]), p99, top1])
    columns = ["plan", "test set", "experts chosen by", "mean KL (95 %)", "p99 KL", "same top-1"]
    return Table(columns, [False, False, False, True, True, True], rows)


def answers_table(body: Body) -> Table:
    rows = []
    for row in body["evaluations"]:
        for found in row["sets"]:
            answers = found["answers"]
            if answers is None:
                continue
            match, loops, ends = answers.get("exact_match"), answers["loop_rate"], answers["natural_end"]
            rows.append(
                [
                    row["label"],
                    found["name"] + (" (own)" if found["in_scenario"] else ""),
                    str(answers["answers"]),
                    f"{match['full']:.1%} → {match['masked']:.1%}" if match else NO_VALUE,
                    f"{match['right_to_wrong']} / {match['wrong_to_right']}" if match else NO_VALUE,
                    f"{loops['full']:.1%} → {loops['masked']:.1%}",
                    f"{ends['full']:.1%} → {ends['masked']:.1%}",
                    f"{answers['length_ratio']:.2f}",
                    f"{answers['same_text']:.1%}",
                ]
            )
    columns = [
        "plan", "test set", "answers", "right", "lost / won", "loops", "natural end", "length", "same text",
    ]  # fmt: skip
    return Table(columns, [False, False, *[True] * 7], rows)


def recovery_table(body: Body) -> Table:
    """The plan alone and with each recovery, on its own test sets."""
    rows = []
    for row in body["evaluations"]:
        told = row["recovery"] or {"sets": {}}
        for name, variants in told["sets"].items():
            for variant, found in variants.items():
                divergence, change = found["divergence"], found["change"]
                tried = told["tried"].get(variant)
                match = (found["answers"] or {}).get("exact_match")
                applied = variant == (told["applied"] or "alone")
                rows.append(
                    [
                        row["label"],
                        name,
                        {"constants": "with constants", "router": "with router correction"}.get(
                            variant, "the plan alone"
                        ),
                        interval(divergence["kl_mean"]),
                        NO_VALUE if change is None else change_text(change),
                        kl_text(divergence["kl_p99"]["value"]),
                        f"{match['full']:.1%} → {match['masked']:.1%}" if match else NO_VALUE,
                        NO_VALUE if tried is None else readable_bytes(tried["bytes"]),
                        "applied" if applied else "does not help" if tried and not tried["helps"] else "no",
                    ]
                )
    columns = [
        "plan", "test set", "variant", "mean KL (95 %)", "change (95 %)", "p99 KL", "right", "extra bytes",
        "applied",
    ]  # fmt: skip
    return Table(columns, [False, False, False, *[True] * 5, False], rows)


def change_text(found: Mapping[str, float]) -> str:
    """``-0.0082 (-0.0100 to -0.0067)``, in nats."""
    return f"{found['value']:+.4f} ({found['low']:+.4f} to {found['high']:+.4f})"


def serving_table(body: Body) -> Table:
    rows = body["serving"]["rows"]
    streams = sorted({int(each) for row in rows for each in row["tokens_per_s"]})

    def size(value: float | None) -> str:
        return NO_VALUE if value is None else readable_bytes(int(value))

    told = [
        [
            row["way"],
            row["scenario"] or NO_VALUE,
            size(row["bytes"]),
            size(row["rss_bytes"]),
            NO_VALUE if row["start_s"] is None else f"{row['start_s']:.2f} s",
            *(
                f"{row['tokens_per_s'][str(each)]:.1f}" if str(each) in row["tokens_per_s"] else NO_VALUE
                for each in streams
            ),
        ]
        for row in rows
    ]
    columns = ["way", "scenario", "weights", "memory", "start", *(f"tok/s at {each}" for each in streams)]
    return Table(columns, [False, False, *[True] * (3 + len(streams))], told)
