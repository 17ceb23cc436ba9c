"""Does the GPU path work and how fast is it? One call, at most nine minutes, on a bare machine with one GPU.

    python3 bench/gpu.py [--seconds 510] [--sections check moe masks ops decode tests] [--dry-run]

Needs python3, torch, triton, cmake, ninja and pybind11, nothing installed of ours and no network. In order:

1. build   the C++ extension, in the background, while the chip's limits are measured
2. check   experts against float64, several processes at once; they also compile what the rest will run
3. moe     one layer's experts beside the byte floor, the matrix rate and what torch and transformers offer
4. masks   what four scenario masks, mixed over the rows of a batch, cost
5. ops     attention, linear layers, router, norm
6. decode  steps of a whole model: captured and not, with masks and without, beside the bytes they must read
7. tests   those of the kernels, then those of the engine, on the GPU (pytest --device cuda)

Each section has its share of the time that is left when it starts, so that all end in time; each case is in
the file as soon as it is measured. Results: $OUT if that is set, else bench/results/, with date and chip.
``--dry-run`` goes the same way on the CPU, with toy shapes in Triton's interpreter; its times mean nothing.
"""

import argparse
import datetime
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gpu_build
import gpu_process
import gpu_report
from gpu_shapes import GRID, TOY_GRID, Grid

ROOT = gpu_build.ROOT
# Sections and their shares of the time left.
SHARES = {"check": 20.0, "moe": 32.0, "masks": 5.0, "ops": 10.0, "decode": 15.0, "tests": 30.0}
BUILD_SHARE = 0.35
# In this order: a run that is out of time has at least the first of them.
TESTS = (
    "tests/kernels/triton", "tests/test_engine.py", "tests/test_masks.py", "tests/test_subset.py",
    "tests/models/test_independence.py", "tests/models/test_ling.py", "tests/experts/test_forward.py",
    "tests/experts/test_planted.py", "tests/test_batch_independence.py",
)  # fmt: skip
# By a package that a bare machine may lack.
MORE_TESTS = {
    "transformers": ("tests/models/test_parity.py",),
    "openai": ("tests/server/test_real_engine.py", "tests/server/test_scenarios.py"),
}
TOY_TESTS = ("tests/kernels/triton/test_interpreter.py",)


