"""The kernel micro-benchmarks run and keep what they measured; how fast, is not a test's business."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPS = {
    "linear_in", "linear_out", "experts", "attention_decode", "norm_rope", "router", "lm_head_sample",
}  # fmt: skip


def bench(results: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "pytest", "bench/kernels.py", "--benchmark-only", "--benchmark-quiet",
        "--working-set", "0.01", "--results", str(results), "--shapes", "olmoe", "--tokens", "1", *arguments,
    ]  # fmt: skip
    # Beside other tests, but not one of their workers: those do not time.
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, env=environment)


def rows(results: Path) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = json.loads(results.read_text())["rows"]
    return kept


@pytest.mark.slow
def test_every_operation_is_measured_beside_its_roofline_and_runs_add_up(tmp_path: Path) -> None:
    results = tmp_path / "kernels.json"
    first = bench(results, "--formats", "bf16")
    assert first.returncode == 0, first.stdout + first.stderr
    assert {row["op"] for row in rows(results)} == OPS
    assert all(math.isfinite(row["fraction_of_bound"]) for row in rows(results))
    second = bench(results, "--formats", "int4-g32", "-k", "linear_out", "--threads", "1", "--compare")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "torch.matmul" in second.stdout
    assert len(rows(results)) == len(OPS) + 1


def test_a_selection_of_nothing_known_is_refused(tmp_path: Path) -> None:
    refused = bench(tmp_path / "kernels.json", "--shapes", "gpt2")
    assert refused.returncode != 0 and "--shapes gpt2: unknown" in refused.stdout
