"""Choosing backends and instruction sets, and the thread pool under awkward callers."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from kernels.oracle import random_experts, random_routing

import moe_runtime._C as _C
from moe_runtime.errors import ConfigError, IsaUnavailable, KernelError
from moe_runtime.kernels import OPS, choose, cpu, packing, reference


@pytest.fixture
def isa() -> None:
    """Once is enough: these tests choose instruction sets themselves."""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_auto_is_cpu_and_every_operation_has_both_backends() -> None:
    kernels = choose()
    assert kernels.backend == "cpu" and kernels.linear is cpu.linear
    assert all(set(row) == {"cpu", "reference"} for row in OPS.values())


def test_packing_follows_the_operation_that_reads_it() -> None:
    kernels = choose("cpu", {"linear": "reference"})
    assert kernels.pack_linear is reference.pack_linear and kernels.pack_expert is packing.pack_expert
    with pytest.raises(KernelError, match="packed as 'rows'"):
        cpu.linear(torch.zeros(1, 4), kernels.pack_linear(torch.zeros(4, 4)))


@pytest.mark.parametrize(
    ("backend", "overrides"),
    [("gpu", {}), ("cpu", {"linear": "gpu"}), ("cpu", {"lin": "cpu"}), ("cpu", {"pack_linear": "cpu"})],
)
def test_unknown_backends_and_operations_are_refused(backend: str, overrides: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        choose(backend, overrides)


def test_a_forced_isa_is_used() -> None:
    for name in _C.supported_isas():
        result = python("import moe_runtime._C as c; print(c.isa())", MOE_FORCE_ISA=name)
        assert result.stdout.strip() == name


@pytest.mark.parametrize("name", ["amx", "AVX2", "sse9"])
def test_an_unknown_forced_isa_fails_at_choose_and_not_at_import(name: str) -> None:
    code = "import moe_runtime.kernels as k; print('imported'); k.choose()"
    result = python(code, MOE_FORCE_ISA=name)
    assert "imported" in result.stdout
    assert (
        f"IsaUnavailable: MOE_FORCE_ISA={name}: unknown, expected avx2, avx512 or avx512bf16" in result.stderr
    )


def test_an_isa_this_machine_lacks_is_refused() -> None:
    missing = {"avx2", "avx512", "avx512bf16"} - set(_C.supported_isas())
    if not missing:
        pytest.skip("this machine has every instruction set")
    with pytest.raises(IsaUnavailable, match="this machine cannot run it, it has"):
        _C.select_isa(missing.pop())


def test_two_python_threads_get_the_same_bits_at_once() -> None:
    moe = random_experts(8, 256, 96, torch.bfloat16)
    x, (ids, weights) = torch.randn(64, 256), random_routing(64, 8, 2)
    expected = cpu.fused_moe(x, ids, weights, moe.packed)

    def work(_: int) -> bool:
        return all(torch.equal(cpu.fused_moe(x, ids, weights, moe.packed), expected) for _ in range(50))

    with ThreadPoolExecutor(3) as executor:
        assert all(executor.map(work, range(3)))


def test_kernels_work_in_a_child_after_fork() -> None:
    code = """
import os, torch
from moe_runtime.kernels import cpu, packing
cpu.set_num_threads(3)
x, packed = torch.randn(50, 512), packing.pack_linear(torch.randn(512, 512))
expected = cpu.linear(x, packed)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(cpu.linear(x, packed), expected) else 1)
print(os.waitpid(child, 0)[1], torch.equal(cpu.linear(x, packed), expected))
"""
    assert python(code).stdout.split() == ["0", "True"]


def test_the_pool_is_no_larger_than_the_affinity_mask_and_obeys_its_variable() -> None:
    code = """
import os
os.sched_setaffinity(0, {next(iter(os.sched_getaffinity(0)))})
import moe_runtime._C as c
print(c.num_threads())
"""
    assert python(code, MOE_NUM_THREADS="").stdout.strip() == "1"
    assert (
        python("import moe_runtime._C as c; print(c.num_threads())", MOE_NUM_THREADS="5").stdout.strip()
        == "5"
    )
