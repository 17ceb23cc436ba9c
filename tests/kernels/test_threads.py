"""The thread pool under awkward callers: two at once, forks, exits, changing sizes, bad inputs."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from kernels.oracle import random_experts, random_routing
from kernels.process import python

import moe_runtime._C as _C
from moe_runtime.errors import KernelError
from moe_runtime.kernels import cpu


@pytest.fixture
def isa() -> None:
    """Once is enough: threads are the same whatever the kernels; the fork test goes through all."""


@pytest.fixture(autouse=True)
def _restore(threads: None) -> Iterator[None]:
    yield


def test_two_python_threads_get_the_same_bits_at_once_while_a_third_resizes_the_pool() -> None:
    moe = random_experts(8, 256, 96, torch.bfloat16)
    x, (ids, weights) = torch.randn(64, 256), random_routing(64, 8, 2)
    expected = cpu.fused_moe(x, ids, weights, moe.packed)
    ended = threading.Event()

    def work(_: int) -> bool:
        return all(torch.equal(cpu.fused_moe(x, ids, weights, moe.packed), expected) for _ in range(50))

    def resize() -> None:
        while not ended.is_set():
            for count in (1, 5, 2, 7):
                cpu.set_num_threads(count)

    with ThreadPoolExecutor(3) as executor:
        executor.submit(resize)
        answers = list(executor.map(work, range(2)))
        ended.set()
    assert all(answers)


def test_a_refused_input_leaves_the_pool_as_good_as_before() -> None:
    moe = random_experts(8, 256, 96, torch.bfloat16)
    x, (ids, weights) = torch.randn(64, 256), random_routing(64, 8, 2)
    cpu.set_num_threads(3)
    expected = cpu.fused_moe(x, ids, weights, moe.packed)
    bad = ids.clone()
    bad[63, 1] = 8
    for _ in range(20):
        with pytest.raises(KernelError, match="expected 0 <= id < 8"):
            cpu.fused_moe(x, bad, weights, moe.packed)
        assert torch.equal(cpu.fused_moe(x, ids, weights, moe.packed), expected)


FORK = """
import os, torch
import moe_runtime._C as c
from moe_runtime.kernels import cpu, packing
cpu.set_num_threads(3)
x, packed = torch.randn(50, 512), packing.pack_linear(torch.randn(512, 512).bfloat16())
for isa in c.supported_isas():
    c.select_isa(isa)
    expected = cpu.linear(x, packed)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(cpu.linear(x, packed), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert torch.equal(cpu.linear(x, packed), expected)
print("equal")
"""


def test_kernels_work_in_a_child_after_fork() -> None:
    result = python(FORK)
    assert result.stdout == "equal\n", result.stderr


EXIT = """
import threading, time, torch
from moe_runtime.kernels import cpu, packing
packed, x = packing.pack_linear(torch.randn(2048, 2048).bfloat16()), torch.randn(256, 2048)
running = threading.Event()
def work():
    while True:
        running.set()
        cpu.linear(x, packed)
for _ in range(2):
    threading.Thread(target=work, daemon=True).start()
running.wait()
time.sleep(0.02)
print("leaving")
"""


def test_the_interpreter_may_exit_while_kernels_run() -> None:
    result = python(EXIT)
    assert (result.returncode, result.stdout, result.stderr) == (0, "leaving\n", "")


def test_a_system_that_allows_no_more_threads_gets_the_work_done_by_those_there_are() -> None:
    code = """
import resource, torch
from moe_runtime.kernels import cpu, packing
import moe_runtime._C as c
torch.set_num_threads(1)
x, packed = torch.randn(50, 512), packing.pack_linear(torch.randn(512, 512))
cpu.set_num_threads(1)
expected = cpu.linear(x, packed)
with open("/proc/self/statm") as file:
    pages = int(file.read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (20 << 20),) * 2)  # two stacks of 8 MiB
cpu.set_num_threads(64)
print(torch.equal(cpu.linear(x, packed), expected), c.num_threads() < 8)
"""
    result = python(code)
    assert result.stdout.split() == ["True", "True"], result.stderr


def test_the_pool_is_no_larger_than_the_affinity_mask_and_obeys_its_variable() -> None:
    code = """
import os
os.sched_setaffinity(0, {next(iter(os.sched_getaffinity(0)))})
import moe_runtime._C as c
print(c.num_threads())
"""
    assert python(code, MOE_NUM_THREADS="").stdout.strip() == "1"
    assert python(code, MOE_NUM_THREADS="5").stdout.strip() == "5"


@pytest.mark.parametrize("text", ["0", "-1", "257", "2x", "two", "1.5", " ", "99999999999999999999"])
def test_a_senseless_number_of_threads_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE_NUM_THREADS", text)
    message = f"MOE_NUM_THREADS={text}: expected a whole number of threads from 1 to 256"
    with pytest.raises(KernelError, match=message):
        cpu.set_num_threads(0)
    monkeypatch.undo()
    for count in (-1, 257):
        with pytest.raises(KernelError, match=f"threads = {count}: expected a whole number"):
            cpu.set_num_threads(count)


# Name -> /proc/self/cgroup, files under /sys/fs/cgroup, CPUs.
GROUPS: dict[str, tuple[str, dict[str, str], float]] = {
    "v2 without a limit": ("0::/a\n", {"a/cpu.max": "max 100000", "cpu.max": "max 100000"}, 0.0),
    "v2, the tightest on the way up": (
        "0::/a/b\n",
        {"a/b/cpu.max": "400000 100000", "a/cpu.max": "150000 100000", "cpu.max": "max 100000"},
        1.5,
    ),
    "v2 in a container that sees its own root": ("0::/\n", {"cpu.max": "300000 100000"}, 3.0),
    "v1": (
        "12:memory:/x\n4:cpu,cpuacct:/docker/x\n1:cpuset:/y\n",
        {"cpu/docker/x/cpu.cfs_quota_us": "250000", "cpu/docker/x/cpu.cfs_period_us": "100000"},
        2.5,
    ),
    "v1 whose path is not mounted here": (
        "4:cpu,cpuacct:/docker/x\n",
        {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"},
        0.5,
    ),
    "v1 without a limit": (
        "4:cpu:/x\n",
        {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"},
        0.0,
    ),
    "nonsense": ("::\n0\n\n0::/a\n", {"a/cpu.max": "many 0", "cpu.max": ""}, 0.0),
    "nothing": ("", {}, 0.0),
}


@pytest.mark.parametrize("name", GROUPS)
def test_the_cgroup_quota_is_found(name: str, tmp_path: Path) -> None:
    groups, files, expected = GROUPS[name]
    (tmp_path / "groups").write_text(groups)
    for path, text in files.items():
        (tmp_path / "root" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / path).write_text(text + "\n")
    assert _C.cgroup_cpus(str(tmp_path / "groups"), str(tmp_path / "root")) == expected
