"""Our engine against transformers, llama.cpp and vLLM: `python bench/peers.py CHECKPOINT --work DIR`.

CHECKPOINT comes from bench/slice_checkpoint.py. Each peer lives in its own virtual environment below the work
folder, made on first use (``--prepare`` makes them all and stops). Every engine is a process that loads once;
the rounds alternate between the engines of a group, the others are stopped meanwhile, so that none takes time
from another by spinning. Prompts and fed tokens are random: greedy decoding of random weights falls into
loops that reuse a few experts and measure the cache. The memory's read bandwidth is measured beside every
sample.
"""

import argparse
import json
import os
import random
from pathlib import Path
from typing import Any

import peers_environments as environments  # type: ignore[import-not-found]
from child_process import Program, end_cleanly_when_told  # type: ignore[import-not-found]
from common import machine, summary  # type: ignore[import-not-found]
from kernels_workloads import huge_pages  # type: ignore[import-not-found]
from peers_http import measure_http  # type: ignore[import-not-found]
from peers_report import Report  # type: ignore[import-not-found]
from peers_sides import (  # type: ignore[import-not-found]
    GROUPS,
    HTTP_GROUPS,
    Bits,
    Place,
    Side,
    offline_child,
    write_packed_file,
)

from moe_runtime import _C, kernels

PREFILL_TOKENS = 512
DECODE_CONTEXT = 128
FIRST_PROMPT = 128


