"""What every benchmark says about itself: machine, commit, command; and where its JSON goes."""

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
    """The facts a reader needs to judge a number: processor, cores, memory, library versions, commit."""
    import torch

    cpu = "unknown"
    flags: set[str] = set()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
        elif line.startswith("flags"):
            flags = set(line.partition(":")[2].split())
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
    return {
        "cpu": cpu,
        "isa": [flag for flag in wanted if flag in flags],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *map(_without_folders, sys.argv)]),
    }


def _without_folders(argument: str) -> str:
    """Result files are read elsewhere: of this machine's absolute paths they keep the last name."""
    return re.sub(r"(?<!\S)/(?:\S*/)?(?=\S)", "", argument)


def _commit() -> str:
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            cwd=RESULTS.parent,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()


def summary(samples: list[float]) -> dict[str, float]:
    """Median and the two quartiles: the spread a shared machine gives."""
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return {"median": statistics.median(samples), "q1": quartiles[0], "q3": quartiles[2], "n": len(samples)}


def result_path(name: str) -> Path:
    """The day's JSON file of a question under bench/results/."""
    return RESULTS / f"{name}-{datetime.date.today().isoformat()}.json"


def save(name: str, result: dict[str, Any]) -> Path:
    """Write one JSON file under bench/results/, named after the question and the day."""
    RESULTS.mkdir(exist_ok=True)
    path = result_path(name)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
