"""The results of bench/gpu.py as a table for people and a file for later."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def save(path: Path, result: dict[str, Any]) -> None:
    """Rows one per line. Written anew after every section: a run that is cut off has kept what it had."""
    head = {name: value for name, value in result.items() if name != "rows"}
    lines = ",\n".join(json.dumps(_rounded(row)) for row in result["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(head), indent=1).removesuffix("\n}") + f',\n "rows": [\n{lines}\n]}}\n'
    draft = path.with_suffix(".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)


def table(result: dict[str, Any]) -> str:
    """Short enough to be the end of a log."""
    rows = [row for row in result["rows"] if row["kind"] == "row"]
    lines = [f"{result['about']['chip'].get('name', 'unknown')}, {result['about']['date']}"]
    limits = result.get("limits")
    if limits:
        bandwidth, matmul = limits["bandwidth"] / 1e9, limits["matmul"] / 1e12
        lines.append(f"limits: copy {bandwidth:.0f} GB/s, bf16 matmul {matmul:.0f} TFLOP/s")
    lines.append(f"extension: {result.get('extension', 'as installed')}")
    lines.append(f"tests: {_tests(result.get('tests'))}")
    lines += _checks([row for row in rows if row["section"] == "check"])
    lines += [_moe(row) for row in rows if row["section"] == "moe"]
    lines += [_masks(row) for row in rows if row["section"] == "masks"]
    lines += [_op(row) for row in rows if row["section"] == "ops"]
    lines += [_decode(row) for row in rows if row["section"] == "decode"]
    lines += _targets(rows)
    for row in result["rows"]:
        if row["kind"] in ("error", "late"):
            what = row.get("error", "no time left")
            about = row.get("about") or row.get("part", "")
            lines.append(f"! {row['section']} {about}: {what[:160]}")
    return "\n".join(lines)


def failed(result: dict[str, Any]) -> bool:
    """Whether anything is wrong; slowness is not."""
    tests = result.get("tests") or {}
    verdicts = [row["passed"] for row in result["rows"] if "passed" in row]
    broken = any(row["kind"] == "error" for row in result["rows"])
    return broken or not verdicts or not all(verdicts) or bool(tests.get("failed"))


def _tests(tests: dict[str, Any] | None) -> str:
    if not tests:
        return "not run"
    text = f"{tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped"
    if not tests["complete"]:
        text += " (out of time)"
    return "\n  ".join([text, *tests["failures"][:10]])


def _checks(rows: list[dict[str, Any]]) -> list[str]:
    if not rows:
        return ["checks: none"]
    bad = [row for row in rows if not row["passed"]]
    worst = max(row["error"] for row in rows)
    lines = [f"checks: {len(rows) - len(bad)} of {len(rows)} passed, largest error {worst:.1e}"]
    for row in bad:
        wrong = [name for name, value in row.items() if value is False and name != "passed"]
        lines.append(f"  FAILED {_case(row)}: error {row['error']:.1e} {' '.join(wrong)}")
    return lines


def _case(row: dict[str, Any]) -> str:
    name = row.get("layer") or f"{row['op']} {row['shape']}"
    return (
        f"{name:28} {row['format']:7} {row['tokens']:5}"
        if "op" in row
        else (f"{name:9} {row['format']:5} {row['tokens']:5}")
    )


def _time(timing: dict[str, Any]) -> str:
    return f"{timing['median'] * 1e6:9.1f} us{' ' if timing['graph'] else '*'}"


def _moe(row: dict[str, Any]) -> str:
    text = (
        f"{_case(row)} {_time(row['seconds'])} {row['of_byte_floor']:5.0%} bytes "
        f"{row['of_matmul_rate']:5.0%} matmul"
    )
    return text + _rival(row) + _missed(row)


def _rival(row: dict[str, Any]) -> str:
    if "ratio_to_best_peer" not in row:
        return ""
    timed = {name: peer["seconds"]["median"] for name, peer in row["peers"].items() if "seconds" in peer}
    best = min(timed, key=timed.__getitem__) if timed else "bf16 torch"
    return f" {row['ratio_to_best_peer']:6.2f}x {best}"


def _missed(row: dict[str, Any]) -> str:
    return "" if all(row.get("targets", {}).values()) else "  MISSED"


def _masks(row: dict[str, Any]) -> str:
    same = "" if row["same_result"] else " OTHER RESULT"
    return f"masks {_case(row)} {_time(row['seconds'])} cost {row['cost']:+.1%}{same}{_missed(row)}"


def _decode(row: dict[str, Any]) -> str:
    same = "" if row["same_result"] else " OTHER RESULT"
    return (
        f"step {_case(row)} {_time(row['seconds'])} {row['of_byte_floor']:5.0%} bytes, launched "
        f"{_time(row['launched'])} {row['launched_of_byte_floor']:5.0%}, masks {row['cost']:+.1%}, "
        f"{row['layers']} layers{same}{_missed(row)}"
    )


def _op(row: dict[str, Any]) -> str:
    error = "" if row["error"] is None else f" error {row['error']:.0e}{'' if row['passed'] else ' FAILED'}"
    text = f"{_case(row)} {_time(row['seconds'])} {row['of_floor']:5.0%} of floor{error}"
    return text + _rival(row) + _missed(row)


def _targets(rows: Iterable[dict[str, Any]]) -> list[str]:
    met: dict[str, list[bool]] = {}
    for row in rows:
        for name, value in row.get("targets", {}).items():
            met.setdefault(name, []).append(value)
    return [f"target {name}: met in {sum(each)} of {len(each)}" for name, each in met.items()]


def _rounded(value: Any) -> Any:
    """Floats to five digits: more is noise. JSON has no infinity and no NaN."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if abs(value) < 1e300 else str(value)
    return value
