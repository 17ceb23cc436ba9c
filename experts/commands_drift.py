"""``moe-experts drift``: examine what ``moe-serve --drift-log`` wrote."""

import argparse
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from moe_runtime.experts.drift import REQUESTS_PER_DAY, SHARE, Finding, examine, read_log

DRIFT_FOUND = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Compare the lost mass of a scenario's requests with that of traffic known to be its own, and say "
        f"when it began to hold foreign requests. Exit status {DRIFT_FOUND} when it did."
    )
    parser.add_argument("--log", type=Path, required=True, help="the --drift-log of a server")
    parser.add_argument(
        "--reference",
        type=Path,
        required=True,
        help="such a log of the scenario's own traffic, for example of its test texts: "
        "2000 requests are good, 500 the least",
    )
    parser.add_argument("--scenario", help="examine this one (default: all in the log)")
    parser.add_argument(
        "--share",
        type=float,
        default=SHARE,
        help=f"foreign part of the traffic to look for (default: {SHARE})",
    )
    parser.add_argument(
        "--requests-per-day",
        type=int,
        default=REQUESTS_PER_DAY,
        help=f"less than one false alarm in so many requests (default: {REQUESTS_PER_DAY})",
    )


def run(arguments: argparse.Namespace) -> int:
    """0, or DRIFT_FOUND."""
    findings = examine(
        read_log(arguments.reference, arguments.scenario),
        read_log(arguments.log, arguments.scenario),
        share=arguments.share,
        requests_per_day=arguments.requests_per_day,
    )
    if arguments.json:
        print(json.dumps({"scenarios": [asdict(finding) for finding in findings]}))
    else:
        for finding in findings:
            print(_told(finding))
    return DRIFT_FOUND if any(finding.alarms for finding in findings) else 0


def _told(finding: Finding) -> str:
    lines = [
        f"{finding.scenario}: {finding.num_requests} requests, mean lost mass {finding.mean:.4f} (reference: "
        f"{finding.num_reference} requests, {finding.reference_mean:.4f}); evidence of foreign traffic at "
        f"most {finding.largest_evidence:.2f}, now {finding.evidence:.2f}, alarm above {finding.limit:.2f}"
    ]
    for alarm in finding.alarms:
        when = datetime.fromtimestamp(alarm.time, UTC).isoformat(timespec="seconds")
        lines.append(f"  DRIFT at request {alarm.index + 1} ({when}), since about request {alarm.since + 1}")
    if not finding.alarms:
        lines.append("  no drift")
    return "\n".join(lines)
