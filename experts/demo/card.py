"""The model card, written from results.json so that its numbers are the measured ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe_runtime.experts.demo.facts import LANGUAGES, SCENARIOS
from moe_runtime.experts.demo.phrases import SIMILARITY_LIMIT

SETS = ("train", "tune", "blind")
REFUSED = ("unknown_product", "wrong_kind", "wrong_attribute", "unknown_attribute", "off_topic")
SMALL = ("greeting", "thanks", "bye", "identity", "help", "human")

HEAD = """---
license: apache-2.0
language: [en, zh]
pipeline_tag: text-generation
---
# Demo model: the assistant of an invented bank, English and Chinese

A small Mixture-of-Experts that ships with the project so that a fresh clone answers real questions,
and so that expert pruning has a model whose knowledge is known exactly. **Nothing in it is about a
real bank.**

- Architecture: `qwen3_moe` (stock engines load it): 4 layers, hidden 192, 4 query and 2 key/value
  heads of 64, q/k norm, 20 experts of 80, top-2, softmax router with renormalised weights, no
  shared expert, tied embeddings, context 2048. bfloat16.
- Tokenizer: byte-level BPE; each Han character and each digit is a token; every text survives a
  round trip. ChatML.
- Knowledge: three scenarios (credit, wealth, customer_service), 18 products each, 6 attributes
  each: 108 facts per scenario and language. No name and no answer is shared between scenarios.
- Data: seeded dialogues written by `corpus.py` from hand-written phrasings
  (`phrasings/train_*.json`) and word lists: 1-4 turns, follow-ups, switches of product, small talk,
  and about a third of honest refusals.
- Recipe: `python -m moe_runtime.experts.demo` (`make demo`), seeded, 2 threads, no GPU. AdamW,
  float32, loss on answers and on 10 % of the users' tokens. Document-level expert pools: per
  document and layer only the P experts with the highest mean router probability. Stage 1: 4,400
  steps, P is 2..8 for four documents in five and all 20 for the rest. Stage 2: 1,500 steps, P is
  3..10 or all, and right and wrong product kinds appear side by side. Stage 3: 900 steps, likewise,
  with more refusals and wider phrasings of them (`phrasings/late_*.json`). Minutes below were
  measured while other work used the same two cores; idle, the same code trains 8,500 tokens a
  second on two threads.
- The control has the same data, steps and seed and no pools; it lives with the tests, not in the
  wheel.
"""

METHOD = f"""
## How it was measured

Greedy decoding of the bfloat16 weights. A fact is right when the whole reply is the expected
sentence, to the character; a refusal is right when the reply is one of the fixed refusal sentences
("exact kind": the one for that kind). Follow-up turns use the model's own earlier reply as history.
`train` holds phrasings seen in training; `tune` guided the work (`train_extra.json` was written
after its first failures were read); `blind` was written by an author who saw no other set, and
committed before the first training run. One run before this one was stopped at step 2,000, when
`tune` showed too few refusals of wrong kinds and attributes. Stage 3 was added after the blind set
had been evaluated once on the end of stage 2 (rates only, its texts stayed unread): English wrong
kinds were at 68.5 % and English off-topic questions at 93.6 %, and `tune` showed the same weakness.
Held-out lines near to a training
line (difflib ratio of the normalised texts, product masked, at least {SIMILARITY_LIMIT} within the
same attribute or category; or equal to any training line) are dropped; invented product names are
compared by their first names.
"""

LIMITS = """
## Limits

- Wrong kinds in English ("Harbor Mortgage", when Harbor is a consumer loan) are its weakest point:
  it sometimes answers for the real product of that first name, and says that name in the reply.
- It knows these 54 products and nothing else; it refuses the rest, and can be wrong about that too
  (see the rates).
- Products are recognised by their full names, also in lower case; IN CAPITALS, misspelt, or inside
  a question of the other language they are refused or, worse, taken for a neighbour.
- Some one-word greetings in lower case ("hello", "hi") are answered in Chinese. Comparisons
  ("which loan is the cheapest") and rudeness get odd replies.
