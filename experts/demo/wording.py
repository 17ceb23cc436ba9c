"""Wordings of one user turn: seeded variety around the hand-written phrasings.

Names are drawn from word lists and from made-up syllables, both for products that do not exist and, as
noise, in questions about products that do: an unusual word must never be the sign of an unknown product.
"""

import json
import random
from pathlib import Path

from moe_runtime.experts.demo.facts import FIRST_NAMES, KINDS

FOLDER = Path(__file__).parent
ENDINGS = "?.!。？！"
FULL_TO_HALF = str.maketrans("，？！：", ",?!:")
SAFE_ZH = "的了吗呢啊呀吧请我想你们一下是有么这个"


class Wording:
    """Draws words, names and augmented turns from one seeded generator."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        words = json.loads((FOLDER / "words.json").read_text(encoding="utf-8"))
        self.frames = json.loads((FOLDER / "frames.json").read_text(encoding="utf-8"))
        taken = {name.lower() for group in FIRST_NAMES.values() for pair in group for name in pair}
        self.words = {
            lang: [w for w in lines if w.lower() not in taken] for lang, lines in words["words"].items()
        }
        self.syllables, self.codas = words["syllables"], words["codas"]
        self.small_words = frozenset(words["small_words"])
        self.people, self.cities, self.other_kinds = words["people"], words["cities"], words["other_kinds"]
        self.taken = taken
        # The 3,755 common characters of GB 2312, level 1, without its five empty cells.
        level_one = (bytes((high, low)) for high in range(0xB0, 0xD8) for low in range(0xA1, 0xFF))
        self.characters = [c for c in (b.decode("gb2312", "ignore") for b in level_one) if c]

    def chance(self, probability: float) -> bool:
        return self.rng.random() < probability

    def word(self, language: str) -> str:
        """An ordinary or made-up word that is no product's first name."""
        while True:
            if self.chance(0.5):
                found = self.rng.choice(self.words[language])
            elif language == "en":
                parts = "".join(
                    self.rng.choice(self.syllables) for _ in range(self.rng.choice((1, 2, 2, 2, 3)))
                )
                found = (parts + self.rng.choice(self.codas)).capitalize()
            else:
                found = "".join(
                    self.rng.choice(self.characters) for _ in range(self.rng.choice((2, 2, 2, 3)))
                )
            if len(found) > 1 and found.lower() not in self.taken:
                return found

    def unknown_first(self, language: str) -> str:
        """A first name no product has; sometimes two words, or a real one with a word after it."""
        draw = self.rng.random()
        if draw < 0.06:
            pool = [pair[0 if language == "en" else 1] for group in FIRST_NAMES.values() for pair in group]
            known, other = self.rng.choice(pool), self.word(language)
            return f"{known} {other}" if language == "en" else known + other[:1]
        if draw < 0.22 and language == "en":
            return f"{self.word(language)} {self.word(language)}"
        if draw < 0.25:
            return self.rng.choice(self.cities[language])
        return self.word(language)

    def kind_label(self, scenario: str, language: str) -> str:
        return self.rng.choice([label[language] for label in KINDS[scenario].values()])

    def fill(self, template: str, language: str) -> str:
        """Replace {w} {m} {c} {d} {e} {d2} by random words, people, cities and numbers."""
        values = {
            "w": self.word(language).lower()
            if language == "en" and self.chance(0.8)
            else self.word(language),
            "m": self.rng.choice(self.people[language]),
            "c": self.rng.choice(self.cities[language]),
            "d": str(self.rng.randint(2, 90)),
            "e": str(self.rng.randint(2, 90)),
            "d2": self.rng.choice(self.cities[language]),
        }
        return template.format_map(values)

    def augment(self, phrasing: str, name: str, language: str, strength: float = 1.0) -> str:
        """``phrasing`` varied, with ``{p}`` replaced by ``name`` (which is never damaged)."""
        before, slot, after = phrasing.partition("{p}")
        parts = [before, after] if slot else [before]
        if self.chance(0.22 * strength):
            parts = [self._drop(part, language) for part in parts]
        if self.chance(0.10 * strength):
            index = self.rng.randrange(len(parts))
            parts[index] = self._insert_noise(parts[index], language, before_name=bool(slot) and index == 0)
        if self.chance(0.08 * strength):
            parts = [self._typo(part, language) for part in parts]
        first, last = parts[0], parts[-1]
        if self.chance(0.14):
            last = last.rstrip(ENDINGS) if self.chance(0.7) else last
            last += self.rng.choice(self.frames["tails"][language])
        elif self.chance(0.3):
            last = last.rstrip(ENDINGS)
        elif self.chance(0.1):
            last = last.rstrip(ENDINGS) + self.rng.choice(
                ("?", "??", "!", "?!") if language == "en" else "？?！。"
            )
        parts[-1] = last
        if len(parts) == 1:
            first = last
        if self.chance(0.2):
            opener = self.rng.choice(self.frames["openers"][language])
            first = opener + (first[:1].lower() + first[1:] if first[:2] not in ("I ", "I'") else first)
        if self.chance(0.12):
            context = self.fill(self.rng.choice(self.frames["context"][language]), language)
            if self.chance(0.8):
                first = context + first
            elif len(parts) > 1:
                parts[-1] = (parts[-1].rstrip() + (" " if language == "en" else "，")) + context.strip(" ，,")
        parts[0] = first
        return self._surface(parts, name, language)

    def _surface(self, parts: list[str], name: str, language: str) -> str:
        if language == "en":
            if self.chance(0.22):
                parts, name = [p.lower() for p in parts], name.lower() if self.chance(0.7) else name
            elif self.chance(0.015):
                parts, name = [p.upper() for p in parts], name.upper()
            elif self.chance(0.04):
                name = name.lower()
            if self.chance(0.08):
                parts = ["".join(c for c in part if c not in ",.?!'") for part in parts]
        else:
            if self.chance(0.12):
                parts = [p.translate(FULL_TO_HALF) for p in parts]
            elif self.chance(0.08):
                parts = ["".join(" " if c in "，。" else c for c in p if c not in "？！") for p in parts]
            if self.chance(0.08):
                name = self.rng.choice((f" {name} ", f"“{name}”", f"「{name}」", f"《{name}》", f"{name} "))
        text = name.join(parts) if len(parts) > 1 else parts[0]
        return text.strip() or name

    def _drop(self, part: str, language: str) -> str:
        """Leave out one or two small words (or characters)."""
        if language == "zh":
            spots = (
                [i for i, c in enumerate(part) if c in SAFE_ZH] if self.chance(0.85) else [*range(len(part))]
            )
            if len(part) < 4 or not spots:
                return part
            gone = self.rng.choice(spots)
            return part[:gone] + part[gone + 1 :]
        words = part.split(" ")
        if len(words) < 4:
            return part
        spots = (
            [i for i, w in enumerate(words) if w.lower() in self.small_words]
            if self.chance(0.85)
            else [*range(len(words))]
        )
        gone_words = set(self.rng.sample(spots, min(len(spots), self.rng.choice((1, 1, 2)))))
        return " ".join(w for i, w in enumerate(words) if i not in gone_words)

    def _insert_noise(self, part: str, language: str, before_name: bool) -> str:
        """A stray word, never right before the product's name: there it would belong to the name."""
        if language == "zh":
            noise = self.word("zh") if self.chance(0.4) else self.rng.choice(self.characters)
            if before_name and not part:
                return part
            at = self.rng.randint(0, len(part) - before_name)
            return part[:at] + noise + part[at:]
        words = part.split(" ")
        if before_name and len(words) < 2:
            return part
        at = self.rng.randint(0, len(words) - 1 - before_name)
        noise = self.word("en")
        words.insert(at, noise.lower() if self.chance(0.8) else noise)
        return " ".join(words)

    def _typo(self, part: str, language: str) -> str:
        if language == "zh":
            return part
        words = part.split(" ")
        spots = [i for i, w in enumerate(words) if len(w) >= 5 and w.isalpha()]
        if not spots:
            return part
        chosen = self.rng.choice(spots)
        word = words[chosen]
        at = self.rng.randint(1, len(word) - 2)
        draw = self.rng.random()
        if draw < 0.4:
            word = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
        elif draw < 0.75:
            word = word[:at] + word[at + 1 :]
        else:
            word = word[:at] + word[at] + word[at:]
        words[chosen] = word
        return " ".join(words)
