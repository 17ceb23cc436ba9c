"""``python -m moe_runtime.experts.demo``: train the demo model, evaluate it, write its card.

Without arguments everything runs, in under an hour on two cores. Steps apart: ``train`` (``--control`` for
the ordinary Mixture-of-Experts without pools), ``evaluate``, ``card``. And ``texts``: scenario texts for
``moe-experts``, into a folder.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import torch

from moe_runtime.experts.demo import MODEL, checkpoint, tokens
from moe_runtime.experts.demo.card import write_card
from moe_runtime.experts.demo.evaluate import evaluate, specialisation
from moe_runtime.experts.demo.texts import write_texts
from moe_runtime.experts.demo.train import Recipe, prepare, save, train

HERE = Path(__file__).parent
CONTROL = Path("tests") / "data" / "demo_control"
RESULTS = HERE / "results.json"


def read_results() -> dict[str, Any]:
    """Numbers kept so far: ``{"demo": {...}, "control": {...}}``."""
    if not RESULTS.exists():
        return {}
    found: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def keep_results(which: str, **found: Any) -> None:
    """Merge numbers into results.json."""
    results = read_results()
    results.setdefault(which, {}).update(found)
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def run_train(control: bool, folder: Path, steps: int | None) -> None:
    """Train and save one model; note tokens and minutes."""
    recipe = dataclasses.replace(Recipe(), pools=not control)
    if steps is not None:
        recipe = dataclasses.replace(
            recipe, stages=tuple(dataclasses.replace(stage, steps=steps) for stage in recipe.stages)
        )
    tokenizer = prepare(recipe)
    network, seen, minutes = train(recipe, tokenizer, log=lambda line: print(line, flush=True))
    save(network, tokenizer, folder)
    keep_results(
        "control" if control else "demo",
        training={
            "steps": sum(stage.steps for stage in recipe.stages),
            "tokens": seen,
            "minutes": round(minutes, 1),
            "threads": recipe.threads,
        },
    )


def run_evaluate(which: str, folder: Path, sets: list[str], threads: int) -> None:
    """Rates per set and, for all sets but the blind one, the specialisation under expert masks."""
    torch.set_num_threads(threads)
    network, tokenizer = checkpoint.load(folder), tokens.load(folder)
    for name in sets:
        start = time.monotonic()
        if name == "masks":
            keep_results(which, masks=specialisation(network, tokenizer, "tune"))
        else:
            found, dropped = evaluate(network, tokenizer, name)
            keep_results(which, **{name: found, f"{name}_kept_dropped": dropped})
            for cell, (good, total) in sorted(found.items()):
                print(f"{name} {cell}: {good}/{total} = {100 * good / total:.1f} %")
            if name == "blind":
                times = read_results()[which].get("blind_evaluations", 0) + 1
                keep_results(which, blind_evaluations=times)
        print(f"{which} {name}: {time.monotonic() - start:.0f} s", flush=True)


def main() -> None:
    """Parse the command line and run the steps."""
    parser = argparse.ArgumentParser(prog="moe_runtime.experts.demo", description=__doc__)
    parser.add_argument(
        "step", nargs="?", choices=("all", "train", "evaluate", "card", "texts"), default="all"
    )
    parser.add_argument("--control", action="store_true", help="the ordinary model without expert pools")
    parser.add_argument("--output", type=Path, help="model folder to write, or to evaluate")
    parser.add_argument("--steps", type=int, help="steps of each stage, fewer to try the recipe")
    parser.add_argument("--sets", nargs="+", default=["train", "tune", "blind", "masks"])
    parser.add_argument("--threads", type=int, default=2, help="for evaluate; training's are in the recipe")
    arguments = parser.parse_args()
    if arguments.step == "texts":
        folder = arguments.output or Path("demo_texts")
        for name, count in write_texts(folder).items():
            print(f"{folder / name}: {count} lines")
        return
    which = "control" if arguments.control else "demo"
    folder = arguments.output or (CONTROL if arguments.control else MODEL)
    if arguments.step in ("all", "train"):
        run_train(arguments.control, folder, arguments.steps)
    if arguments.step in ("all", "evaluate"):
        run_evaluate(which, folder, arguments.sets, arguments.threads)
    if arguments.step in ("all", "card"):
        write_card(read_results(), MODEL / "README.md")


if __name__ == "__main__":
    main()