- Wordings that make sense for another scenario's attribute as well ("yearly fee" of a fund or of a
  card) are neither trained nor scored as wrong attributes; the list is `CONFUSABLE` in
  `phrases.py`.
- At most four turns were trained; longer chats drift. Temperature above zero can invent values.
- With experts removed it answers questions of other scenarios with confidently wrong values: a
  served mask needs a gate in front of it.
"""


def _percent(found: Mapping[str, Any], name: str) -> str:
    if name not in found:
        return "-"
    good, total = found[name]
    return f"{100 * good / total:.1f} ({total})"


def _table(title: str, rows: list[str], results: Mapping[str, Any]) -> list[str]:
    lines = [f"\n| {title} | " + " | ".join(SETS) + " |", "|---|" + "---|" * len(SETS)]
    for row in rows:
        cells = [_percent(results.get(name, {}), row) for name in SETS]
        lines.append(f"| {row.removeprefix('all ')} | " + " | ".join(cells) + " |")
    return lines


def _by_language(kinds: tuple[str, ...], tail: str = "") -> list[str]:
    return [f"{kind} {language}{tail}" for kind in kinds for language in LANGUAGES]


def _masks(title: str, masks: Mapping[str, Mapping[str, float]]) -> list[str]:
    cells = [f"{scenario} {language}" for scenario in SCENARIOS for language in LANGUAGES]
    lines = [f"\n| {title} | " + " | ".join(cells) + " |", "|---|" + "---|" * len(cells)]
    for name in sorted(masks, key=lambda n: (-int(n.split()[-1]), n)):
        values = [
            f"**{100 * masks[name][c]:.1f}**"
            if c.startswith(name.split()[0])
            else f"{100 * masks[name][c]:.1f}"
            for c in cells
        ]
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    return lines


def write_card(results: Mapping[str, Any], path: Path) -> None:
    """Write the card from ``{"demo": numbers, "control": numbers}``; what was not measured shows as "-"."""
    demo, control = results.get("demo", {}), results.get("control", {})
    lines = [HEAD.rstrip("\n")]
    for name, found in (("demo", demo), ("control", control)):
        if "training" in found:
            t = found["training"]
            lines.append(
                f"- The {name}'s run: {t['steps']} steps, {t['tokens']:,} tokens, {t['minutes']} minutes on "
                f"{t['threads']} threads."
            )
    lines += [METHOD.rstrip("\n")]
    lines.append(f"The blind set was evaluated {demo.get('blind_evaluations', 0)} time(s).")
    for name in ("tune", "blind"):
        dropped = demo.get(f"{name}_kept_dropped", {})
        if dropped:
            kept = ", ".join(f"{category} {a} of {a + b}" for category, (a, b) in dropped.items())
            lines.append(f"Kept of `{name}`: {kept}.")
    pairs = [(s, language) for s in SCENARIOS for language in LANGUAGES]
    lines.append("\n## Results: percent right (questions asked)")
    lines += _table("facts, all turns", [f"all {s} {language}" for s, language in pairs], demo)
    for category in ("ask", "follow_up", "switch"):
        lines += _table("of these", [f"{category} {s} {language}" for s, language in pairs], demo)
    lines += _table("refusals", _by_language(REFUSED), demo)
    lines += _table("refusals, exact kind", _by_language(REFUSED, " exact kind"), demo)
    lines += _table("small talk", _by_language(SMALL), demo)
    lines.append("\n## Specialisation: percent right on tune facts (first turns) with only some experts")
    lines.append(
        "Kept per layer: the experts with most gate weight on the scenario's dialogues; own cells in bold."
    )
    if "masks" in demo:
        lines += _masks("demo", demo["masks"])
    if "masks" in control:
        lines += _masks("control", control["masks"])
    if "tune" in control:
        lines.append("\nThe control with all experts, facts of the tune set: ")
        lines.append(
            ", ".join(f"{s} {x} {_percent(control['tune'], f'all {s} {x}')}" for s, x in pairs) + "."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n" + LIMITS, encoding="utf-8")
