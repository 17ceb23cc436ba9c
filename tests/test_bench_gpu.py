"""bench/gpu.py goes its whole way on the CPU; how fast a GPU is, no test here can know."""

import argparse
import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"


@pytest.fixture(autouse=True)
def _bench_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.mark.slow
def test_a_dry_run_fills_every_section_in_time(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    command = [
        sys.executable, str(BENCH / "gpu.py"), "--dry-run", "--no-build", "--seconds", "400",
        "--out", str(tmp_path),
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    (file,) = tmp_path.glob("gpu-*.json")
    result = json.loads(file.read_text())
    sections = {"limits", "check", "moe", "masks", "ops", "decode"}
    assert {row["section"] for row in result["rows"]} == sections
    assert {row["kind"] for row in result["rows"]} == {"row"}
    assert result["tests"]["complete"] and result["tests"]["passed"] > 0
    bf16 = [row for row in result["rows"] if row["section"] == "moe" and row["format"] == "bf16"]
    peers = {name for row in bf16 for name, peer in row["peers"].items() if "seconds" in peer}
    assert {"torch loop over experts", "torch._grouped_mm"} <= peers
    assert all(row["ratio_to_best_peer"] > 0 for row in bf16)
    assert "checks: 6 of 6 passed" in run.stdout


# Stands in for gpu_worker.py: four cases, of which the second kills the process and the third hangs.
FAULTY_WORKER = """
import json, os, sys, time
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
with open(options["--json"], "a") as file:
    def say(**line):
        file.write(json.dumps(line) + "\\n")
        file.flush()
    for case in range(int(options["--start"]), 4):
        say(kind="begin", case=case)
        if case == 1:
            print("a fault", flush=True)
            os.abort()
        if case == 2:
            time.sleep(60)
        say(kind="row", case=case)
    say(kind="end")
"""


def test_a_case_that_kills_or_hangs_its_process_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_process = import_module("gpu_process")
    (tmp_path / "gpu_worker.py").write_text(FAULTY_WORKER)
    monkeypatch.setattr(gpu_process, "BENCH", tmp_path)
    monkeypatch.setattr(gpu_process, "SILENT", 3.0)
    workers = [gpu_process.Worker("moe", tmp_path, part=part) for part in ("one", "two")]
    rows = gpu_process.run(workers, time.monotonic() + 50, dict(os.environ), at_once=2)
    for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
        assert [row["case"] for row in part if row["kind"] == "row"] == [0, 3]
        errors = [row["error"] for row in part if row["kind"] == "error"]
        assert "a fault" in errors[0] and errors[1] == "silent for 3 s"


def test_a_worker_that_is_late_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_process = import_module("gpu_process")
    (tmp_path / "gpu_worker.py").write_text(FAULTY_WORKER)
    monkeypatch.setattr(gpu_process, "BENCH", tmp_path)
    monkeypatch.setattr(gpu_process, "GRACE", 0.5)
    worker = gpu_process.Worker("moe", tmp_path, start=2)
    rows = gpu_process.run([worker], time.monotonic() + 1, dict(os.environ))
    assert [(row["kind"], row["error"]) for row in rows] == [("error", "out of time")]


def test_the_tests_of_the_engine_run_on_the_gpu_as_far_as_the_machine_has_their_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = import_module("gpu")
    monkeypatch.setattr(gpu, "importable", lambda name: name in ("xdist", "openai"))
    options = argparse.Namespace(dry_run=False, tests=None, seconds=1.0, out=None)
    told = gpu.Bench(options, tmp_path).test_options()
    paths = [word for word in told if word.startswith("tests/")]
    assert all((ROOT / path).exists() for path in paths)
    assert paths[0] == "tests/kernels/triton" and "tests/test_batch_independence.py" in paths
    assert "tests/server/test_real_engine.py" in paths and "tests/models/test_parity.py" not in paths
    assert told[told.index("--device") + 1] == "cuda" and "-n" in told
    options.tests = ["tests/one.py"]
    assert gpu.Bench(options, tmp_path).test_options()[0] == "tests/one.py"


def test_pytests_lines_are_counted_with_and_without_workers() -> None:
    read_tests = import_module("gpu").read_tests
    plain = (
        "tests/a.py::test_one PASSED [ 25%]\ntests/a.py::test_two[1-PASSED] FAILED [ 50%]\n"
        "tests/a.py::test_three SKIPPED (no GPU) [ 75%]\n"
        "FAILED tests/a.py::test_two[1-PASSED] - assert 0\n==== 1 failed, 1 passed, 1 skipped in 0.1s ====\n"
    )
    spread = (
        "[gw0] [ 50%] PASSED tests/a.py::test_one \n[gw1] [100%] FAILED tests/a.py::test_two \n"
        "[gw1] [ 50%] SKIPPED tests/a.py::test_three \n"
    )
    whole, cut = read_tests(plain, 1), read_tests(spread, -9)
    for counts in (whole, cut):
        assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 1, 1)
    assert whole["complete"] and not cut["complete"]
    assert whole["failures"] == ["tests/a.py::test_two[1-PASSED] - assert 0"]


def test_the_package_is_laid_out_for_a_machine_without_pip(tmp_path: Path) -> None:
    site, extension = import_module("gpu_build").lay_out(tmp_path)
    assert extension.startswith("not built")
    code = (
        "from importlib.util import find_spec\n"
        "import moe_runtime._C as _C\n"
        "assert find_spec('moe_runtime.experts') and find_spec('moe_runtime.server')\n"
        "assert _C.supported_isas() == []\n"
        "_C.linear()"
    )
    # -P, -S: with neither this folder nor this environment's own installation of the package.
    run = subprocess.run(
        [sys.executable, "-PS", "-c", code],
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert "the C++ extension could not be built on this machine: no linear" in run.stderr


def test_the_shapes_are_those_of_the_published_models() -> None:
    layers = import_module("gpu_shapes").LAYERS
    millions = {name: round(layer.operations(1) / 1e6, 1) for name, layer in layers.items()}
    assert millions == {"qwen3": 75.5, "olmoe": 100.7, "deepseek": 138.4, "mixtral": 704.6}


def test_weights_are_gone_round_until_the_cache_has_lost_them() -> None:
    gpu_clock = import_module("gpu_clock")
    clock = gpu_clock.DryClock()
    clock.l2_bytes = 60 << 20
    clock.most_sets = 16
    assert gpu_clock.sets_needed(clock, 75.5e6) == 3
    assert gpu_clock.sets_needed(clock, 20e6) == 8
    assert gpu_clock.sets_needed(clock, 1e9) == 2
    assert gpu_clock.sets_needed(clock, 1e6) == 16


def row(**fields: Any) -> dict[str, Any]:
    timing = {"median": 2e-5, "q1": 2e-5, "q3": 2e-5, "samples": 9, "graph": True}
    peers = {"torch._grouped_mm": {"seconds": {**timing, "median": 5e-5}}, "other": {"absent": "why"}}
    return {
        "kind": "row", "section": "moe", "layer": "qwen3", "format": "bf16", "tokens": 1, "seconds": timing,
        "of_byte_floor": 0.75, "of_matmul_rate": 0.01, "peers": peers, "ratio_to_best_peer": 2.5,
        "targets": {"fast": True}, **fields,
    }  # fmt: skip


def test_the_table_shows_what_was_met_missed_wrong_and_not_reached(tmp_path: Path) -> None:
    report = import_module("gpu_report")
    check = {"section": "check", "error": 2e-3, "same_alone": True, "passed": True, "targets": {}}
    rows = [
        row(**check), row(), row(tokens=2, targets={"fast": False}),
        {"kind": "late", "section": "ops", "about": {"op": "linear"}},
    ]  # fmt: skip
    result = {"about": {"chip": {"name": "H100"}, "date": "today"}, "rows": rows}
    table = report.table(result)
    assert "qwen3     bf16      1      20.0 us    75% bytes    1% matmul   2.50x torch._grouped_mm" in table
    assert table.count("MISSED") == 1 and "target fast: met in 1 of 2" in table
    assert "no time left" in table and not report.failed(result)
    result["rows"].append(row(**check | {"same_alone": False, "passed": False}))
    assert report.failed(result) and "FAILED qwen3     bf16      1: error 2.0e-03 same_alone" in report.table(
        result
    )
    result["rows"][-1]["error"] = float("inf")
    report.save(tmp_path / "gpu.json", result)
    assert json.loads((tmp_path / "gpu.json").read_text())["rows"][-1]["error"] == "inf"
