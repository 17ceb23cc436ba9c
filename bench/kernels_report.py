"""Rows of bench/kernels.py: one line each as they come, and the JSON file."""

import json
from pathlib import Path
from typing import Any

from common import summary
from kernels_cases import Case
from kernels_limits import Limits
from kernels_workloads import Workload

KEY = ("op", "shape", "format", "tokens", "threads", "isa")


def row(
    case: Case, work: Workload, limits: Limits, seconds: list[float], rivals: dict[str, list[float]]
) -> dict[str, Any]:
    """Everything measured for one case: seconds, bytes and operations per call and second, the roofline."""
    measured = summary(seconds)
    median, bound = measured["median"], limits.bound(work)
    return {
        **dict(
            zip(
                KEY, (case.op, case.layer.name, case.format, case.tokens, case.threads, case.isa), strict=True
            )
        ),
        "seconds": measured,
        "bytes": work.num_bytes,
        "operations": work.operations,
        "gb_per_s": work.num_bytes / median / 1e9,
        "gop_per_s": work.operations / median / 1e9,
        "limits": {
            "read_gb_per_s": limits.bandwidth / 1e9,
            "peak_gop_per_s": limits.peak / 1e9,
            "instruction": limits.instruction,
            "working_set_gb": work.working_set / 1e9,
        },
        "limited_by": limits.limited_by(work),
        "fraction_of_bound": bound / median,
        "rivals": {
            name: {
                "seconds": summary(theirs),
                "ratio": summary([b / a for a, b in zip(seconds, theirs, strict=True)]),
            }
            for name, theirs in rivals.items()
        },
    }


def line(row: dict[str, Any]) -> str:
    """One row as text; below it, indented, how much longer each rival takes."""
    seconds, limits = row["seconds"], row["limits"]
    unit, scale = ("ms", 1e3) if seconds["median"] >= 1e-3 else ("us", 1e6)
    text = (
        f"{row['op']:17} {row['shape']:8} {row['format']:10} {row['tokens']:5} tok "
        f"{row['threads']:2} thr {row['isa']:10} "
        f"{seconds['median'] * scale:8.2f} {unit} ({seconds['q1'] * scale:.2f}-{seconds['q3'] * scale:.2f})"
        f"{row['gb_per_s']:7.1f} of {limits['read_gb_per_s']:.1f} GB/s"
        f"{row['gop_per_s']:8.1f} of {limits['peak_gop_per_s']:.0f} GOP/s {limits['instruction']}"
        f" -> {row['fraction_of_bound']:.0%} of {row['limited_by']}"
    )
    for name, rival in row["rivals"].items():
        ratio, median = rival["ratio"], rival["seconds"]["median"] * scale
        spread = f"{ratio['q1']:.2f}-{ratio['q3']:.2f}"
        text += f"\n    {name}: {median:.2f} {unit}, {ratio['median']:.2f}x ours ({spread})"
    return text


def save(path: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Into ``path``: rows one per line, and the commit and command of each run. Rows of earlier runs on the
    same machine stay unless measured again, so that hours of grid can be run in parts.
    """
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    runs: dict[str, dict[str, str]] = {}
    if path.exists():
        before = json.loads(path.read_text())
        if all(before["machine"][name] == about[name] for name in ("cpu", "cores", "memory_gib")):
            kept, runs = {_key(each): each for each in before["rows"]}, before["runs"]
    runs[about["date"]] = {name: about[name] for name in ("commit", "command")}
    kept |= {_key(each): {**_rounded(each), "run": about["date"]} for each in rows}
    runs = {date: run for date, run in runs.items() if any(each["run"] == date for each in kept.values())}
    head = json.dumps({"machine": about, "runs": runs}, indent=1).removesuffix("\n}")
    lines = ",\n".join(json.dumps(each) for each in kept.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "rows": [\n{lines}\n]}}\n')


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def _rounded(value: Any) -> Any:
    """Floats to five digits: more is noise."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value