class Bench:
    """One run: its clock, its folder for temporary files, its results so far."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.start = time.monotonic()
        self.grid: Grid = TOY_GRID if options.dry_run else GRID
        self.environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "triton")}
        about = {
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "commit": commit(),
            "command": " ".join(["python3", *sys.argv]),
            "python": platform.python_version(),
            "cores": len(os.sched_getaffinity(0)),
            "chip": {},
        }
        self.result: dict[str, Any] = {"about": about, "rows": []}

    @property
    def left(self) -> float:
        return float(self.options.seconds) - (time.monotonic() - self.start)

    @property
    def path(self) -> Path:
        chip = re.sub(r"[^A-Za-z0-9]+", "-", self.result["about"]["chip"].get("name", "unknown")).strip("-")
        folder = self.options.out or Path(os.environ.get("OUT") or ROOT / "bench" / "results")
        return folder / f"gpu-{datetime.date.today().isoformat()}-{chip}.json"

    def arguments(self) -> tuple[str, ...]:
        """What every worker is told."""
        limits = self.result.get("limits", {"bandwidth": 1.0, "matmul": 1.0})
        told = ["--limits", str(limits["bandwidth"]), str(limits["matmul"])]
        return (*told, "--dry-run") if self.options.dry_run else tuple(told)

    def section(self, name: str, seconds: float, parts: tuple[str, ...] = ("",), at_once: int = 1) -> None:
        print(f"{name}: up to {seconds:.0f} s", flush=True)
        workers = [gpu_process.Worker(name, self.folder, self.arguments(), part) for part in parts]
        deadline = time.monotonic() + seconds
        threads = str(max(self.result["about"]["cores"] // at_once, 1))
        environment = {**self.environment, "OMP_NUM_THREADS": threads}
        rows = gpu_process.run(workers, deadline, environment, at_once)
        self.result["rows"] += rows
        for row in rows:
            if name == "limits" and row["kind"] == "row":
                self.result["limits"] = {limit: row[limit] for limit in ("bandwidth", "matmul")}
                self.result["about"]["chip"] = row["chip"]
        gpu_report.save(self.path, self.result)

    def build_and_limits(self) -> None:
        build = None if self.options.no_build else gpu_build.start_build(self.folder)
        deadline = time.monotonic() + BUILD_SHARE * self.left
        try:
            self.section("limits", BUILD_SHARE * self.left)
            if build is not None:
                build.wait(timeout=max(deadline - time.monotonic(), 1.0))
        except subprocess.TimeoutExpired:
            print("the build of the extension is out of time", flush=True)
        finally:
            if build is not None:
                gpu_process.end(build)
        if build is None:
            return
        site, self.result["extension"] = gpu_build.lay_out(self.folder)
        paths = [str(site), self.environment.get("PYTHONPATH", "")]
        self.environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)

    def tests(self, seconds: float) -> None:
        """pytest's own lines are counted as they come, so that a run out of time still says what it knows."""
        print(f"tests: up to {seconds:.0f} s", flush=True)
        command = [sys.executable, "-m", "pytest", *self.test_options()]
        log = self.folder / "tests.log"
        # Else "-m" would put this folder first, where the package has no extension.
        environment = {**self.environment, "PYTHONSAFEPATH": "1"}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=output, env=environment, start_new_session=True
            )
        try:
            process.wait(timeout=max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            print("the tests are out of time", flush=True)
        finally:
            gpu_process.end(process)
        self.result["tests"] = read_tests(log.read_text(errors="replace"), process.returncode)
        gpu_report.save(self.path, self.result)

    def test_options(self) -> list[str]:
        """Of pytest: everything that computes on the GPU, several processes at once if that can be had."""
        told = ["-vv", "-W", "default", "--tb=line", "--ignore=tests/kernels/triton/test_aot.py"]
        if self.options.dry_run:
            return [*(self.options.tests or TOY_TESTS), *told]
        if importable("xdist"):
            told += ["-n", str(min(8, self.result["about"]["cores"]))]
        more = [path for package, paths in MORE_TESTS.items() if importable(package) for path in paths]
        return [*(self.options.tests or (*TESTS, *more)), *told, "--device", "cuda"]

    def run(self) -> None:
        self.build_and_limits()
        wanted = [name for name in SHARES if name in self.options.sections]
        for place, name in enumerate(wanted):
            seconds = self.left * SHARES[name] / sum(SHARES[each] for each in wanted[place:])
            if name == "tests":
                self.tests(seconds)
            elif name == "check":
                parts = tuple(f"{layer.name} {each}" for layer, each in self.grid.cases())
                self.section(name, seconds, parts, min(8, max(self.result["about"]["cores"] // 2, 1)))
            else:
                self.section(name, seconds)


def read_tests(log: str, exit_code: int) -> dict[str, Any]:
    """pytest -vv, with or without xdist: "path::test PASSED" or "[gw0] [ 1%] PASSED path::test"."""
    counts = {
        name.lower(): len(re.findall(rf"(?:::.* {name}\b|\b{name} [^ ]*::)", log))
        for name in ("PASSED", "FAILED", "SKIPPED", "ERROR")
    }
    summary = re.search(r"^=+ (.*\b(?:passed|failed|error).* in .*) =+$", log, re.MULTILINE)
    failures = sorted(set(re.findall(r"^(?:FAILED|ERROR) (\S+(?: - .{0,120})?)", log, re.MULTILINE)))
    return {
        "passed": counts["passed"],
        "failed": len(failures) or counts["failed"] + counts["error"],
        "skipped": counts["skipped"],
        "complete": summary is not None,
        "exit_code": exit_code,
        "failures": failures[:50],
        "end": "" if summary else log[-500:],
    }


def importable(name: str) -> bool:
    command = [sys.executable, "-c", f"import {name}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def commit() -> str:
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True, cwd=ROOT
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=510.0, help="for everything (default: 510)")
    parser.add_argument("--sections", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--tests", nargs="+", help="what pytest is given")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--no-build", action="store_true", help="moe_runtime is already importable")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, to see that the script works")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is measured is written
    with tempfile.TemporaryDirectory(prefix="gpu-bench-") as folder:
        bench = Bench(options, Path(folder))
        try:
            bench.run()
        finally:
            gpu_report.save(bench.path, bench.result)
            print(gpu_report.table(bench.result))
            print(f"written to {bench.path}")
    return int(gpu_report.failed(bench.result))


if __name__ == "__main__":
    sys.exit(main())
