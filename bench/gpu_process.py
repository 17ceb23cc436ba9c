"""Workers as processes that are watched: killed when silent or late, started again behind what broke them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
SILENT = 120.0  # seconds without a line: a case that compiles everything it needs takes less
GRACE = 20.0  # after a section's time, for the case that is running


@dataclass
class Worker:
    """One section, or a part of it; its lines are in ``path``."""

    section: str
    folder: Path
    arguments: tuple[str, ...] = ()
    part: str = ""
    process: subprocess.Popen[bytes] | None = None
    start: int = 0
    size: int = 0
    heard: float = 0.0
    done: bool = False
    lines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def path(self) -> Path:
        return self.folder / f"{self.section} {self.part}.jsonl".replace(" ", "-")

    def launch(self, deadline: float, environment: dict[str, str]) -> None:
        seconds = max(deadline - time.monotonic(), 0.0)
        command = [
            sys.executable, str(BENCH / "gpu_worker.py"), self.section, "--json", str(self.path),
            "--seconds", f"{seconds:.1f}", "--start", str(self.start), "--part", self.part, *self.arguments,
        ]  # fmt: skip
        with self.path.with_suffix(".log").open("ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self.heard = time.monotonic()

    def watch(self, deadline: float, environment: dict[str, str]) -> None:
        """To be called often, until ``done``."""
        assert self.process is not None, "launched first"
        now = time.monotonic()
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self.size:
            self.size, self.heard = size, now
        why = ""
        if now > deadline + GRACE:
            why = "out of time"
        elif now - self.heard > SILENT:
            why = f"silent for {SILENT:.0f} s"
        if self.process.poll() is None and not why:
            return
        end(self.process)
        self._read()
        if self._finished():
            self.done = True
            return
        why = why or f"the process ended with exit code {self.process.returncode}: {self._last_words()}"
        begun = max((line["case"] for line in self.lines if line["kind"] == "begin"), default=-1)
        self._say(kind="error", case=begun, error=why)
        if begun < self.start or now > deadline:  # it got nowhere, or nowhere is left to get
            self.done = True
            return
        self.start = begun + 1
        self.launch(deadline, environment)

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        # The last line of a killed process may be half a line.
        self.lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def _finished(self) -> bool:
        return bool(self.lines) and self.lines[-1]["kind"] in ("end", "late")

    def _say(self, **line: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps({"section": self.section, "part": self.part, **line}) + "\n")
        self._read()

    def _last_words(self) -> str:
        log = self.path.with_suffix(".log")
        text = log.read_text(errors="replace").strip() if log.exists() else ""
        return " | ".join(text.splitlines()[-3:])[-500:]

    def rows(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] in ("row", "error", "late")]


def run(
    workers: Sequence[Worker], deadline: float, environment: dict[str, str], at_once: int = 1
) -> list[dict[str, Any]]:
    """Every worker to its end or the deadline; all their lines."""
    waiting, running = list(workers), []
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                worker = waiting.pop(0)
                worker.launch(deadline, environment)
                running.append(worker)
            for worker in running:
                worker.watch(deadline, environment)
            running = [worker for worker in running if not worker.done]
            time.sleep(0.05)
    finally:  # interrupted: nothing stays behind
        for worker in running:
            if worker.process is not None:
                end(worker.process)
    return [row for worker in workers for row in worker.rows()]


def end(process: subprocess.Popen[Any]) -> None:
    """Of the process and what it started; both are in a session of their own."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    process.wait()
