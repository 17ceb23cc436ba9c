"""Lost mass on the demo: prompts of each scenario under each mask, for tests/experts/test_drift.py.

    .venv/bin/python bench/drift.py SCENARIOS --out FILE

SCENARIOS holds <name>/plan.json for credit, wealth and customer_service, made for the demo. A minute on two
cores; the same plans and seed give the same file.
"""

import argparse
import json
import random
from collections import Counter
from pathlib import Path

from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine
from moe_runtime.experts.demo import MODEL
from moe_runtime.experts.demo.corpus import Author
from moe_runtime.experts.demo.facts import SCENARIOS
from moe_runtime.experts.demo.phrases import TRAINING, load
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.prompt_masses import prompt_masses

BIN = 0.005


def prompts(scenario: str, count: int, seed: int) -> list[list[dict[str, str]]]:
    """Dialogues of the demo's corpus up to a random turn of the user."""
    author, rng = Author(load(*TRAINING), seed), random.Random(seed)
    found = []
    while len(found) < count:
        turns = author.scenario_document(scenario).turns
        end = rng.choice([index for index, (role, _) in enumerate(turns) if role == "user"])
        found.append([{"role": role, "content": text} for role, text in turns[: end + 1]])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scenarios", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--own", type=int, default=5000, help="prompts of the mask's own scenario")
    parser.add_argument("--foreign", type=int, default=600, help="prompts of each other one")
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    engine = Engine.load(MODEL, EngineConfig(max_context=2048, packed_file=False))
    chat = engine.chat
    assert chat is not None, "the demo has a chat template"
    counts: dict[str, dict[str, object]] = {}
    plans = {name: PlanFile.load(arguments.scenarios / name / "plan.json") for name in SCENARIOS}
    for name, plan in plans.items():
        counts[name] = {}
        for origin in SCENARIOS:
            number = arguments.own if origin == name else arguments.foreign
            asked = [chat.encode(messages) for messages in prompts(origin, number, arguments.seed)]
            masses = prompt_masses(engine, plan.mask, asked)
            bins = Counter(int(mass / BIN) for mass in masses)
            row = [bins[index] for index in range(min(bins), max(bins) + 1)]
            counts[name][origin] = {"first": min(bins), "counts": row}
            print(f"{origin} under {name}: {number} prompts, mean {sum(masses) / number:.4f}", flush=True)
    told = {
        "bin": BIN,
        "masks": {name: plan.mask.digest for name, plan in plans.items()},
        "requests": f"bench/drift.py, seed {arguments.seed}",
        "counts": counts,
    }
    arguments.out.write_text(json.dumps(told, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
