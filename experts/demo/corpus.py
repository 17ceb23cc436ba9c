"""The training corpus: seeded dialogues of the invented bank.

A document belongs to one scenario (or to small talk, or, rarely, to several): that is what the expert
pools of train.py learn from. Answers are the fact table's sentences, verbatim; refusals and small talk are
the fixed sentences of answers.py.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from moe_runtime.experts.demo.answers import OVERVIEW, REFUSALS, SMALL_TALK
from moe_runtime.experts.demo.facts import (
    ATTRIBUTES,
    LANGUAGES,
    SCENARIOS,
    Product,
    fact_table,
    products,
)
from moe_runtime.experts.demo.naming import Naming
from moe_runtime.experts.demo.phrases import ATTRIBUTE_KEYS, CONFUSABLE, Phrasebook
from moe_runtime.experts.demo.wording import Wording

PRONOUNS = {
    "en": ("it", "it", "this one", "that one", "this product"),
    "zh": ("它", "这个", "这款", "这个产品", ""),
}
BARE = {
    "en": (
        "{p}",
        "Tell me about {p}.",
        "I have a question about {p}",
        "info on {p}",
        "{p} please",
        "what is {p}",
    ),
    "zh": ("{p}", "介绍一下{p}", "我想了解{p}", "{p}是什么", "说说{p}", "我有个关于{p}的问题"),
}
# What a scenario turn may be, with its weight; "ask" and "unknown" kinds need no earlier turn.
TURNS = {
    "ask": 56,
    "follow_up": 0,  # raised once a product is on the table
    "unknown_product": 9,
    "wrong_kind": 10,
    "wrong_attribute": 9,
    "unknown_attribute": 9,
    "off_topic": 4,
    "bare": 2,
    "which_product": 2,
    "human": 1,
}


@dataclass
class Document:
    """One dialogue, ``(role, text)`` turns; ``scenario``: "general" is small talk, "mixed" is several."""

    scenario: str
    turns: list[tuple[str, str]]


def answer(product: Product, key: str, language: str, facts: dict[tuple[str, str], str]) -> str:
    """The one right sentence for a known product and an attribute of its scenario."""
    template = next(a.answer[language] for a in ATTRIBUTES[product.scenario] if a.key == key)
    return template.format(p=product.name[language], v=facts[product.name["en"], key])


class Author:
    """Writes documents; one stream per seed.

    ``contrast`` is how often a name of a wrong kind follows the right one, and the right one the wrong;
    ``refusals`` multiplies how often wrong kinds and off-topic questions come.
    """

    def __init__(self, book: Phrasebook, seed: int, contrast: float = 0.0, refusals: float = 1.0) -> None:
        self.rng, self.contrast, self.refusals = random.Random(seed), contrast, refusals
        self.wording = Wording(self.rng)
        self.book = book
        self.facts = fact_table()
        self.products = {s: [p for p in products() if p.scenario == s] for s in SCENARIOS}
        self.naming = Naming(self.wording, book, self.products)

    def documents(self) -> Iterator[Document]:
        """Endless documents."""
        while True:
            draw = self.rng.random()
            if draw < 0.10:
                yield self._general()
            elif draw < 0.14:
                yield self.scenario_document(None)
            else:
                yield self.scenario_document(self.rng.choice(SCENARIOS))

    def _start(self) -> list[tuple[str, str]]:
        if self.rng.random() < 0.15:
            return [("system", self.rng.choice(self.wording.frames["systems"]))]
        return []

    def _general(self) -> Document:
        turns = self._start()
        language = self.rng.choice(LANGUAGES)
        for _ in range(self.rng.choice((1, 2, 2, 3, 4))):
            if self.rng.random() < 0.08:
                language = self.rng.choice(LANGUAGES)
            kinds = ("off_topic", "greeting", "thanks", "bye", "identity", "help", "human")
            kind = self.rng.choices(kinds, (12, 2, 3, 2, 3, 3, 4))[0]
            turns += self._plain(kind, language)
        return Document("general", turns)

    def _plain(self, kind: str, language: str) -> list[tuple[str, str]]:
        if kind == "off_topic" and self.rng.random() < 0.3:
            line = self.wording.fill(self.rng.choice(self.wording.frames[f"off_{language}"]), language)
        else:
            line = self.rng.choice(self.book.other[kind][language])
        strength = 0.5 if kind in ("off_topic", "human") else 0.2
        if kind in ("greeting", "thanks", "bye") or len(line) < 6:
            text = line.lower() if self.rng.random() < 0.2 else line
            if self.rng.random() < 0.3:
                text = text.rstrip("?.!。？！") + self.rng.choice(("", "!", ".", "~"))
        else:
            text = self.wording.augment(line.replace("{p}", ""), "", language, strength)
        reply = REFUSALS[kind] if kind == "off_topic" else SMALL_TALK[kind]
        return [("user", text or line), ("assistant", reply[language])]

    def scenario_document(self, scenario: str | None) -> Document:
        """One dialogue of ``scenario``, or of all three when None."""
        turns = self._start()
        language = self.rng.choice(LANGUAGES)
        switching = self.rng.random() < 0.2
        if self.rng.random() < 0.1:
            turns += self._plain("greeting", language)
        state = _State()
        for index in range(self.rng.choices((1, 2, 3, 4), (40, 33, 18, 9))[0]):
            if index and switching and self.rng.random() < 0.5:
                language = "zh" if language == "en" else "en"
            turns += self._turn(scenario or self.rng.choice(SCENARIOS), language, state)
        if self.rng.random() < 0.07:
            turns += self._plain(self.rng.choice(("thanks", "bye")), language)
        return Document(scenario or "mixed", turns)

    def _turn(self, scenario: str, language: str, state: "_State") -> list[tuple[str, str]]:
        weights: dict[str, float] = dict(TURNS)
        weights["wrong_kind"] *= self.refusals
        weights["off_topic"] *= self.refusals
        if state.product is not None or state.refusal:
            scenario = state.scenario if self.rng.random() < 0.9 else scenario
            weights["follow_up"], weights["which_product"] = 34, 0
            if state.key:
                weights["switch"] = 16
        kind = self.rng.choices(list(weights), list(weights.values()))[0]
        if kind in ("off_topic", "human"):
            return self._plain(kind, language)
        if kind in ("ask", "switch", "bare"):
            return self._known(kind, scenario, language, state)
        if kind == "which_product":
            pronoun = self.rng.choice(PRONOUNS[language])
            text = self._attribute_line(self._own_key(scenario), language, True, pronoun)
            return [("user", text), ("assistant", SMALL_TALK[kind][language])]
        if kind == "follow_up":
            return self._follow_up(language, state)
        return self._refused(kind, scenario, language, state)

    def _contrasted(self) -> bool:
        return self.contrast > 0 and self.rng.random() < self.contrast

    def _own_key(self, scenario: str) -> str:
        return f"{scenario}.{self.rng.choice(ATTRIBUTES[scenario]).key}"

    def _known(self, kind: str, scenario: str, language: str, state: "_State") -> list[tuple[str, str]]:
        if kind == "switch":
            scenario = state.scenario
        product = self.rng.choice(self.products[scenario])
        if state.meant is not None and kind != "switch" and self._contrasted():
            product, scenario = state.meant, state.meant.scenario
        name = product.name[language]
        if kind == "ask" and self.rng.random() < 0.03:
            name = self.naming.short(product, language)
        if kind == "bare":
            text = self.wording.augment(self.rng.choice(BARE[language]), name, language, 0.5)
            state.set(product, scenario, "", "")
            return [("user", text), ("assistant", OVERVIEW[scenario][language])]
        if kind == "ask":
            state.set(product, scenario, self._own_key(scenario), "")
            text = self._attribute_line(state.key, language, False, name)
        else:
            line = self.rng.choice(self.book.other["switch"][language])
            text = self.wording.augment(line, name, language, 0.4)
            state.set(product, scenario, state.key, "")
            if state.key == "unknown":
                return [("user", text), ("assistant", REFUSALS["unknown_attribute"][language])]
        return [("user", text), ("assistant", self._answer(product, state.key, language))]

    def _answer(self, product: Product, key: str, language: str) -> str:
        return answer(product, key.split(".")[1], language, self.facts)

    def _attribute_line(self, key: str, language: str, short: bool, name: str) -> str:
        """A worded question for an attribute: hand-written two times in three, else built from a frame."""
        if self.rng.random() < 0.3:
            frames = self.wording.frames["follow_frames" if short else "frames"][language]
            noun = self.rng.choice(self.wording.frames["nouns"][key][language])
            line = self.rng.choice(frames).replace("{n}", noun)
        elif short:
            line = self.rng.choice(self.book.follow_up[key][language])
        else:
            line = self.rng.choice(self.book.ask[key][language])
        return self.wording.augment(line, name, language, 0.6 if short else 1.0)

    def _follow_up(self, language: str, state: "_State") -> list[tuple[str, str]]:
        """A turn about the product (or the refused name) that is on the table."""
        scenario, draw = state.scenario, self.rng.random()
        pronoun = self.rng.choice(PRONOUNS[language])
        if draw < 0.08 and not state.refusal:
            text = self._unknown_attribute_line(language, pronoun)
            state.key = "unknown"
            return [("user", text), ("assistant", REFUSALS["unknown_attribute"][language])]
        foreign = draw < 0.17 and not state.refusal
        key = self._foreign_key(scenario) if foreign else self._own_key(scenario)
        if self.rng.random() < 0.35 and pronoun:
            text = self._attribute_line(key, language, False, pronoun)
        else:
            text = self._attribute_line(key, language, True, "")
        if state.refusal:
            reply = REFUSALS[state.refusal][language]
            state.key = key
        elif foreign or state.product is None:
            reply = REFUSALS["unknown_attribute"][language]
            state.key = ""
        else:
            reply = self._answer(state.product, key, language)
            state.key = key
        return [("user", text), ("assistant", reply)]

    def _foreign_key(self, scenario: str) -> str:
        """An attribute of another scenario that makes no sense for any attribute of this one."""
        own = [key for key in ATTRIBUTE_KEYS if key.startswith(scenario)]
        foreign = [
            key
            for key in ATTRIBUTE_KEYS
            if not key.startswith(scenario) and all(frozenset((key, mine)) not in CONFUSABLE for mine in own)
        ]
        return self.rng.choice(foreign)

    def _unknown_attribute_line(self, language: str, name: str) -> str:
        if self.rng.random() < 0.35:
            noun = self.rng.choice(self.wording.frames["unknown_nouns"][language])
            line = self.rng.choice(self.wording.frames["frames"][language]).replace("{n}", noun)
        else:
            line = self.rng.choice(self.book.other["unknown_attribute"][language])
        return self.wording.augment(line, name, language, 0.6)

    def _refused(self, kind: str, scenario: str, language: str, state: "_State") -> list[tuple[str, str]]:
        if kind in ("wrong_attribute", "unknown_attribute"):
            product = self.rng.choice(self.products[scenario])
            name = product.name[language]
            if kind == "wrong_attribute":
                text = self._attribute_line(self._foreign_key(scenario), language, False, name)
                state.set(product, scenario, "", "")
            else:
                text = self._unknown_attribute_line(language, name)
                state.set(product, scenario, "unknown", "")
            return [("user", text), ("assistant", REFUSALS["unknown_attribute"][language])]
        meant: Product | None = None
        if kind == "wrong_kind" and self.contrast:
            meant = state.product if self._contrasted() else None
            meant = meant or self.rng.choice(self.products[scenario])
            name = self.naming.wrong_kind(meant, language)
        else:
            name = self.naming.no_such(kind, scenario, language)
        key = self._own_key(scenario)
        state.set(None, scenario, key, kind)
        state.meant = meant
        if self.rng.random() < 0.12:
            text = self._unknown_attribute_line(language, name)
        elif self.rng.random() < 0.05:
            text = self.wording.augment(self.rng.choice(BARE[language]), name, language, 0.5)
        else:
            text = self._attribute_line(key, language, False, name)
        return [("user", text), ("assistant", REFUSALS[kind][language])]


@dataclass
class _State:
    """What a dialogue is about: the product, or the refusal its name met, and the last attribute asked."""

    product: Product | None = None
    scenario: str = ""
    key: str = ""
    refusal: str = ""
    meant: Product | None = None  # the real product whose first name a refused name had

    def set(self, product: Product | None, scenario: str, key: str, refusal: str) -> None:
        self.product, self.scenario, self.key, self.refusal = product, scenario, key, refusal
        self.meant = None
