"""The evaluation's questions: phrasings crossed with products, and what the right reply is."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from moe_runtime.experts.demo.answers import REFUSALS, SMALL_TALK
from moe_runtime.experts.demo.corpus import answer
from moe_runtime.experts.demo.facts import (
    ATTRIBUTES,
    KINDS,
    LANGUAGES,
    SCENARIOS,
    Product,
    fact_table,
    products,
)
from moe_runtime.experts.demo.phrases import CONFUSABLE, Phrasebook

SMALL = ("greeting", "thanks", "bye", "identity", "help", "human")


@dataclass(frozen=True)
class Question:
    """User turns, asked one after the other; the reply to the last is scored."""

    category: str
    scenario: str  # empty where none applies
    language: str
    turns: tuple[str, ...]
    expected: str


def _put(line: str, name: str) -> str:
    return line.replace("{p}", name)


class Examiner:
    """Builds questions from one phrasebook; the same for the same seed."""

    def __init__(self, book: Phrasebook, seed: int = 7, products_per_line: int = 8) -> None:
        self.book, self.rng, self.count = book, random.Random(seed), products_per_line
        self.facts = fact_table()
        self.products = {s: [p for p in products() if p.scenario == s] for s in SCENARIOS}

    def all(self) -> list[Question]:
        """Facts, then refusals, then small talk."""
        return [*self.asks(), *self.later_turns(), *self.refusals(), *self.small_talk()]

    def _right(self, product: Product, key: str, language: str) -> str:
        return answer(product, key.split(".")[1], language, self.facts)

    def asks(self) -> Iterator[Question]:
        """Every phrasing with several products."""
        for key, by_language in self.book.ask.items():
            scenario = key.split(".")[0]
            for language, lines in by_language.items():
                for line in lines:
                    for product in self.rng.sample(self.products[scenario], self.count):
                        text = _put(line, product.name[language])
                        right = self._right(product, key, language)
                        yield Question("ask", scenario, language, (text,), right)

    def _first_turn(self, product: Product, language: str, avoid: str = "") -> tuple[str, str]:
        keys = [f"{product.scenario}.{a.key}" for a in ATTRIBUTES[product.scenario]]
        key = self.rng.choice([k for k in keys if k != avoid and self.book.ask[k][language]])
        return key, _put(self.rng.choice(self.book.ask[key][language]), product.name[language])

    def later_turns(self) -> Iterator[Question]:
        """Follow-ups (another attribute, no product named) and switches (another product, no attribute)."""
        for key, by_language in self.book.follow_up.items():
            scenario = key.split(".")[0]
            for language, lines in by_language.items():
                for line in lines:
                    for product in self.rng.sample(self.products[scenario], min(3, self.count)):
                        _, first = self._first_turn(product, language, avoid=key)
                        right = self._right(product, key, language)
                        yield Question("follow_up", scenario, language, (first, line), right)
        for scenario in SCENARIOS:
            for language in LANGUAGES:
                for line in self.book.other["switch"][language]:
                    for _ in range(2 * self.count):
                        one, two = self.rng.sample(self.products[scenario], 2)
                        key, first = self._first_turn(one, language)
                        turns = (first, _put(line, two.name[language]))
                        yield Question("switch", scenario, language, turns, self._right(two, key, language))

    def refusals(self) -> Iterator[Question]:
        """Unknown products, wrong kinds, wrong and unknown attributes, off-topic."""
        for language in LANGUAGES:
            for name in self.book.other["unknown_product"][language]:
                scenario = next(
                    s
                    for s, kinds in KINDS.items()
                    if name.endswith(tuple(k[language] for k in kinds.values()))
                )
                for _ in range(2):
                    text = _put(self._any_ask(scenario, language), name)
                    yield self._refusal("unknown_product", scenario, language, text)
            for scenario in SCENARIOS:
                labels = [k[language] for k in KINDS[scenario].values()]
                for product in self.products[scenario]:
                    joint = " " if language == "en" else ""
                    wrong = [x for x in labels if not product.name[language].endswith(joint + x)]
                    name = product.first[language] + joint + self.rng.choice(wrong)
                    text = _put(self._any_ask(scenario, language), name)
                    yield self._refusal("wrong_kind", scenario, language, text)
            yield from self._foreign(language)
            for line in self.book.other["unknown_attribute"][language]:
                for scenario in SCENARIOS:
                    product = self.rng.choice(self.products[scenario])
                    text = _put(line, product.name[language])
                    yield self._refusal("unknown_attribute", scenario, language, text)
            for line in self.book.other["off_topic"][language]:
                yield self._refusal("off_topic", "", language, line)

    def _foreign(self, language: str) -> Iterator[Question]:
        for key, by_language in self.book.ask.items():
            for scenario in SCENARIOS:
                own = [f"{scenario}.{a.key}" for a in ATTRIBUTES[scenario]]
                if key in own or any(frozenset((key, mine)) in CONFUSABLE for mine in own):
                    continue
                for line in self.rng.sample(by_language[language], min(4, len(by_language[language]))):
                    product = self.rng.choice(self.products[scenario])
                    text = _put(line, product.name[language])
                    question = self._refusal("unknown_attribute", scenario, language, text)
                    yield Question("wrong_attribute", scenario, language, question.turns, question.expected)

    def _any_ask(self, scenario: str, language: str) -> str:
        keys = [f"{scenario}.{a.key}" for a in ATTRIBUTES[scenario]]
        return self.rng.choice([line for key in keys for line in self.book.ask[key][language]])

    def _refusal(self, kind: str, scenario: str, language: str, text: str) -> Question:
        return Question(kind, scenario, language, (text,), REFUSALS[kind][language])

    def small_talk(self) -> Iterator[Question]:
        """Greetings and the like, as first turns."""
        for category in SMALL:
            for language in LANGUAGES:
                for line in self.book.other[category][language]:
                    yield Question(category, "", language, (line,), SMALL_TALK[category][language])


def sample(book: Phrasebook, lines: int, seed: int = 11) -> Phrasebook:
    """At most ``lines`` phrasings per attribute or category and language."""
    rng = random.Random(seed)

    def cut(by_language: dict[str, list[str]], limit: int) -> dict[str, list[str]]:
        return {lang: rng.sample(found, min(limit, len(found))) for lang, found in by_language.items()}

    return Phrasebook(
        {key: cut(by, lines) for key, by in book.ask.items()},
        {key: cut(by, max(1, lines // 2)) for key, by in book.follow_up.items()},
        {key: cut(by, 5 * lines) for key, by in book.other.items()},
    )
