"""What does a client of moe-serve see? `python bench/serve.py DIR [--server-flags "--quantize int4"]`.

Starts the server, then sends 1, 4, 8, 16 and 32 streams at once, each a prompt of random token ids that no
prefix cache knows and an answer of fixed length. Sampling is at temperature 1, so that random weights do not
fall into a loop over a few experts.
"""

import argparse
import json
import random
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from child_process import Program, end_cleanly_when_told  # type: ignore[import-not-found]
from common import machine, save, summary  # type: ignore[import-not-found]
from http_load import free_port, random_prompt, run, wait_until_ready  # type: ignore[import-not-found]

NAME = "measured"


def server_command(folder: Path, port: int, flags: list[str]) -> list[str]:
    """moe-serve of this environment."""
    model = ["--model", str(folder), "--port", str(port), "--served-model-name", NAME]
    return [sys.executable, "-m", "moe_runtime.server", *model, *flags]


def body(rng: random.Random, tokens: int, answer: int, vocab_size: int) -> dict[str, Any]:
    """A completion request that always gives ``answer`` tokens."""
    return {
        "model": NAME,
        "prompt": random_prompt(rng, tokens, vocab_size),
        "max_tokens": answer,
        "ignore_eos": True,
        "temperature": 1.0,
    }


def measure(server: Program, port: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Start times, then every concurrency: one round to warm up, ``--rounds`` that count."""
    rng = random.Random(1)
    vocab_size = json.loads((arguments.folder / "config.json").read_text())["vocab_size"]
    sizes = (arguments.prompt_tokens, arguments.answer_tokens, vocab_size)
    wait_until_ready(port, server.alive)
    result: dict[str, Any] = {"ready_seconds": server.seconds()}
    run(port, [body(rng, 16, 1, vocab_size)])
    result["first_token_seconds"] = server.seconds()
    print(f"ready {result['ready_seconds']:.2f} s, first token {result['first_token_seconds']:.2f} s")
    result["concurrency"] = {}
    for streams in arguments.concurrency:
        rounds = [
            run(port, [body(rng, *sizes) for _ in range(streams)]) for _ in range(arguments.rounds + 1)
        ][1:]
        row = {name: summary([one[name] for one in rounds]) for name in rounds[0]}
        result["concurrency"][streams] = row
        print(
            f"{streams:>3} streams: {row['tokens_per_s']['median']:7.1f} tok/s   "
            f"TTFT p50 {row['ttft_p50']['median'] * 1e3:7.0f} ms   "
            f"ITL p50 {row['itl_p50']['median'] * 1e3:6.1f} ms, p99 {row['itl_p99']['median'] * 1e3:6.1f} ms",
            flush=True,
        )
    result["peak_rss_bytes"] = server.peak_rss()
    print(f"peak RSS {result['peak_rss_bytes'] / 1e9:.2f} GB")
    return result


def first_start(command: list[str], port: int, log: Path) -> None:
    """A start that writes the packed file if there is none: its writer would run beside what is measured."""
    server = Program(command, {}, log)
    try:
        wait_until_ready(port, server.alive)
        server.process.terminate()  # it ends when the file is complete
        server.process.wait(600)
    finally:
        server.stop()


def main() -> None:
    """Start, measure, stop, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--server-flags", default="", help="flags for moe-serve, in one string")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 8, 16, 32])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--answer-tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="serve", help="of the result file")
    arguments = parser.parse_args()
    end_cleanly_when_told()
    port = free_port()
    flags = shlex.split(arguments.server_flags)
    with tempfile.TemporaryDirectory() as logs:
        command, log = server_command(arguments.folder, port, flags), Path(logs) / "server.log"
        first_start(command, port, log)
        server = Program(command, {}, log)
        try:
            result = measure(server, port, arguments)
        except BaseException:
            print(server.log.read_text()[-2000:], file=sys.stderr)
            raise
        finally:
            server.stop()
    sizes = {"prompt_tokens": arguments.prompt_tokens, "answer_tokens": arguments.answer_tokens}
    print("saved", save(arguments.name, {"machine": machine(), "server_flags": flags, **sizes, **result}))


if __name__ == "__main__":
    main()
