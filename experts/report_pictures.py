"""All pictures of a report, by section."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_runtime.experts import report_costs, report_experts, report_throughput
from moe_runtime.experts.report_sections import sections
from moe_runtime.experts.report_style import colours


def pictures(body: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """``<svg>`` elements by section's key, and the colours of scenarios and plans in them by name."""
    shades = colours(list(body["scenarios"]), body["plans"])
    draw = {
        "keep_map": lambda: report_experts.keep_map(body, shades),
        "overlap": lambda: report_experts.overlap(body),
        "importance": lambda: report_experts.importance(body, shades),
        "pareto": lambda: report_costs.pareto(body, shades),
        "blast": lambda: report_costs.blast_radius(body),
        "baselines": lambda: report_costs.baselines(body, shades),
        "serving": lambda: report_throughput.serving(body["serving"]["rows"]),
    }
    return {each.key: draw[each.key]() for each in sections(body) if each.picture}, shades
