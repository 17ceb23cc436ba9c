"""Phrasing files: how customers word a question. Reading, merging, and the rule for near-duplicates.

``{p}`` in a phrasing stands for the product's full name. Three sets were written by different authors:
``train_*.json`` (and ``late_*.json``, added for the last stage), ``tune.json`` and ``blind.json``; only the
final evaluation reads the last.
"""

import difflib
import json
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_runtime.errors import ConfigError
from moe_runtime.experts.demo.facts import ATTRIBUTES, KINDS, LANGUAGES

FOLDER = Path(__file__).parent / "phrasings"
BY_ATTRIBUTE = ("ask", "follow_up")
PLAIN = (
    "switch",
    "unknown_attribute",
    "unknown_product",
    "off_topic",
    "greeting",
    "thanks",
    "bye",
    "identity",
    "help",
    "human",
)
WITH_PRODUCT = ("ask", "switch", "unknown_attribute")
SIMILARITY_LIMIT = 0.85
TRAINING = ("train", "late")  # every phrasing some stage of the recipe sees

ATTRIBUTE_KEYS = tuple(f"{scenario}.{a.key}" for scenario, group in ATTRIBUTES.items() for a in group)

# Pairs whose wordings mean something sensible for the other scenario too ("yearly fee" of a fund or of a
# card), so that a refusal would be pedantry: neither trained nor scored as "wrong attribute".
CONFUSABLE = frozenset(
    frozenset(pair)
    for pair in (
        ("credit.rate", "wealth.target"),
        ("credit.rate", "wealth.fee"),
        ("credit.rate", "customer_service.annual"),
        ("wealth.fee", "customer_service.annual"),
        ("credit.amount", "customer_service.limit"),
        ("credit.approval", "customer_service.opening"),
        ("credit.term", "wealth.lockup"),
    )
)


@dataclass
class Phrasebook:
    """Phrasings by attribute (``ask``, ``follow_up``) and by other category, each by language."""

    ask: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    follow_up: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    other: dict[str, dict[str, list[str]]] = field(default_factory=dict)

    def add(self, raw: dict[str, Any]) -> None:
        """Merge one file's content; order of files and lines is kept, repeats are dropped."""
        for category, by_key in raw.items():
            if category in BY_ATTRIBUTE:
                group = self.ask if category == "ask" else self.follow_up
                for key, by_language in by_key.items():
                    _merge(group.setdefault(key, {}), by_language)
            else:
                _merge(self.other.setdefault(category, {}), by_key)


def _merge(target: dict[str, list[str]], by_language: dict[str, list[str]]) -> None:
    for language, lines in by_language.items():
        known = target.setdefault(language, [])
        known.extend(line for line in dict.fromkeys(lines) if line not in known)


def problems(raw: dict[str, Any]) -> list[str]:
    """What is wrong with one phrasing file's content, in words; empty when it follows the format."""
    found = []
    for category, content in raw.items():
        if category in BY_ATTRIBUTE:
            lists = [(f"{category}.{k}.{lang}", v) for k, by in content.items() for lang, v in by.items()]
            found += [f"{category}: unknown attribute {key}" for key in content if key not in ATTRIBUTE_KEYS]
        elif category in PLAIN:
            lists = [(f"{category}.{lang}", v) for lang, v in content.items()]
        else:
            found.append(f"unknown category {category}")
            continue
        for name, lines in lists:
            if name.rsplit(".", 1)[1] not in LANGUAGES:
                found.append(f"{name}: unknown language")
            wanted = 1 if category in WITH_PRODUCT else 0
            found += [
                f"{name}: {line!r} needs {wanted} of {{p}}" for line in lines if line.count("{p}") != wanted
            ]
    return found


def read(path: Path) -> dict[str, Any]:
    """One phrasing file's content, checked. Raises ConfigError naming the file's first problem."""
    raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    wrong = problems(raw)
    if wrong:
        raise ConfigError(f"{path.name}: {wrong[0]}")
    return raw


def load(*names: str) -> Phrasebook:
    """Sets merged in order: ``train`` and ``late`` (all ``<name>_*.json``, by name), ``tune``, ``blind``."""
    book = Phrasebook()
    for name in names:
        several = sorted(FOLDER.glob(f"{name}_*.json")) if name in TRAINING else [FOLDER / f"{name}.json"]
        for path in several:
            book.add(read(path))
    return book


def normalise(phrasing: str) -> str:
    """Lower case, product masked, letters and digits only, single spaces: what similarity compares."""
    text = unicodedata.normalize("NFKC", phrasing).lower().replace("{p}", " ppp ")
    return re.sub(r"[\W_]+", " ", text).strip()


def too_near(phrasing: str, training: list[str]) -> bool:
    """True when difflib's ratio of the normalised texts reaches SIMILARITY_LIMIT for any training line."""
    text = normalise(phrasing)
    matcher = difflib.SequenceMatcher(autojunk=False)
    matcher.set_seq2(text)
    for line in training:
        matcher.set_seq1(normalise(line))
        if (
            matcher.real_quick_ratio() >= SIMILARITY_LIMIT
            and matcher.quick_ratio() >= SIMILARITY_LIMIT
            and matcher.ratio() >= SIMILARITY_LIMIT
        ):
            return True
    return False


def held_out(book: Phrasebook, training: Phrasebook) -> tuple[Phrasebook, dict[str, tuple[int, int]]]:
    """``book`` without lines near to training, and per category ``(kept, dropped)``.

    A line goes when it is near to a training line of the same attribute (or category) and language, or
    equal after normalisation to any training line at all.
    """
    everywhere = {
        normalise(line)
        for group in (*training.ask.values(), *training.follow_up.values(), *training.other.values())
        for lines in group.values()
        for line in lines
    }
    counts: dict[str, tuple[int, int]] = {}

    def keep(category: str, lines: list[str], near: list[str]) -> list[str]:
        kept = [line for line in lines if normalise(line) not in everywhere and not too_near(line, near)]
        before = counts.get(category, (0, 0))
        counts[category] = (before[0] + len(kept), before[1] + len(lines) - len(kept))
        return kept

    out = Phrasebook()
    for category in BY_ATTRIBUTE:
        source, target, near = getattr(book, category), getattr(out, category), getattr(training, category)
        for key, by_language in source.items():
            target[key] = {
                lang: keep(category, lines, near.get(key, {}).get(lang, []))
                for lang, lines in by_language.items()
            }
    for category, by_language in book.other.items():
        near_lines = training.other.get(category, {})
        out.other[category] = {
            lang: keep(category, lines, near_lines.get(lang, []))
            if category != "unknown_product"
            else _new_names(lines, near_lines.get(lang, []), counts)
            for lang, lines in by_language.items()
        }
    return out, counts


def first_name(product: str) -> str:
    """A product name without its kind: what tells two product names apart."""
    labels = (label for kinds in KINDS.values() for names in kinds.values() for label in names.values())
    return next((product.removesuffix(label) for label in labels if product.endswith(label)), product).strip()


def _new_names(names: list[str], known: list[str], counts: dict[str, tuple[int, int]]) -> list[str]:
    """Invented product names whose first name is not near to one that training used."""
    near = [first_name(name) for name in known]
    kept = [name for name in names if not too_near(first_name(name), near)]
    before = counts.get("unknown_product", (0, 0))
    counts["unknown_product"] = (before[0] + len(kept), before[1] + len(names) - len(kept))
    return kept
