"""--drift-log: one JSON line per prompt under a scenario, for ``moe-experts drift``. Numbers, never text."""

import json
import logging
import os
import time
from pathlib import Path
from typing import BinaryIO

from moe_runtime.errors import ConfigError
from moe_runtime.server.scenario_metrics import ScenarioMetrics

logger = logging.getLogger("moe_runtime.server")
OWNER_ONLY = 0o600


class DriftLog:
    """Appends to a file; one that is moved away is made anew by the next start."""

    def __init__(self, path: Path | None, metrics: ScenarioMetrics) -> None:
        """``path`` None: nothing is written. Raises ConfigError when it cannot be opened."""
        self._metrics = metrics
        self._file: BinaryIO | None = None
        if path is not None:
            try:
                number = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, OWNER_ONLY)
            except OSError as error:
                raise ConfigError(f"--drift-log {path}: {error.strerror}") from None
            self._file = os.fdopen(number, "ab", buffering=0)

    def write(self, scenario: str, num_tokens: int, lost_mass: float, drift: str | None) -> None:
        """One prompt. A full disk must not end a request: it is logged and counted."""
        if self._file is None:
            return
        line = {
            "time": round(time.time(), 3),
            "scenario": scenario,
            "tokens": num_tokens,
            "lost_mass": round(lost_mass, 6),
            "drift": drift,
        }
        try:
            self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        except OSError as error:
            self._metrics.log_failed()
            logger.error("--drift-log: %s", error.strerror)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
