"""A program under measurement: in its own process group, with a log, its peak memory, and a pause."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def end_cleanly_when_told() -> None:
    """SIGTERM ends this process like an exception, so that programs under measurement are stopped too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


class Program:
    """Starts ``command`` with ``environment`` on top of ours; what it prints goes to ``log``.

    With ``talks`` its standard input and output are pipes, for orders and answers.

    A paused program gets no processor time at all: engines that spin while they wait would slow their rivals.
    """

    def __init__(
        self, command: list[str], environment: dict[str, str], log: Path, *, talks: bool = False
    ) -> None:
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self.started = time.perf_counter()
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else errors,
                stderr=errors,
                text=True,
                env=os.environ | environment,
                start_new_session=True,
            )

    def alive(self) -> bool:
        return self.process.poll() is None

    def seconds(self) -> float:
        """Since the start of the process."""
        return time.perf_counter() - self.started

    def pause(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self.process.pid, signal.SIGCONT)

    def peak_rss(self) -> int:
        """Bytes: the peaks (VmHWM) of all processes of the group, added up."""
        return sum(_peak(member) for member in self._members())

    def _members(self) -> list[Path]:
        members = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has just ended
            if int(fields[2]) == self.process.pid:
                members.append(path.parent)
        return members

    def stop(self) -> None:
        """End the whole group and wait until all of its memory is free again."""
        for number in (signal.SIGCONT, signal.SIGTERM):
            self._signal(number)
        deadline = time.monotonic() + 20
        while self._living() and time.monotonic() < deadline:
            self.process.poll()
            time.sleep(0.05)
        self._signal(signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()

    def _living(self) -> bool:
        return any((member / "statm").read_text()[0] != "0" for member in self._members() if member.exists())

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return


def _peak(member: Path) -> int:
    try:
        lines = (member / "status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
