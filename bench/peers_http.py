"""The HTTP part of peers.py: every server loaded once, then eight streams at once to each in turn."""

import random
from pathlib import Path
from typing import Any

from child_process import Program  # type: ignore[import-not-found]
from common import summary  # type: ignore[import-not-found]
from http_load import free_port, random_prompt, run, wait_until_ready  # type: ignore[import-not-found]
from peers_sides import (  # type: ignore[import-not-found]
    Place,
    Side,
    http_server,
    offline_child,
    write_packed_file,
)

STREAMS = 8
PROMPT_TOKENS = 128
ANSWER_TOKENS = 48
NAME = "slice"
VOCAB_SIZE = 32768


def _bodies(rng: random.Random) -> list[dict[str, Any]]:
    return [
        {
            "model": NAME,
            "prompt": random_prompt(rng, PROMPT_TOKENS, VOCAB_SIZE),
            "max_tokens": ANSWER_TOKENS,
            "ignore_eos": True,
            # All said: servers differ in what they filter by default.
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
        }
        for _ in range(STREAMS)
    ]


def measure_http(
    names: list[str], place: Place, rounds: int, logs: Path
) -> tuple[dict[str, Any], list[Side]]:
    """Alternating rounds; the first one warms up. Ratios: ours over theirs, within a round."""
    rng = random.Random(2)
    servers: list[tuple[Side, Program, int]] = []
    try:
        for name in names:
            port = free_port()
            side = http_server(name, place, port, NAME, STREAMS)
            print(f"  starting {name}", flush=True)
            if side.ours:
                write_packed_file(offline_child(name, place))
            server = Program(side.command, side.environment, logs / f"http-{name}.log")
            servers.append((side, server, port))
            wait_until_ready(port, server.alive)
            server.pause()
        samples: dict[str, list[dict[str, float]]] = {side.name: [] for side, _, _ in servers}
        turns = list(servers)
        for number in range(rounds + 1):
            bodies = _bodies(rng)
            rng.shuffle(turns)
            for side, server, port in turns:
                server.resume()
                sample = run(port, bodies)
                server.pause()
                if number:
                    samples[side.name].append(sample)
        rss = {side.name: server.peak_rss() for side, server, _ in servers}
    finally:
        for _, server, _ in servers:
            server.stop()
    sides = [side for side, _, _ in servers]
    return {"peak_rss_bytes": rss, **_tables(samples)}, sides


def _tables(samples: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Summaries per server, and ratios above 1 where ours is better: tokens/s up, times down."""
    servers = {
        name: {key: summary([one[key] for one in rows]) for key in rows[0]} for name, rows in samples.items()
    }
    ratios = {
        f"{ours} / {theirs}": {
            key: summary(
                [
                    a[key] / b[key] if key == "tokens_per_s" else b[key] / a[key]
                    for a, b in zip(samples[ours], samples[theirs], strict=True)
                ]
            )
            for key in ("tokens_per_s", "ttft_p50", "itl_p50", "itl_p99")
        }
        for ours in samples
        for theirs in samples
        if ours.startswith("ours") and not theirs.startswith("ours")
    }
    return {"streams": STREAMS, "prompt_tokens": PROMPT_TOKENS, "answer_tokens": ANSWER_TOKENS,
            "servers": servers, "ratios": ratios}  # fmt: skip
