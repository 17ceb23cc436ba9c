"""Every kernel compiles for every chip, spills no register where that is promised, and fits its memory.

Seen without a GPU, in processes of their own, because this one may define kernels for the interpreter.
"""

import ast
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moe_runtime.kernels.triton import aot

ROOT = Path(__file__).resolve().parents[3]
KERNEL_FILES = sorted((ROOT / "moe_runtime" / "kernels" / "triton").glob("*.py"))
# Beside each kernel's first case on every chip: those nearest to a chip's limits in the whole table, which
# `make aot` compiles in twenty minutes (bench/results/aot-*.json), one of each kind of weights among them.
TIGHT = {
    "sm_80": (
        "_linear_kernel int4-g64 64x64",
        "_gate_up_few_kernel int4-g64 64x32",
        "_down_kernel int4-g64z 64x64",
        "_route_tokens_kernel route_tokens-bf16-metered-deepseek_v2",
        "_route_tokens_kernel route_tokens-bf16-recovering-largest",
        "attention_kernel deepseek_v2 prefill int8",
    ),
    "sm_90": (
        "_down_kernel int8 128x128",
        "_down_kernel float8-g128 64x128",
        "attention_kernel mixtral mixed bfloat16",
    ),
    "sm_100": ("_gate_up_kernel int4-g32 64x128",),
    "gfx942": ("_gate_up_kernel bfloat16 128x128", "_gate_up_kernel int8 128x128"),
}

TOY = """
import os

import triton
import triton.language as tl

from moe_runtime.kernels.triton.aot_case import AotCase


@triton.jit
def product(a, b, out, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :], tl.arange(0, BK)
    total = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, K, BK):
        x, y = tl.load(a + m * K + start + k[None, :]), tl.load(b + n * K + start + k[:, None])
        total = tl.dot(x, y, total)
    tl.store(out + m * BN + n, total)


@triton.jit
def broken(a, BM: tl.constexpr):
    tl.store(a + tl.arange(0, BM), tl.load(a + tl.arange(0, 2 * BM)))


class Crash:
    __name__ = "crash"
    arg_names = []
    cache_key = property(lambda self: os.abort())


def case(name, bm, bn, bk, warps, stages):
    types = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "K": "i32"}
    sizes = {"BM": bm, "BN": bn, "BK": bk}
    signature = types | dict.fromkeys(sizes, "constexpr")
    return AotCase(name, product, signature, sizes, warps, stages, ("a", "b", "out", "K"))


AOT_CASES = (
    case("good", 16, 64, 64, 4, 2),
    case("large", 64, 256, 128, 8, 4),
    case("crowded", 128, 64, 32, 1, 2),
    AotCase("broken", broken, {"a": "*fp32", "BM": "constexpr"}, {"BM": 16}, 4, 2),
    AotCase("crash", Crash(), {}, {}, 4, 2),
    AotCase("unnamed", broken, {"BM": "constexpr"}, {"BM": 16}, 4, 2),
)
"""


