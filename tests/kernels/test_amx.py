"""The AMX kernels, on any machine with AVX-512 BF16.

Where the processor has no AMX, the kernel tests run once more in a process whose AMX instructions are
executed by amx_emulator.c. Where it has, they run natively in their own files.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernels.amx_machine import HERE, amx_environment
from kernels.oracle import random_experts, random_routing
from kernels.test_integers import INT8, moe_of, random_codes

import moe_runtime._C as _C
from moe_runtime.kernels import WeightFormat, cpu, packing

HAS_AMX = "amx" in _C.supported_isas()
FILES = ("test_amx.py", "test_amx_instructions.py", "test_linear.py", "test_fused_moe.py", "test_integers.py")
# What these formats' kernels do on AMX is what they do on AVX-512, and the other tests have seen it there.
CHOSEN = "amx and not torch.float32 and not torch.float16"

needs_amx = pytest.mark.skipif(
    not HAS_AMX, reason="runs in the process of the first test here, under its emulator"
)
FORMATS = (torch.bfloat16, INT8, WeightFormat("int4", 32), WeightFormat("int4", 128, True))
ROWS = (1, 2, 15, 16, 17, 31, 32, 33, 47, 96, 97, 193)


@pytest.fixture
def isa() -> None:
    """These tests are about AMX alone."""


@pytest.fixture
def amx() -> Iterator[None]:
    before = _C.isa()
    _C.select_isa("amx")
    yield
    _C.select_isa(before)


@pytest.mark.skipif(HAS_AMX, reason="this processor has AMX: the tests of this folder ran natively")
def test_the_kernel_tests_pass_under_the_emulator(tmp_path: Path) -> None:
    # faulthandler would take the emulator's place as the handler of SIGILL.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:faulthandler", "-p", "no:cacheprovider"]
    command += ["--basetemp", str(tmp_path / "tests"), "-k", CHOSEN, *(str(HERE / name) for name in FILES)]
    result = subprocess.run(
        command, env=amx_environment(tmp_path), cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


def test_amx_is_the_first_choice_where_it_is(tmp_path: Path) -> None:
    code = "import moe_runtime._C as c; print(c.supported_isas()[0], c.isa())"
    environment = amx_environment(tmp_path)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["amx", "amx"]


def linear_of(form: torch.dtype | WeightFormat, n: int, k: int) -> packing.PackedLinear:
    weight = (
        random_codes(n, k, form) if isinstance(form, WeightFormat) else (torch.randn(n, k) / k**0.5).to(form)
    )
    return packing.pack_linear(weight)


@needs_amx
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_a_row_is_the_same_bits_in_any_number_of_rows(amx: None, form: torch.dtype | WeightFormat) -> None:
    """Whatever the tiles: up to 16 rows, 32 at a time with some computed twice, more than one chunk."""
    torch.manual_seed(0)
    packed, x = linear_of(form, 96, 600), torch.randn(193, 600)
    whole = cpu.linear(x, packed)
    for rows in ROWS:
        assert torch.equal(cpu.linear(x[:rows], packed), whole[:rows])
        chosen = torch.randperm(193)[:rows]
        assert torch.equal(cpu.linear(x[chosen], packed), whole[chosen])


@needs_amx
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_gathered_rows_give_the_bits_of_rows_in_order(amx: None, form: torch.dtype | WeightFormat) -> None:
    """Rows at one distance are read where they are, others copied; with 500 rows there are several chunks."""
    torch.manual_seed(1)
    packed = (
        moe_of(form, 100, 48)[0]
        if isinstance(form, WeightFormat)
        else random_experts(4, 100, 48, form).packed
    )
    for rows in (*ROWS, 500):
        x, ids = torch.randn(rows, 100), torch.full((rows, 1), 2, dtype=torch.int32)
        ones = torch.ones(rows, 1)
        together = cpu.fused_moe(x, ids, ones, packed)
        split = ids.clone()
        split[torch.rand(rows, 1) < 0.4] = 1  # what is left of expert 2's rows lies at any distance
        apart = cpu.fused_moe(x, split, ones, packed)
        mine = split[:, 0] == 2
        assert torch.equal(apart[mine], together[mine])


@needs_amx
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_the_number_of_threads_changes_no_bit_on_amx(
    amx: None, threads: None, form: torch.dtype | WeightFormat
) -> None:
    torch.manual_seed(2)
    packed = (
        moe_of(form, 128, 64)[0]
        if isinstance(form, WeightFormat)
        else random_experts(4, 128, 64, form).packed
    )
    x, (ids, weights) = torch.randn(90, 128), random_routing(90, 4, 2)
    results = []
    for count in (1, 2, 3, 7):
        cpu.set_num_threads(count)
        results.append(cpu.fused_moe(x, ids, weights, packed))
    assert all(torch.equal(results[0], other) for other in results)


@needs_amx
def test_very_long_rows_are_gathered_a_few_at_a_time(amx: None) -> None:
    torch.manual_seed(3)
    hidden = 30000  # 16 rows of it are more than the buffer for gathered rows holds
    experts = random_experts(2, hidden, 16, torch.bfloat16)
    x = torch.randn(9, hidden)
    ids = torch.tensor([0, 1, 0, 0, 1, 0, 1, 1, 0], dtype=torch.int32).unsqueeze(1)
    whole = cpu.fused_moe(x, ids, torch.ones(9, 1), experts.packed)
    for row in range(9):
        alone = cpu.fused_moe(x[row : row + 1], ids[row : row + 1], torch.ones(1, 1), experts.packed)
        assert torch.equal(alone[0], whole[row])
