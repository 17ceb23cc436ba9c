"""Progress on stderr with the time left: one line that rewrites itself on a terminal, a line now and then in
a log.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

ON_TERMINAL, IN_LOG = 0.2, 30.0  # seconds between two reports


class Progress:
    """``advance`` as work is done, of ``total`` units; use it in a ``with``."""

    def __init__(
        self, what: str, total: int, unit: str = "tokens", clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._total, self._unit, self._clock = what, total, unit, clock
        self._done = 0
        self._start = self._reported = clock()
        self._terminal = sys.stderr.isatty()

    def advance(self, count: int) -> None:
        self._done += count
        now = self._clock()
        if now - self._reported >= (ON_TERMINAL if self._terminal else IN_LOG):
            self._reported = now
            self._say(self._line(now), "" if self._terminal else "\n")

    def _line(self, now: float) -> str:
        rate = self._done / max(now - self._start, 1e-9)
        left = (self._total - self._done) / rate if rate else 0.0
        return (
            f"{self._what}: {self._done}/{self._total} {self._unit}, {rate:.0f}/s, "
            f"{int(left // 60)}:{int(left % 60):02d} left"
        )

    def _say(self, line: str, end: str) -> None:
        print(f"\r\x1b[K{line}" if self._terminal else line, end=end, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        seconds = self._clock() - self._start
        self._say(f"{self._what}: {self._done} {self._unit} in {seconds:.1f} s", "\n")