def compile_ahead(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(folder), **variables}
    command = [sys.executable, "-m", aot.__name__, "--json", str(folder / "aot.json"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def table(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "aot.json").read_text())["rows"]
    return rows


@pytest.mark.slow
def test_every_kernel_compiles_for_every_chip(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    result = compile_ahead(tmp_path, "--spread", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = table(tmp_path)
    assert {row["target"] for row in rows} == set(aot.TARGETS)
    assert launched_kernels() - {(row["kernels"], row["kernel"]) for row in rows} == set(), (
        "without an AotCase"
    )
    check_rows(rows)


@pytest.mark.slow
@pytest.mark.parametrize("target", TIGHT)
def test_the_cases_nearest_to_the_limits_stay_within_them(tmp_path: Path, target: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    pattern = "^(" + "|".join(re.escape(name) for name in TIGHT[target]) + ")$"
    result = compile_ahead(tmp_path, "--targets", target, "--cases", pattern)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(table(tmp_path)) == len(TIGHT[target]), "a case is called otherwise now"
    check_rows(table(tmp_path))


def check_rows(rows: list[dict[str, Any]]) -> None:
    assert all(row["registers"] > 0 and row["verdict"] == "ok" for row in rows)


def launched_kernels() -> set[tuple[str, str]]:
    """File and name of every kernel that a wrapper starts: ``kernel[grid](...)``."""
    found = set()
    for path in KERNEL_FILES:
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        kernels = {
            node.name
            for node in nodes
            if isinstance(node, ast.FunctionDef)
            and any(ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list)
        }
        calls = [
            node.func.value
            for node in nodes
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)
        ]
        found |= {(path.stem, call.id) for call in calls if isinstance(call, ast.Name) and call.id in kernels}
    return found


@pytest.mark.slow
def test_what_goes_wrong_is_in_the_table_and_fails_it(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    (tmp_path / "toy_kernels.py").write_text(TOY)
    result = compile_ahead(tmp_path, "--kernels", "toy_kernels", "--targets", "sm_80", "gfx942")
    assert result.returncode == 1, result.stdout + result.stderr
    verdicts = {(row["case"], row["target"]): row["verdict"] for row in table(tmp_path)}
    assert verdicts["good", "sm_80"] == verdicts["good", "gfx942"] == verdicts["crowded", "gfx942"] == "ok"
    assert verdicts["crowded", "sm_80"] == "spills registers"
    assert verdicts["large", "sm_80"] == "shared memory above 166912"
    assert verdicts["large", "gfx942"] == "shared memory above 65536"
    assert verdicts["crash", "sm_80"] == "the compiler died with exit code -6"
    assert "CompilationError" in verdicts["broken", "sm_80"]
    assert "does not name the arguments ['a', 'BM']" in verdicts["unnamed", "sm_80"]


def test_kernels_defined_for_the_interpreter_are_refused(tmp_path: Path) -> None:
    result = compile_ahead(tmp_path, TRITON_INTERPRET="1")
    assert result.returncode == 2 and "TRITON_INTERPRET is set" in result.stderr


def test_a_row_fails_by_its_own_chips_limits() -> None:
    row = aot.Row("file", "kernel", "case", "sm_90", 4, 3, registers=64, shared=232448)
    assert row.verdict == "ok"
    assert replace(row, shared=232449).verdict == "shared memory above 232448"
    assert replace(row, target="sm_80", shared=166913).verdict == "shared memory above 166912"
    assert replace(row, target="gfx942").verdict == "shared memory above 65536"
    assert replace(row, spill_loads=4).verdict == "spills registers"
    assert replace(row, target="sm_100", tensor_memory=513).verdict == "tensor memory above 512"
    assert replace(row, error=aot.TRAP).verdict == "compiled to a trap"
    both = replace(row, spill_stores=4, shared=232449)
    assert both.verdict == "spills registers; shared memory above 232448"
    assert replace(row, target="sm_100", spill_loads=4).verdict == "ok"


def test_a_part_of_the_cases_is_spread_over_them() -> None:
    assert aot._evenly(10, None) == list(range(10)) and aot._evenly(2, 3) == [0, 1]
    assert aot._evenly(9, 3) == [0, 4, 8] and aot._evenly(9, 1) == [0]


def test_the_assemblers_logs_are_read() -> None:
    ptxas = (
        "ptxas info : Function properties for k\n"
        "    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info : Used 64 registers, used 1 barriers"
    )
    assert aot.parse_ptxas(ptxas) == {"registers": 64, "spill_stores": 4, "spill_loads": 12}
    hip = ".vgpr_count:     66\n.vgpr_spill_count: 3\n"
    assert aot.parse_hip(hip) == {"registers": 66, "spill_stores": 3, "spill_loads": 3}
    with pytest.raises(ValueError, match="said nothing of registers"):
        aot.parse_ptxas("")
