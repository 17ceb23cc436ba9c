"""What a report's numbers say, in sentences; and what is missing from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import combinations
from statistics import mean, median
from typing import Any

from moe_runtime.experts.report_numbers import baseline_panels, kl_text

Body = Mapping[str, Any]


def missing(body: Body) -> list[str]:
    """What the report cannot say, and the command that would make it able to."""
    told = []
    if not body["plans"]:
        told.append("No plan was given: make one with `moe-experts plan` and name it with --plan.")
    planned = {name for plan in body["plans"] for name in plan["scenarios"]}
    told += [
        f"Scenario {name} was profiled, but no plan for it was given (--plan)."
        for name in body["scenarios"]
        if body["plans"] and name not in planned
    ]
    for plan in body["plans"]:
        if plan["verdict"] == "not evaluated":
            told.append(
                f"Plan {plan['label']} has no evaluation, so nothing is known of what it costs: run "
                "`moe-experts evaluate --out` on it and name the file with --evaluation."
            )
        if not plan["curve"]:
            told.append(
                f"Plan {plan['label']} was sized by number, without measuring: it has no curve of bytes "
                "against KL (`moe-experts plan --text`)."
            )
    for row in body["evaluations"]:
        if not row["baselines"]:
            told.append(f"The evaluation of {row['label']} has no baselines (--no-baselines).")
        told += [
            f"The test set {each['name']} of {row['label']} has no questions with known answers."
            for each in row["sets"]
            if each["in_scenario"] and not (each["answers"] or {}).get("exact_match")
        ]
    told += _different_sets(body)
    if body["serving"] is None:
        told.append("No speed or memory: measure with bench/scenarios.py and name the file with --serving.")
    return told


def _different_sets(body: Body) -> list[str]:
    digests: dict[str, set[str]] = {}
    for row in body["evaluations"]:
        for each in row["sets"]:
            digests.setdefault(each["name"], set()).add(each["digest"])
    return [
        f"The test set {name} is not the same texts in all evaluations: do not compare down its column."
        for name, found in digests.items()
        if len(found) > 1
    ]


def findings(body: Body) -> dict[str, list[str]]:
    """By section, sentences that follow from the numbers; a section without any is left out."""
    told = {"importance": _importance(body)}
    if body["plans"]:
        told |= {"keep_map": _keep_map(body), "overlap": _overlap(body), "pareto": _pareto(body)}
    if body["evaluations"]:
        told |= {"blast": _blast(body), "baselines": _baselines(body), "recovery": _recovery(body)}
    if body["serving"] is not None:
        told["serving"] = _serving(body["serving"]["rows"])
    return {name: sentences for name, sentences in told.items() if sentences}


def _keep_map(body: Body) -> list[str]:
    plans, total = body["plans"], body["plans"][0]["experts"]["all"]
    if len(plans) == 1:
        return [f"{plans[0]['label']} keeps {plans[0]['experts']['kept']} of {total} experts."]
    owners = Counter(
        (layer, expert) for plan in plans for layer, experts in plan["kept"].items() for expert in experts
    )
    times = Counter(owners.values())
    shared = sum(count for number, count in times.items() if 1 < number < len(plans))
    some = f", {shared} by some" if len(plans) > 2 else ""
    return [
        f"Of {total} experts {times[1]} are kept by one plan alone{some}, {times[len(plans)]} by all "
        f"{len(plans)}, and {total - len(owners)} by none: a server of all {len(plans)} needs {len(owners)}."
    ]


def _overlap(body: Body) -> list[str]:
    labels, matrix = body["overlap"]["plans"], body["overlap"]["jaccard"]
    pairs = sorted(
        (matrix[one][two], labels[one], labels[two]) for one, two in combinations(range(len(labels)), 2)
    )
    if not pairs:
        return []
    least, most = pairs[0], pairs[-1]
    told = [f"{most[1]} and {most[2]} share the most: {most[0]:.0%} of the experts that either keeps."]
    if len(pairs) > 1:
        told.append(f"{least[1]} and {least[2]} share the least: {least[0]:.0%}.")
    return told


def _importance(body: Body) -> list[str]:
    told, num_experts = [], body["shape"]["num_experts"]
    half = max(1, num_experts // 2)
    for name, found in body["scenarios"].items():
        shares = [curve[half - 1] for curve in found["cumulated"]]
        unseen = sum(found["unseen"])
        told.append(
            f"{name}: the {half} most needed of a layer's {num_experts} experts hold {min(shares):.1%} to "
            f"{max(shares):.1%} of its score"
            + (f"; {unseen} experts were chosen by no token." if unseen else ".")
        )
    return told


def _pareto(body: Body) -> list[str]:
    told = []
    for plan in body["plans"]:
        within = [point for point in plan["curve"] if point["within"]]
        if plan["curve"]:
            smallest = min((point["bytes"] for point in within), default=None)
            share = (
                "none keeps to the limits"
                if smallest is None
                else (
                    f"the smallest within the limits has {smallest / plan['bytes']['full']:.0%} of the bytes"
                )
            )
            told.append(f"{plan['label']}: {len(plan['curve'])} cuts were measured while planning; {share}.")
    return told


def _blast(body: Body) -> list[str]:
    told = []
    for row in body["evaluations"]:
        own = max(found["divergence"]["kl_mean"]["value"] for found in row["sets"] if found["in_scenario"])
        others = [found for found in row["sets"] if not found["in_scenario"]]
        if not others:
            continue
        spared = min(others, key=lambda found: found["divergence"]["kl_mean"]["value"])
        spared_kl = spared["divergence"]["kl_mean"]["value"]
        sentence = (
            f"{row['label']}: {kl_text(own)} nats in its scenario; outside it {kl_text(spared_kl)} or more "
            f"({spared['name']} is changed least)"
        )
        drops = [
            (match["full"] - match["masked"], found["name"], match)
            for found in others
            if (match := (found["answers"] or {}).get("exact_match"))
        ]
        if drops:
            average = mean(drop for drop, _, _ in drops)
            _, name, match = min(drops, key=lambda each: each[0])
            sentence += (
                f". Right answers elsewhere fall by {100 * average:.1f} points on average; {name} keeps "
                f"most: {match['full']:.1%} → {match['masked']:.1%}"
            )
        told.append(sentence + ".")
    return told


def _baselines(body: Body) -> list[str]:
    told = []
    for row, name, masks in baseline_panels(body):
        own = masks["this plan"]["kl_mean"]["value"]
        chance = [found["kl_mean"]["value"] for mask, found in masks.items() if mask.startswith("random")]
        better = [
            f"{mask} ({kl_text(found['kl_mean']['value'])})"
            for mask, found in masks.items()
            if mask != "this plan" and found["kl_mean"]["value"] < own
        ]
        random = (
            f"{kl_text(median(chance))} for random cuts of the same bytes" if chance else "no random cuts"
        )
        rest = f"; lower still: {', '.join(better)}" if better else "; no other score does better"
        where = name if name == row["label"] else f"{row['label']} on {name}"
        told.append(f"{where}: {kl_text(own)} nats against {random}{rest}.")
    return told


def _recovery(body: Body) -> list[str]:
    told = []
    for row in (row for row in body["evaluations"] if row["recovery"] is not None):
        found, parts = row["recovery"], []
        for kind in found["tried"]:
            shares = [
                sets[kind]["change"]["value"] / max(sets["alone"]["divergence"]["kl_mean"]["value"], 1e-12)
                for sets in found["sets"].values()
            ]
            parts.append(f"{kind} {max(shares):+.0%}")
        applied = found["applied"]
        told.append(
            f"{row['label']}: mean KL changes by {', '.join(parts)}; "
            + ("none is applied." if applied is None else f"{applied} is applied.")
        )
    return told


def _serving(rows: list[Body]) -> list[str]:
    told = []
    full = next((row for row in rows if row["way"] == "full"), None)
    for row in rows if full else ():
        if row is full or full is None:
            continue
        parts = []
        if row["rss_bytes"] and full["rss_bytes"] and row["way"] == "physical":
            parts.append(f"{row['rss_bytes'] / full['rss_bytes']:.0%} of the memory")
        ratios = [
            f"{speed / full['tokens_per_s'][streams]:.2f}x at {streams}"
            for streams, speed in row["tokens_per_s"].items()
            if streams in full["tokens_per_s"]
        ]
        if ratios:
            parts.append("tokens per second " + ", ".join(ratios))
        if parts:
            name = " ".join(part for part in (row["way"], row["scenario"]) if part)
            told.append(f"{name} against the full model: {'; '.join(parts)}.")
    return told
