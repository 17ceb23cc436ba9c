"""What kind of pages should packed weights lie on? Streaming bandwidth of each, in alternating rounds.

    .venv/bin/python bench/pages.py [--gigabytes 2] [--rounds 7] [--folder DIR]

Two readers: a plain loop, and the bf16 linear kernel with one token, which streams its weights. Three kinds
of memory: anonymous on 4 KB pages, anonymous with huge pages advised (what packing in memory uses), and a
mapped file in the page cache (what a packed weight file uses).
"""

import argparse
import mmap
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import machine, save, summary

import moe_runtime._C as _C
from moe_runtime.kernels import PackedLinear, WeightFormat, cpu

K = 4096  # of the linear layer; its N fills the memory
FORMAT = WeightFormat("bfloat16")


def anonymous(num_bytes: int, advice: int) -> mmap.mmap:
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(advice)
    fill(memory)
    return memory


def mapped_file(num_bytes: int, folder: str | None) -> mmap.mmap:
    """A private mapping that is only read, so its pages are those of the page cache."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.truncate(num_bytes)
        with mmap.mmap(file.fileno(), num_bytes) as writable:
            fill(writable)
        return mmap.mmap(file.fileno(), num_bytes, flags=mmap.MAP_PRIVATE)


def fill(memory: mmap.mmap) -> None:
    """Numbers between 0.5 and 2 in every byte pair: neither NaN nor subnormal."""
    torch.frombuffer(memory, dtype=torch.bfloat16).fill_(0.75)


def huge_bytes(address: int) -> int:
    """Bytes of the mapping at ``address`` that the system put on huge pages."""
    text = Path("/proc/self/smaps").read_text()
    for block in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", text):
        begin, end = (int(part, 16) for part in block.split(" ", 1)[0].split("-"))
        if begin <= address < end:
            sizes = re.findall(r"(?:AnonHugePages|ShmemPmdMapped|FilePmdMapped):\s+(\d+) kB", block)
            return sum(map(int, sizes)) * 1024
    return 0


def measures(memory: torch.Tensor) -> dict[str, Callable[[], float]]:
    """Each reads all of ``memory`` once and returns bytes per second."""
    rows = memory.numel() // (2 * K) // 32 * 32
    packed = PackedLinear(memory[: rows * K * 2].view(1, -1), 1, rows, K, FORMAT, "panels")
    assert _C.packed_bytes(rows, K, FORMAT.tag) == packed.data.numel()
    x = torch.ones(1, K)

    def linear() -> float:
        start = time.perf_counter()
        cpu.linear(x, packed)
        return packed.data.numel() / (time.perf_counter() - start)

    return {"read": lambda: _C.read_bandwidth(memory.data_ptr(), memory.numel(), 1), "linear": linear}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--gigabytes", type=float, default=2.0, help="size of each memory; far above the caches"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", help="where the file lies (default: the system's temporary folder)")
    arguments = parser.parse_args()
    num_bytes = int(arguments.gigabytes * 1e9) >> 21 << 21
    memories = {
        "4 KB": anonymous(num_bytes, mmap.MADV_NOHUGEPAGE),
        "huge": anonymous(num_bytes, mmap.MADV_HUGEPAGE),
        "file": mapped_file(num_bytes, arguments.folder),
    }
    tensors = {name: torch.frombuffer(memory, dtype=torch.uint8) for name, memory in memories.items()}
    on_huge = {name: huge_bytes(tensor.data_ptr()) / num_bytes for name, tensor in tensors.items()}
    print("on huge pages:", ", ".join(f"{name} {share:.0%}" for name, share in on_huge.items()))
    rates: dict[tuple[int, str, str], list[float]] = {}
    all_measures = {name: measures(tensor) for name, tensor in tensors.items()}
    all_threads = _C.num_threads()
    for _ in range(arguments.rounds + 1):  # the first warms up
        for threads in sorted({1, all_threads}):
            cpu.set_num_threads(threads)
            for what in ("read", "linear"):
                for pages in tensors:
                    rates.setdefault((threads, what, pages), []).append(all_measures[pages][what]() / 1e9)
    rows = [
        {"threads": threads, "what": what, "pages": pages, "gb_per_s": summary(samples[1:])}
        for (threads, what, pages), samples in rates.items()
    ]
    for row in rows:
        rate = row["gb_per_s"]
        print("{threads} threads  {what:6}  {pages:4}".format(**row), end="  ")
        print(f"{rate['median']:5.1f} GB/s  ({rate['q1']:.1f} to {rate['q3']:.1f})")
    result = {"machine": machine(), "isa": _C.isa(), "gigabytes": num_bytes / 1e9, "on_huge_pages": on_huge}
    print(save("pages", {**result, "rows": rows}))


if __name__ == "__main__":
    main()
