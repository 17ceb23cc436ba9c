"""Product names as customers write them: short forms, and names of products that do not exist."""

from moe_runtime.experts.demo.facts import FIRST_NAMES, KINDS, Product
from moe_runtime.experts.demo.phrases import Phrasebook
from moe_runtime.experts.demo.wording import Wording

SHORT_LABELS: dict[str, dict[str, tuple[str, ...]]] = {
    "credit": {"en": ("loan",), "zh": ("贷款",)},
    "wealth": {"en": ("fund", "plan"), "zh": ("基金", "计划")},
    "customer_service": {"en": ("card", "account"), "zh": ("卡", "账户")},
}


class Naming:
    """Draws names with its wording's generator."""

    def __init__(self, wording: Wording, book: Phrasebook, products: dict[str, list[Product]]) -> None:
        self.wording, self.book, self.products = wording, book, products
        self.all_first = [(s, pair) for s, group in FIRST_NAMES.items() for pair in group]

    def short(self, product: Product, language: str) -> str:
        """``Harbor loan``: the first name with a general word that fits the kind."""
        labels = SHORT_LABELS[product.scenario][language]
        full = product.name[language].lower()
        fitting = [label for label in labels if label in full] or [labels[0]]
        if language == "zh":
            fitting = [label for label in labels if label in full] or ["贷款"]
            if product.scenario != "credit" and fitting == ["贷款"]:
                return product.name[language]
        elif product.scenario == "credit":
            fitting = ["loan", "Loan"]
        joint = " " if language == "en" else ""
        return product.first[language] + joint + self.wording.rng.choice(fitting)

    def wrong_kind(self, product: Product, language: str) -> str:
        """The product's first name with a kind it does not come in, mostly of its own scenario."""
        joint, rng = " " if language == "en" else "", self.wording.rng
        while True:
            scenario = product.scenario if rng.random() < 0.8 else rng.choice(list(KINDS))
            label = self.wording.kind_label(scenario, language)
            if rng.random() < 0.1:
                label = rng.choice(self.wording.other_kinds[language])
            if product.first[language] + joint + label != product.name[language]:
                return product.first[language] + joint + label

    def no_such(self, kind: str, scenario: str, language: str) -> str:
        """A name no product has: an invented first name, or (``wrong_kind``) a real one of another kind."""
        joint = " " if language == "en" else ""
        label = self.wording.kind_label(scenario, language)
        if kind == "unknown_product":
            if self.wording.rng.random() < 0.35:
                return self._listed(scenario, language)
            if self.wording.rng.random() < 0.08:
                label = self.wording.rng.choice(self.wording.other_kinds[language])
            return self.wording.unknown_first(language) + joint + label
        # A known first name with a kind it does not come in: of its own scenario, of another, or of none.
        column = 0 if language == "en" else 1
        own, pair = self.wording.rng.choice(self.all_first)
        if self.wording.rng.random() < 0.7:
            own, pair = scenario, self.wording.rng.choice(FIRST_NAMES[scenario])
        real = {p.name[language] for p in self.products[own]}
        if self.wording.rng.random() < 0.12:
            label = self.wording.rng.choice(self.wording.other_kinds[language])
        name = pair[column] + joint + label
        while name in real:
            name = pair[column] + joint + self.wording.kind_label(scenario, language)
        return name

    def _listed(self, scenario: str, language: str) -> str:
        labels = tuple(kind[language] for kind in KINDS[scenario].values())
        return self.wording.rng.choice(
            [n for n in self.book.other["unknown_product"][language] if n.endswith(labels)]
        )
