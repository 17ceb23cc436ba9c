"""What does this machine's memory give right now? `python bench/read_bandwidth.py`: GB/s of reading.

A bound that scales with the machine's mood has to be measured beside the numbers it bounds. A few lines of C
are compiled on the spot when there is a compiler; without one numpy sums the same buffer.
"""

import concurrent.futures
import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

BYTES = 2 << 30
SOURCE = """
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
void huge(void *p, size_t n) { madvise(p, n, MADV_HUGEPAGE); }
uint64_t sum(const uint64_t *p, size_t n) {
  uint64_t s[32] = {0};
  for (size_t i = 0; i + 32 <= n; i += 32) {
    for (int j = 0; j < 32; j += 8) __builtin_prefetch(p + i + 256 + j);
    for (int j = 0; j < 32; ++j) s[j] += p[i + j];
  }
  for (int j = 1; j < 32; ++j) s[0] += s[j];
  return s[0];
}
"""


def _compiled() -> ctypes.CDLL | None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "sum.c", Path(folder) / "sum.so"
        source.write_text(SOURCE)
        subprocess.run(
            [compiler, "-O3", "-march=native", "-shared", "-fPIC", source, "-o", library], check=True
        )
        loaded = ctypes.CDLL(str(library))
    loaded.sum.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    loaded.sum.restype = ctypes.c_uint64
    loaded.huge.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return loaded


class ReadBandwidth:
    """Owns a buffer of 2 GiB, far beyond every cache; ``measure`` reads it once per call."""

    def __init__(self, threads: int) -> None:
        self._library = _compiled()
        self._buffer = np.empty(BYTES // 8, np.uint64)
        if self._library is not None:
            self._library.huge(self._buffer.ctypes.data, BYTES)
        self._buffer.fill(1)
        self._parts = np.array_split(self._buffer, threads)
        self._pool = concurrent.futures.ThreadPoolExecutor(threads)
        self.method = "numpy" if self._library is None else "C with prefetch, huge pages asked for"

    def _read(self, part: np.ndarray) -> int:
        if self._library is None:
            return int(part.sum())
        return int(self._library.sum(part.ctypes.data, part.size))

    def measure(self) -> float:
        """Bytes per second of one reading of the whole buffer by all threads."""
        start = time.perf_counter()
        assert sum(self._pool.map(self._read, self._parts)) >= BYTES // 8 - 64
        return BYTES / (time.perf_counter() - start)


def main() -> None:
    """Print ten readings."""
    probe = ReadBandwidth(len(os.sched_getaffinity(0)))
    for _ in range(10):
        print(f"{probe.measure() / 1e9:.1f} GB/s ({probe.method})")


if __name__ == "__main__":
    main()
