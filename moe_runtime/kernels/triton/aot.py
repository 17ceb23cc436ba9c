"""Compiles every kernel for every target ahead of time, without a GPU: ``make aot`` writes the table.

    python -m moe_runtime.kernels.triton.aot [--targets sm_90] [--kernels linear] [--cases int4] [--json FILE]

A kernel file lists what it wants compiled as ``AOT_CASES`` (aot_case.py). One row per case and target:
registers per thread, bytes spilled, shared memory per program. The exit code is 1 if a case does not compile,
spills registers on sm_80 or sm_90, or asks for more memory on the chip than one program may have there.

Knows no kernel. Each compilation runs in a process of its own, because a compiler that meets an assertion of
its own takes the process with it. Nothing is read from or left in Triton's cache: the numbers are in the
assembler's log, which a cache hit does not write.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import pkgutil
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

from moe_runtime.kernels.triton.aot_case import AotCase

PACKAGE = "moe_runtime.kernels.triton"
TENSOR_MEMORY_LIMIT = 512
# Triton compiles a kernel that it has no tensor memory for without complaint, to a single instruction.
TRAP = "compiled to a trap"


@dataclass(frozen=True)
class Target:
    """A chip: what Triton calls it, and the shared memory in bytes that one program may have there."""

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    may_spill: bool


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "sm_80": Target("cuda", 80, 32, 166912, may_spill=False),
        "sm_90": Target("cuda", 90, 32, 232448, may_spill=False),
        "sm_100": Target("cuda", 100, 32, 232448, may_spill=True),
        "gfx942": Target("hip", "gfx942", 64, 65536, may_spill=True),
    }
)


@dataclass(frozen=True)
class Job:
    kernels: str  # the kernel file, as a module's name
    case: AotCase
    target: str


@dataclass(frozen=True)
class Row:
    """``spill_stores`` and ``spill_loads`` are bytes per thread (on gfx942 registers). ``error`` is empty for
    a case that compiled.
    """

    kernels: str
    kernel: str
    case: str
    target: str
    num_warps: int
    num_stages: int
    registers: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    shared: int = 0
    tensor_memory: int = 0  # columns of Blackwell's
    seconds: float = 0.0
    error: str = ""

    @property
    def verdict(self) -> str:
        """ "ok", or why this row fails the table."""
        target = TARGETS[self.target]
        faults = [self.error] if self.error else []
        if (self.spill_stores or self.spill_loads) and not target.may_spill:
            faults.append("spills registers")
        if self.shared > target.shared_limit:
            faults.append(f"shared memory above {target.shared_limit}")
        if self.tensor_memory > TENSOR_MEMORY_LIMIT:
            faults.append(f"tensor memory above {TENSOR_MEMORY_LIMIT}")
        return "; ".join(faults) or "ok"


def find_cases(
    names: Sequence[str], spread: int | None = None, pattern: str = ""
) -> list[tuple[str, AotCase]]:
    """The cases of these modules (default: all kernel files), each with its module, whose kernel and name
    match ``pattern``; of each kernel only ``spread`` of them, the first and the last and evenly between.
    """
    package = importlib.import_module(PACKAGE)
    if not names:
        found = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
        names = [name for name in found if name not in ("aot", "aot_case")]
    cases: list[tuple[str, AotCase]] = []
    for name in names:
        ours = importlib.util.find_spec(f"{PACKAGE}.{name}") is not None
        module = importlib.import_module(f"{PACKAGE}.{name}" if ours else name)
        by_kernel: dict[Any, list[AotCase]] = {}
        for case in getattr(module, "AOT_CASES", ()):
            if re.search(pattern, f"{_kernel_name(case)} {case.name}"):
                by_kernel.setdefault(case.kernel, []).append(case)
        for listed in by_kernel.values():
            cases += [(name, listed[place]) for place in _evenly(len(listed), spread)]
    return cases


def _evenly(count: int, wanted: int | None) -> list[int]:
    """``wanted`` of 0 to ``count`` - 1, ends included; all if there are no more or no number is given."""
    if wanted is None or count <= wanted:
        return list(range(count))
    return [round(place * (count - 1) / max(wanted - 1, 1)) for place in range(wanted)]


def compile_one(job: Job) -> Row:
    """Compiles in this process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case, target = job.case, TARGETS[job.target]
    row = _row(job)
    if isinstance(case.kernel, triton.runtime.JITFunction) and list(case.signature) != case.kernel.arg_names:
        return replace(row, error=f"the signature does not name the arguments {case.kernel.arg_names}")
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(case.signature)
        if name in case.aligned
    }
    source = ASTSource(case.kernel, case.signature, case.constexprs, attributes)
    options = {"num_warps": row.num_warps, "num_stages": row.num_stages}
    if case.max_registers and target.backend == "cuda":
        options["maxnreg"] = case.max_registers
    log = io.StringIO()
    start = time.perf_counter()
    with contextlib.redirect_stdout(log):
        compiled = triton.compile(
            source, target=GPUTarget(target.backend, target.arch, target.warp_size), options=options
        )
    seconds = round(time.perf_counter() - start, 2)
    assembly = compiled.asm["amdgcn" if target.backend == "hip" else "ptx"]
    usage: dict[str, Any] = parse_hip(assembly) if target.backend == "hip" else parse_ptxas(log.getvalue())
    columns = int(getattr(compiled.metadata, "tmem_size", None) or 0)
    return replace(
        row,
        shared=int(compiled.metadata.shared),
        tensor_memory=columns,
        seconds=seconds,
        error=TRAP if re.search(r"^\s*(s_)?trap\b", assembly, re.MULTILINE) else "",
        **usage,
    )


