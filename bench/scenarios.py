"""What do scenarios cost and save? `python bench/scenarios.py MODEL SCENARIOS --scenario credit`.

Two servers of one model, taking turns: one with all experts, asked for the full model, for one scenario
(a mask alone) and for all scenarios mixed in one batch; and one that loaded the scenario's experts only.
Prompts are random token ids that no prefix cache knows. SCENARIOS is a folder as moe-serve takes it.
"""

import argparse
import json
import random
import shlex
import tempfile
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from child_process import Program, end_cleanly_when_told  # type: ignore[import-not-found]
from common import machine, save, summary  # type: ignore[import-not-found]
from http_load import free_port, run, wait_until_ready  # type: ignore[import-not-found]
from serve import NAME, body, server_command  # type: ignore[import-not-found]


class Server:
    """One process; ``ready_s``: seconds from its start until it answered."""

    def __init__(self, arguments: argparse.Namespace, flags: list[str], logs: Path) -> None:
        self.port = free_port()
        flags = [*flags, "--scenario-dir", str(arguments.scenarios), *shlex.split(arguments.server_flags)]
        command = server_command(arguments.model, self.port, flags)
        self.program = Program(command, {}, logs / f"{self.port}.log")
        wait_until_ready(self.port, self.program.alive)
        self.ready_s = self.program.seconds()

    def ask(self, bodies: list[dict[str, Any]]) -> float:
        """Tokens per second of all bodies at once."""
        self.program.resume()
        found: dict[str, float] = run(self.port, bodies)
        self.program.pause()
        return found["tokens_per_s"]


def bodies(
    rng: random.Random, models: list[str], streams: int, sizes: tuple[int, int, int]
) -> list[dict[str, Any]]:
    """``streams`` completions of random prompts, the models in turn."""
    return [body(rng, *sizes) | {"model": model} for model in islice(cycle(models), streams)]


def starts(
    arguments: argparse.Namespace, ways: dict[str, list[str]], logs: Path
) -> dict[str, dict[str, Any]]:
    """Each kind of server alone, some times after one: seconds until ready, peak memory then."""
    found: dict[str, dict[str, list[float]]] = {way: {"ready_s": [], "rss_bytes": []} for way in ways}
    for _ in range(arguments.starts + 1):
        for way, flags in ways.items():
            server = Server(arguments, flags, logs)
            found[way]["ready_s"].append(server.ready_s)
            found[way]["rss_bytes"].append(float(server.program.peak_rss()))
            server.program.stop()
    return {way: {name: summary(values[1:]) for name, values in of.items()} for way, of in found.items()}


def throughput(arguments: argparse.Namespace, ways: dict[str, list[str]], logs: Path) -> dict[str, Any]:
    """tokens/s by way and concurrency, and the ratios of each round to the full model's."""
    names = sorted(path.name for path in arguments.scenarios.iterdir() if path.is_dir())
    chosen = f"{NAME}:{arguments.scenario}"
    servers = {way: Server(arguments, flags, logs) for way, flags in ways.items()}
    for server in servers.values():
        server.program.pause()
    asked = {
        "full": (servers["all experts"], [NAME]),
        "virtual": (servers["all experts"], [chosen]),
        "mixed": (servers["all experts"], [NAME, *(f"{NAME}:{name}" for name in names)]),
        "physical": (servers["kept experts"], [chosen]),
    }
    config = json.loads((arguments.model / "config.json").read_text())
    sizes = (arguments.prompt_tokens, arguments.answer_tokens, config["vocab_size"])
    rng, result = random.Random(1), {}
    try:
        for streams in arguments.concurrency:
            rounds: dict[str, list[float]] = {way: [] for way in asked}
            for _ in range(arguments.rounds + 1):
                for way in rng.sample(sorted(asked), len(asked)):
                    server, models = asked[way]
                    rounds[way].append(server.ask(bodies(rng, models, streams, sizes)))
            result[str(streams)] = {
                way: {
                    "tokens_per_s": summary(values[1:]),
                    "to_full": summary(
                        [mine / full for mine, full in zip(values, rounds["full"], strict=True)][1:]
                    ),
                }
                for way, values in rounds.items()
            }
            for way, row in result[str(streams)].items():
                print(
                    f"{streams:>3} streams, {way:<9} {row['tokens_per_s']['median']:8.1f} tok/s, "
                    f"{row['to_full']['median']:.3f} of full",
                    flush=True,
                )
    finally:
        for server in servers.values():
            server.program.stop()
    return result


def main() -> None:
    """Start, measure, stop, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("scenarios", type=Path)
    parser.add_argument("--scenario", required=True, help="the one that is measured alone")
    parser.add_argument("--server-flags", default="", help="flags for moe-serve, in one string")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--answer-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--name", default="scenarios", help="of the result file")
    arguments = parser.parse_args()
    end_cleanly_when_told()
    ways = {"all experts": [], "kept experts": ["--scenarios", arguments.scenario]}
    with tempfile.TemporaryDirectory() as logs:
        result = {
            "machine": machine(),
            "scenario": arguments.scenario,
            "starts": starts(arguments, ways, Path(logs)),
            "concurrency": throughput(arguments, ways, Path(logs)),
        }
    for way, row in result["starts"].items():
        print(f"{way}: ready in {row['ready_s']['median']:.2f} s, {row['rss_bytes']['median'] / 1e6:.0f} MB")
    print("saved", save(arguments.name, result))


if __name__ == "__main__":
    main()