class Engine:
    """One side's process: orders in, answers out, paused between its turns."""

    def __init__(self, side: Side, logs: Path) -> None:
        self.side = side
        self._program = Program(side.command, side.environment, logs / f"{side.name}.log", talks=True)
        self.info = self._answer()["info"]

    def _answer(self) -> dict[str, Any]:
        line = self._program.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.side.name} has ended:\n{self._program.log.read_text()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def order(self, **order: Any) -> dict[str, Any]:
        self._program.resume()
        self._program.process.stdin.write(json.dumps(order) + "\n")
        self._program.process.stdin.flush()
        return self._answer()

    def pause(self) -> None:
        self._program.pause()

    def seconds_since_start(self) -> float:
        return float(self._program.seconds())

    def peak_rss(self) -> int:
        return int(self._program.peak_rss())

    def stop(self) -> None:
        self._program.stop()


def step_bytes(config: dict[str, Any], batch: int, bits: Bits) -> float:
    """Bytes of weights that one decode step of ``batch`` random tokens reads, experts counted as expected."""
    hidden, dim = config["hidden_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    experts, chosen = config["num_experts"], config["num_experts_per_tok"]
    attention = hidden * dim * (2 * heads + 2 * kv_heads)
    distinct = experts * (1 - (1 - chosen / experts) ** batch)
    moe = distinct * 3 * hidden * config["moe_intermediate_size"]
    layer = (attention + moe) * bits.layers + hidden * experts * bits.router
    return float((config["num_hidden_layers"] * layer + hidden * config["vocab_size"] * bits.head) / 8)


class ReadBandwidth:
    """Owns a gigabyte, far beyond every cache, and reads it with our own threads."""

    def __init__(self, threads: int) -> None:
        kernels.set_num_threads(threads)
        self._buffer = huge_pages(1 << 30).fill_(1)

    def measure(self) -> float:
        """Bytes per second, the better of two readings."""
        return float(max(_C.read_bandwidth(self._buffer.data_ptr(), 1 << 30, 1) for _ in range(2)))


class Measurement:
    """One round of everything for one group: the same tokens to every engine, in changing order."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._rng = random.Random(1)
        self._steps = arguments.steps
        self._batches = arguments.batches
        self._prefill = arguments.prefill
        self._bandwidth = ReadBandwidth(arguments.threads)
        self._config = json.loads((arguments.checkpoint / "config.json").read_text())

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(2, self._config["vocab_size"]) for _ in range(count)]

    def round(self, engines: list[Engine]) -> list[dict[str, Any]]:
        """Rows of side, measure, tokens per second and, for decode, the fraction of the memory bound."""
        rows = []
        orders: list[tuple[str, int, dict[str, Any]]] = [
            (f"prefill {count}", count, {"do": "prefill", "tokens": self._tokens(count)})
            for count in self._prefill
        ]
        for batch in self._batches:
            prompts = [self._tokens(DECODE_CONTEXT) for _ in range(batch)]
            steps = [self._tokens(batch) for _ in range(self._steps)]
            orders.append((f"decode {batch}", batch, {"do": "decode", "prompts": prompts, "steps": steps}))
        for measure, tokens, order in orders:
            self._rng.shuffle(engines)
            for engine in engines:
                bandwidth = self._bandwidth.measure()
                answer = engine.order(**order)
                engine.pause()
                row = {"side": engine.side.name, "measure": measure, "read_gb_per_s": bandwidth / 1e9}
                if order["do"] == "prefill":
                    seconds = answer["seconds"]
                else:
                    steps_seen = sorted(answer["step_seconds"])
                    seconds = steps_seen[len(steps_seen) // 2]
                    num_bytes = step_bytes(self._config, tokens, engine.side.bits)
                    row |= {"megabytes": num_bytes / 1e6, "bound_fraction": num_bytes / bandwidth / seconds}
                rows.append(row | {"tokens_per_s": tokens / seconds})
        return rows

    def first(self, engine: Engine) -> float:
        """Seconds from the start of the process to the first token of a prompt."""
        engine.order(do="prefill", tokens=self._tokens(FIRST_PROMPT))
        return engine.seconds_since_start()


def measure_group(sides: list[Side], measurement: Measurement, rounds: int, logs: Path) -> dict[str, Any]:
    """Load all sides, warm each up with one round, alternate; ratios are ours over theirs within a round."""
    engines: list[Engine] = []
    try:
        for side in sides:
            print(f"  loading {side.name}", flush=True)
            if side.ours:
                write_packed_file(side)
            engines.append(Engine(side, logs))
            engines[-1].pause()
        samples = [measurement.round(engines) for _ in range(rounds + 1)][1:]
        rss = {engine.side.name: engine.peak_rss() for engine in engines}
        info = {engine.side.name: engine.info for engine in engines}
    finally:
        for engine in engines:
            engine.stop()
    return {"peers": info, "peak_rss_bytes": rss, **tables(samples)}


def tables(samples: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Rows of all rounds -> per measure and side a summary of every value, and the ratios to each of ours."""
    values: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in (row for rows in samples for row in rows):
        values.setdefault(row["measure"], {}).setdefault(row["side"], []).append(row)
    result: dict[str, Any] = {}
    ratios: dict[str, Any] = {}
    for measure, sides in values.items():
        result[measure] = {
            side: {
                name: summary([row[name] for row in rows])
                for name in rows[0]
                if name not in ("side", "measure")
            }
            for side, rows in sides.items()
        }
        ratios[measure] = {
            f"{ours} / {theirs}": summary(
                [
                    a["tokens_per_s"] / b["tokens_per_s"]
                    for a, b in zip(sides[ours], sides[theirs], strict=True)
                ]
            )
            for ours in sides
            for theirs in sides
            if ours.startswith("ours") and not theirs.startswith("ours")
        }
    return {"measures": result, "ratios": ratios}


def measure_starts(sides: list[Side], measurement: Measurement, starts: int, logs: Path) -> dict[str, Any]:
    """Each side alone, ``starts`` times in turn after one that warms the page cache."""
    samples: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    for number in range(starts + 1):
        for side in sides:
            engine = Engine(side, logs)
            try:
                seconds = measurement.first(engine)
                sample = {"first_token_seconds": seconds, "peak_rss_bytes": float(engine.peak_rss())}
            finally:
                engine.stop()
            print(f"  start {number} {side.name}: {seconds:.2f} s, {sample['peak_rss_bytes'] / 1e9:.2f} GB")
            if number:
                samples[side.name].append(sample)
    return {
        name: {key: summary([one[key] for one in rows]) for key in rows[0]} for name, rows in samples.items()
    }


def main() -> None:
    """Prepare, run the chosen parts, and write after each, so that a long run loses nothing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder for environments, GGUF files, logs")
    parser.add_argument("--prepare", action="store_true", help="make environments and GGUF files, then stop")
    parser.add_argument("--jobs", type=int, default=2, help="compiler processes for llama.cpp")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=24, help="decode steps per round; their median counts")
    parser.add_argument("--prefill", type=int, nargs="*", default=[PREFILL_TOKENS])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 16])
    parser.add_argument("--groups", nargs="*", default=list(GROUPS), metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--starts", type=int, default=3, help="starts of every side alone; 0 leaves them out")
    parser.add_argument(
        "--http", nargs="*", default=list(HTTP_GROUPS), metavar="GROUP", help=", ".join(HTTP_GROUPS)
    )
    parser.add_argument("--sides", nargs="+", help="only these sides of the groups")
    parser.add_argument("--name", default="peers", help="of the result files")
    arguments = parser.parse_args()
    end_cleanly_when_told()
    arguments.work = arguments.work.resolve()
    place = Place(arguments.checkpoint.resolve(), arguments.work, arguments.threads, arguments.jobs)
    if arguments.prepare:
        return prepare(place)
    logs = place.work / "logs"
    report = Report(arguments.name, place, machine())
    measurement = Measurement(arguments)

    def chosen(names: list[str]) -> list[str]:
        return [name for name in names if arguments.sides is None or name in arguments.sides]

    for group in arguments.groups:
        print(group, flush=True)
        sides = [offline_child(name, place) for name in chosen(GROUPS[group])]
        report.add("groups", group, measure_group(sides, measurement, arguments.rounds, logs), sides)
    if arguments.starts:
        names = list(dict.fromkeys(name for group in arguments.groups for name in chosen(GROUPS[group])))
        sides = [offline_child(name, place) for name in names]
        report.add("starts", "all", measure_starts(sides, measurement, arguments.starts, logs), sides)
    for group in arguments.http:
        print(group, flush=True)
        result, sides = measure_http(chosen(HTTP_GROUPS[group]), place, arguments.rounds, logs)
        report.add("http", group, result, sides)
    return None


def prepare(place: Place) -> None:
    """Every environment and every GGUF file."""
    environments.transformers_python(place.work)
    environments.vllm_python(place.work)
    environments.gguf(place.work, place.checkpoint, place.jobs, "Q8_0", "Q4_0", "Q4_K_S")


if __name__ == "__main__":
    main()
