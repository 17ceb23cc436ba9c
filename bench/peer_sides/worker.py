"""The loop in every peer's process: one JSON order per line on stdin, one JSON answer per line on stdout.

Runs in each peer's own environment, so it needs nothing but the standard library. Everything a library prints
goes to stderr: stdout belongs to the answers.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol


class Peer(Protocol):
    """One engine with its model loaded. Token ids are given, never fed back greedily."""

    info: dict[str, Any]  # versions, flags and what the engine says about itself

    def prefill(self, tokens: list[int]) -> float:
        """Seconds for one prompt of these tokens, alone, until the logits of its last token are there."""

    def decode(self, prompts: list[list[int]], steps: list[list[int]]) -> list[float]:
        """Seconds of each step; step i appends ``steps[i][b]`` to sequence b and makes all logits."""


def serve(load: Any) -> None:
    """Load the engine with ``load()``, say that it is ready, then obey until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    start = time.perf_counter()
    peer: Peer = load()
    print(json.dumps({"load_seconds": time.perf_counter() - start, "info": peer.info}), file=answers)
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict[str, Any]
        if order["do"] == "prefill":
            answer = {"seconds": peer.prefill(order["tokens"])}
        else:
            answer = {"step_seconds": peer.decode(order["prompts"], order["steps"])}
        print(json.dumps(answer), file=answers)


def arguments() -> dict[str, Any]:
    """What the parent says on the command line: ``folder``, ``threads`` and the peer's own choices."""
    values: dict[str, Any] = json.loads(sys.argv[1])
    values["folder"] = Path(values["folder"])
    return values
