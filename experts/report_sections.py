"""A report's sections: title, what to look at, table. HTML and Markdown are both made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_runtime.experts.report_numbers import has_pareto
from moe_runtime.experts.report_tables import (
    Table,
    answers_table,
    baseline_table,
    curve_table,
    importance_table,
    overlap_table,
    plan_table,
    recovery_table,
    serving_table,
    sets_table,
)

Body = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """key      in anchors and in the body's "findings"
    see      what to look at in the picture
    picture  whether there is one of this key
    files    what it was made from, as the body's sources name them
    """

    key: str
    title: str
    see: str
    picture: bool
    table: Table
    files: Sequence[str]


def sections(body: Body) -> list[Section]:
    """Those that there is anything to say in."""
    plans = [plan["file"] for plan in body["plans"]]
    evaluations = [row["file"] for row in body["evaluations"]]
    found = _kept(body, plans)
    found.append(_importance(body, [body["sources"][0]["file"], *plans]))
    if has_pareto(body):
        found.append(
            Section(
                "pareto",
                "Bytes against divergence",
                "Left is smaller, low is closer to the full model. The line joins the best cuts found while "
                "planning; the diamond is the chosen plan on texts that planning never saw. It belongs under "
                "the dashed limit, whiskers and all.",
                True,
                curve_table(body),
                [*plans, *evaluations],
            )
        )
    if evaluations:
        found += _evaluated(body, evaluations)
    if body["serving"] is not None:
        found.append(
            Section(
                "serving",
                "Speed and memory",
                f"Virtual: all experts loaded, a mask per request. Physical: only kept experts loaded. "
                f"Machine: {body['serving']['machine']}.",
                True,
                serving_table(body),
                [body["sources"][-1]["file"]],
            )
        )
    return found


def _kept(body: Body, plans: Sequence[str]) -> list[Section]:
    found = []
    if plans:
        found.append(
            Section(
                "keep_map",
                "Which experts each plan keeps",
                "Every cell is an expert. A single colour: only that plan keeps it. Split: several do. "
                "Slate: all do. Faint: nobody does, so a server of these scenarios need not load it.",
                True,
                plan_table(body),
                plans,
            )
        )
    if len(plans) > 1:
        found.append(
            Section(
                "overlap",
                "How much scenarios overlap",
                "Experts that both keep, as a share of those that either keeps (Jaccard). High numbers: the "
                "two can share memory. Low ones: each is a specialist.",
                True,
                overlap_table(body),
                plans,
            )
        )
    return found


def _importance(body: Body, files: Sequence[str]) -> Section:
    return Section(
        "importance",
        "How unevenly experts matter",
        f"A line per layer (deeper layers darker): the share of the score ({body['score']}) that the "
        "best experts hold together. The steeper it rises, the more can go; the dashed line is all "
        "experts alike. Dots are the plans.",
        True,
        importance_table(body),
        files,
    )


def _evaluated(body: Body, files: Sequence[str]) -> list[Section]:
    found = [
        Section(
            "blast",
            "Blast radius: what else a plan changes",
            "A row per plan, a column per test set; the plan's own scenario is framed. Inside the frame "
            "numbers should be close to the full model. Outside they show what the plan has given up: "
            "traffic that strays there gets these answers.",
            True,
            sets_table(body),
            files,
        )
    ]
    if any(row["baselines"] for row in body["evaluations"]):
        found.append(
            Section(
                "baselines",
                "Is the choice of experts any good?",
                "Other choices of exactly the same bytes on the same test texts, with 95 % intervals. Random "
                "cuts are hollow. The plan should lie far left of them, and no score clearly left of it.",
                True,
                baseline_table(body),
                files,
            )
        )
    recovered = recovery_table(body)
    if recovered.rows:
        found.append(
            Section(
                "recovery",
                "Does it help to make up for missing experts?",
                "The same plan on the same texts, alone and with a few numbers more: a constant in the place "
                "of every missing expert, or offsets of the router's logits. One is applied only where the "
                "change of mean KL is below 0 with its whole interval; it is told by paired documents, far "
                "sharper than the intervals of the two means. All other tables hold with what is applied.",
                False,
                recovered,
                files,
            )
        )
    answers = answers_table(body)
    if answers.rows:
        found.append(
            Section(
                "answers",
                "Whole answers",
                "Generated greedily by both models. Pruned models fail as loops and as confident wrong facts "
                "before any average shows it: compare each pair of columns.",
                False,
                answers,
                files,
            )
        )
    return found
