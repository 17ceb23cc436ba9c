"""One section of bench/gpu.py in a process of its own: runs its cases in order and writes a line for each.

A kernel that faults takes its process's GPU context with it, and one that hangs never comes back. So each
case is announced before it runs; a silent worker is ended and another started behind the case that broke it.
"""

import argparse
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PR_SET_PDEATHSIG = 1
Run = Callable[[], dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--start", type=int, default=0)
    parser.add_argument("--part", default="")
    parser.add_argument("--limits", type=float, nargs=2, default=(1.0, 1.0))
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    die_with_parent()
    if options.dry_run:
        prepare_interpreter()
    with options.json.open("a", encoding="utf-8") as file:

        def say(**line: Any) -> None:
            file.write(json.dumps({"section": options.section, **line}) + "\n")
            file.flush()

        return work(options, say)


def work(options: argparse.Namespace, say: Callable[..., None]) -> int:
    """0 when all is done or time is up, 1 when the GPU can no longer be used."""
    end = time.monotonic() + options.seconds
    for place, (about, run) in enumerate(SECTIONS[options.section](options)):
        if place < options.start:
            continue
        if time.monotonic() > end:
            say(kind="late", case=place, about=about)
            return 0
        say(kind="begin", case=place, about=about)
        try:
            say(kind="row", case=place, **about, **run())
        except Exception as error:  # noqa: BLE001 (whatever a case does, the next one has its turn)
            say(kind="error", case=place, about=about, error=f"{type(error).__name__}: {str(error)[:500]}")
            if not alive(options.dry_run):
                return 1
    say(kind="end")
    return 0


def die_with_parent() -> None:
    """However gpu.py ends, no worker is left behind on the GPU."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def alive(dry_run: bool) -> bool:
    """Whether this process can still compute on the GPU."""
    import torch

    try:
        if not dry_run:
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def prepare_interpreter() -> None:
    """Kernels on the CPU, with the repairs that the tests use."""
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, str(ROOT / "tests" / "kernels" / "triton"))
    import warnings

    from interpreter import repair  # type: ignore[import-not-found]

    warnings.filterwarnings("ignore", category=RuntimeWarning)
    repair()


# --- sections -----------------------------------------------------------------------------------------------


def limits(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Run]]:
    import gpu_limits
    from gpu_clock import make_clock

    def run() -> dict[str, Any]:
        found = gpu_limits.measure(make_clock(options.dry_run), options.dry_run)
        return {
            "bandwidth": found.bandwidth,
            "matmul": found.matmul,
            "chip": gpu_limits.chip(options.dry_run),
        }

    yield {}, run


def check(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Run]]:
    """Experts against float64; ``part`` is "layer format". Leaves Triton's cache full for the measuring."""
    import gpu_moe
    from gpu_clock import make_clock
    from gpu_mixture import build

    clock, grid = make_clock(options.dry_run), chosen_grid(options)
    name, weight_format = options.part.split()
    mixture = build(grid.layers[name], weight_format, clock, sets=1)
    for tokens in grid.tokens:
        about = {"layer": name, "format": weight_format, "tokens": tokens}
        yield about, lambda tokens=tokens: gpu_moe.check(mixture, tokens, clock)


def moe(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Run]]:
    import gpu_moe
    from gpu_clock import make_clock
    from gpu_limits import Limits
    from gpu_mixture import Mixture, build

    clock, grid, best = make_clock(options.dry_run), chosen_grid(options), {}
    built: dict[tuple[str, str], Mixture] = {}

    def run(layer: Any, weight_format: str, tokens: int) -> dict[str, Any]:
        if (layer.name, weight_format) not in built:
            built.clear()  # its memory first
            built[layer.name, weight_format] = build(layer, weight_format, clock)
        mixture = built[layer.name, weight_format]
        return gpu_moe.measure(mixture, tokens, clock, Limits(*options.limits), best)

    for layer, weight_format in grid.cases():
        for tokens in grid.tokens:
            about = {"layer": layer.name, "format": weight_format, "tokens": tokens}
            yield about, lambda case=(layer, weight_format, tokens): run(*case)


def masks(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Run]]:
    import gpu_masks
    from gpu_clock import make_clock
    from gpu_mixture import build

    clock, grid = make_clock(options.dry_run), chosen_grid(options)
    layer, rounds = next(iter(grid.layers.values())), 1 if options.dry_run else 5
    for weight_format in grid.formats[::2]:
        mixture = build(layer, weight_format, clock, sets=int(options.dry_run))
        for tokens in grid.masked_tokens:
            about = {"layer": layer.name, "format": weight_format, "tokens": tokens}
            yield about, lambda case=(mixture, tokens): gpu_masks.measure(*case, clock, rounds)


def ops(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Run]]:
    import gpu_ops
    from gpu_clock import make_clock
    from gpu_limits import Limits
    from gpu_work import SIZES, TOY_SIZES

    clock = make_clock(options.dry_run)
    for case in gpu_ops.cases(TOY_SIZES if options.dry_run else SIZES):
        about = {"op": case.op, "shape": case.shape, "format": case.format, "tokens": case.tokens}
        yield about, lambda case=case: gpu_ops.measure(case, clock, Limits(*options.limits))


def decode(options: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Run]]:
    import gpu_decode
    from gpu_clock import make_clock
    from gpu_limits import Limits

    clock, sizes = make_clock(options.dry_run), gpu_decode.TOY if options.dry_run else gpu_decode.QWEN3
    built: dict[str, gpu_decode.Model] = {}

    def run(weight_format: str, sequences: int) -> dict[str, Any]:
        if weight_format not in built:
            built.clear()  # its memory first
            built[weight_format] = gpu_decode.Model(sizes, weight_format, clock)
        return gpu_decode.measure(built[weight_format], sequences, Limits(*options.limits))

    for weight_format in sizes.formats:
        for sequences in sizes.sequences:
            about = {"layer": sizes.name, "format": weight_format, "tokens": sequences}
            yield about, lambda case=(weight_format, sequences): run(*case)


def chosen_grid(options: argparse.Namespace) -> Any:
    from gpu_shapes import GRID, TOY_GRID

    return TOY_GRID if options.dry_run else GRID


SECTIONS = {"limits": limits, "check": check, "moe": moe, "masks": masks, "ops": ops, "decode": decode}

if __name__ == "__main__":
    sys.exit(main())
