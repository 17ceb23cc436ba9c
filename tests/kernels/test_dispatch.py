"""Choosing backends and instruction sets."""

import pytest
import torch
from kernels.process import python

import moe_runtime._C as _C
from moe_runtime.errors import ConfigError, IsaUnavailable, KernelError
from moe_runtime.kernels import OPS, choose, cpu, packing, reference


@pytest.fixture
def isa() -> None:
    """Once is enough: these tests choose instruction sets themselves."""


def test_auto_is_cpu_and_every_operation_has_all_backends() -> None:
    kernels = choose()
    assert kernels.backend == "cpu" and kernels.linear is cpu.linear
    assert all(set(row) == {"cpu", "reference", "triton"} for row in OPS.values())


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


@pytest.mark.parametrize("name", ["AVX2", "sse9"])
def test_an_unknown_forced_isa_fails_at_choose_and_not_at_import(name: str) -> None:
    code = "import moe_runtime.kernels as k; print('imported'); k.choose()"
    result = python(code, MOE_FORCE_ISA=name)
    assert "imported" in result.stdout
    assert f"IsaUnavailable: MOE_FORCE_ISA={name}: unknown, expected one of " in result.stderr
    assert f"; this machine has: {', '.join(_C.supported_isas())}\n" in result.stderr


def test_an_isa_this_machine_lacks_is_refused() -> None:
    missing = {"avx2", "avx512", "avx512bf16", "amx"} - set(_C.supported_isas())
    if not missing:
        pytest.skip("this machine has every instruction set")
    with pytest.raises(IsaUnavailable, match="this machine cannot run it; this machine has: "):
        _C.select_isa(missing.pop())