def parse_ptxas(log: str) -> dict[str, int]:
    """Registers and spilled bytes per thread from ``ptxas -v``; the worst of several functions."""
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    stores = [int(count) for count in re.findall(r"(\d+) bytes spill stores", log)]
    loads = [int(count) for count in re.findall(r"(\d+) bytes spill loads", log)]
    if not registers or not stores or not loads:
        raise ValueError(f"ptxas said nothing of registers and spills: {log[-500:]!r}")
    return {"registers": max(registers), "spill_stores": max(stores), "spill_loads": max(loads)}


def parse_hip(assembly: str) -> dict[str, int]:
    """Registers per lane, and how many of them live in memory, from the metadata below the assembly."""

    def count(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        if found is None:
            raise ValueError(f"no .{name} in the assembly")
        return int(found.group(1))

    spilled = count("vgpr_spill_count")
    return {"registers": count("vgpr_count"), "spill_stores": spilled, "spill_loads": spilled}


def compile_all(jobs: Iterable[Job], workers: int) -> Iterator[Row]:
    """Rows as they come. ``workers`` processes at a time, each forked for one job: the modules are loaded."""
    context = multiprocessing.get_context("fork")
    waiting = list(jobs)[::-1]
    running: dict[Any, tuple[Any, Job]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            job = waiting.pop()
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(writer, job))
            process.start()
            writer.close()
            running[reader] = (process, job)
        heard = connection.wait(list(running))
        for reader in [each for each in running if each in heard]:
            process, job = running.pop(reader)
            try:
                row: Row | None = reader.recv()
            except EOFError:
                row = None
            process.join()
            reader.close()
            yield row or replace(_row(job), error=f"the compiler died with exit code {process.exitcode}")


def _row(job: Job) -> Row:
    case = job.case
    is_amd = TARGETS[job.target].backend == "hip"
    warps = (is_amd and case.hip_warps) or case.num_warps
    return Row(job.kernels, _kernel_name(case), case.name, job.target, warps, case.num_stages)


def _kernel_name(case: AotCase) -> str:
    return str(getattr(case.kernel, "__name__", case.kernel))


def _child(writer: Any, job: Job) -> None:
    try:
        row = compile_one(job)
    except Exception as error:  # noqa: BLE001 (whatever it is belongs in the table)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        row = replace(_row(job), error=f"{type(error).__name__}: {' '.join(lines[-3:])[-300:]}")
    writer.send(row)


def line(row: Row) -> str:
    return (
        f"{row.kernel:32} {row.case:36} {row.target:7} {row.num_warps:2} x {row.num_stages} "
        f"{row.registers:5} {row.spill_stores:6} {row.spill_loads:6} {row.shared:7} "
        f"{row.seconds:6.1f}  {row.verdict}"
    )


HEADER = (
    f"{'kernel':32} {'case':36} {'target':7} {'w x s':6} {'regs':>5} {'stores':>6} {'loads':>6} "
    f"{'shared':>7} {'sec':>6}  verdict"
)


def save(path: Path, rows: Sequence[Row]) -> None:
    import triton

    table = [{**asdict(row), "verdict": row.verdict} for row in rows]
    lines = ",\n".join(json.dumps(each) for each in table)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n', encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="compile every kernel for every target, without a GPU")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument(
        "--kernels", nargs="+", default=[], help="kernel files, or other modules (default: all)"
    )
    parser.add_argument(
        "--spread", type=int, help="only so many of each kernel's cases, evenly over its list"
    )
    parser.add_argument("--cases", default="", help="only those whose kernel and name match this expression")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write the table here too")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: kernels would be defined for the interpreter, unset it")
    os.environ.update(TRITON_DUMP_PTXAS_LOG="1", TRITON_ALWAYS_COMPILE="1")
    cases = find_cases(options.kernels, options.spread, options.cases)
    jobs = [Job(name, case, target) for name, case in cases for target in options.targets]
    rows = []
    print(HEADER)
    with tempfile.TemporaryDirectory() as cache:
        os.environ.setdefault("TRITON_CACHE_DIR", cache)
        for row in compile_all(jobs, options.workers):
            print(line(row), flush=True)
            rows.append(row)
    failed = sum(row.verdict != "ok" for row in rows)
    print(f"{len(rows)} compiled, {failed} failed")
    if options.json:
        order = {(job.kernels, job.case.name, job.target): place for place, job in enumerate(jobs)}
        save(options.json, sorted(rows, key=lambda row: order[row.kernels, row.case, row.target]))
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
