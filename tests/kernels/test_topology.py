"""Memory nodes: read from a pretended machine, and pretended on this one.

That a worker takes its own node's slice first is checked by ``make sanitize`` (sanitize/slices.cpp).
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernels.oracle import random_experts, random_routing

import moe_runtime._C as _C
from moe_runtime.kernels import WeightFormat, cpu, packing

CPUS = sorted(os.sched_getaffinity(0))


@pytest.fixture(autouse=True)
def _restore(threads: None) -> Iterator[None]:
    yield
    _C.set_nodes([])


def machine(folder: Path, online: str, **lists: str) -> str:
    (folder / "online").write_text(online + "\n")
    for name, cpus in lists.items():
        (folder / name).mkdir()
        (folder / name / "cpulist").write_text(cpus + "\n")
    return str(folder)


@pytest.fixture
def first_four() -> Iterator[None]:
    """As if this process might use CPUs 0 to 3, where it may at all."""
    if not {0, 1} <= set(CPUS):
        pytest.skip("needs CPUs 0 and 1")
    os.sched_setaffinity(0, range(4))
    yield
    os.sched_setaffinity(0, CPUS)


def test_nodes_are_read_as_far_as_their_cpus_may_be_used(tmp_path: Path, first_four: None) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    two = machine(tmp_path, "0-2", node0="0,2", node1="", node2="1,3,100-2000000000")
    assert _C.read_nodes(two) == [[c for c in allowed if c in (0, 2)], [c for c in allowed if c in (1, 3)]]
    os.sched_setaffinity(0, {1})
    assert _C.read_nodes(two) == [[1]], "what lies on one node is one node"


@pytest.mark.parametrize("online", ["", "0", "none", "0-1", "-3,5-", "7-2"])
def test_a_machine_that_does_not_tell_has_one_node(tmp_path: Path, online: str) -> None:
    assert _C.read_nodes(machine(tmp_path, online, node0="no list")) == [CPUS]
    assert _C.read_nodes(str(tmp_path / "absent")) == [CPUS]


@pytest.mark.parametrize(
    "nodes", [[[0], [1]], [[1], [0]], [[0, 1], []], [[c] for c in range(20)], [[-1, 5000]] * 3]
)
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_nodes_change_no_bit(nodes: list[list[int]], kind: str) -> None:
    dtype = WeightFormat(kind).dtype
    x, (ids, weights) = torch.randn(64, 256), random_routing(64, 8, 2)

    def run() -> list[torch.Tensor]:
        moe = random_experts(8, 256, 96, dtype)
        matrix = packing.pack_linear(torch.randn(700, 256, generator=torch.Generator().manual_seed(1)))
        return [cpu.fused_moe(x, ids, weights, moe.packed), cpu.linear(x, matrix)]

    expected = run()
    _C.set_nodes(nodes)
    for count in (1, 2, 5):
        cpu.set_num_threads(count)
        assert all(torch.equal(got, wanted) for got, wanted in zip(run(), expected, strict=True))


def workers() -> list[list[int]]:
    """The CPUs each thread of the pool may use."""
    tasks = [
        task for task in Path("/proc/self/task").iterdir() if (task / "comm").read_text() == "moe-worker\n"
    ]
    return [sorted(os.sched_getaffinity(int(task.name))) for task in tasks]


def test_workers_stay_on_their_nodes_and_are_free_again_on_one(first_four: None) -> None:
    packed, x = packing.pack_linear(torch.randn(512, 512)), torch.randn(200, 512)
    cpu.set_num_threads(2)
    for nodes, expected in (([[0], [1]], [1]), ([[1], [0]], [0]), ([], sorted(os.sched_getaffinity(0)))):
        _C.set_nodes(nodes)
        for _ in range(10_000):  # until a worker came in time for a task
            cpu.linear(x, packed)
            if expected in workers():
                break
        assert expected in workers()
