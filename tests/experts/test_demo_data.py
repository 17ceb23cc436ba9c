"""The demo model's facts, phrasings, corpus and tokenizer."""

import itertools
import json
import random
from pathlib import Path

import pytest

from moe_runtime.errors import ConfigError
from moe_runtime.experts.demo import MODEL, answers, phrases, tokens
from moe_runtime.experts.demo.corpus import Author, answer
from moe_runtime.experts.demo.facts import ATTRIBUTES, FIRST_NAMES, LANGUAGES, SCENARIOS, fact_table, products
from moe_runtime.experts.demo.questions import Examiner, sample
from moe_runtime.experts.demo.wording import Wording


@pytest.fixture(scope="module")
def training() -> phrases.Phrasebook:
    return phrases.load("train")


def facts_of(scenario: str, language: str) -> set[str]:
    table = fact_table()
    return {
        answer(product, attribute.key, language, table)
        for product in products()
        if product.scenario == scenario
        for attribute in ATTRIBUTES[scenario]
    }


def test_every_scenario_has_a_hundred_facts_in_each_language() -> None:
    for scenario, language in itertools.product(SCENARIOS, LANGUAGES):
        assert len(facts_of(scenario, language)) >= 100


def test_no_first_name_and_no_fact_is_shared_between_scenarios() -> None:
    names = [name for group in FIRST_NAMES.values() for pair in group for name in pair]
    assert len(names) == len(set(names))
    every = [
        fact for s, language in itertools.product(SCENARIOS, LANGUAGES) for fact in facts_of(s, language)
    ]
    assert len(every) == len(set(every))


def test_refusals_hold_no_number_and_no_product_name() -> None:
    for by_language in answers.REFUSALS.values():
        for sentence in by_language.values():
            assert not any(character.isdigit() for character in sentence)
            assert not any(p.first[language] in sentence for p in products() for language in LANGUAGES)


@pytest.mark.parametrize("path", sorted(phrases.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_every_phrasing_file_follows_the_format(path: Path) -> None:
    found = len(phrases.problems(json.loads(path.read_text(encoding="utf-8"))))
    assert found == 0  # a number only: a failure must not print a line of the blind set


def test_training_phrasings_cover_every_attribute_in_both_languages(training: phrases.Phrasebook) -> None:
    for key, language in itertools.product(phrases.ATTRIBUTE_KEYS, LANGUAGES):
        assert len(training.ask[key][language]) >= 70
        assert len(training.follow_up[key][language]) >= 25


def test_a_phrasing_without_its_product_slot_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text('{"ask": {"credit.rate": {"en": ["What is the rate?"]}}}', encoding="utf-8")
    with pytest.raises(ConfigError, match="bad.json"):
        phrases.read(path)


def test_similarity_masks_the_product_and_ignores_case_and_punctuation() -> None:
    assert phrases.too_near("what is the RATE of {p}", ["What is the rate of {p}?"])
    assert phrases.too_near("请问{p}的利率是多少", ["请问{p}的利率是多少？"])
    assert not phrases.too_near("how costly is borrowing with {p}", ["What is the rate of {p}?"])


def test_held_out_drops_near_lines_and_counts_them(training: phrases.Phrasebook) -> None:
    line = training.ask["credit.rate"]["en"][0]
    book = phrases.Phrasebook(ask={"credit.rate": {"en": [line + "!", "zebra stripes in {p} at dawn?"]}})
    kept, counts = phrases.held_out(book, training)
    assert kept.ask["credit.rate"]["en"] == ["zebra stripes in {p} at dawn?"]
    assert counts["ask"] == (1, 1)


def test_invented_names_are_compared_by_their_first_name(training: phrases.Phrasebook) -> None:
    known = training.other["unknown_product"]["en"][0]
    new = "Qwzxvv " + known.split(" ", 1)[1]
    kept, _ = phrases.held_out(phrases.Phrasebook(other={"unknown_product": {"en": [known, new]}}), training)
    assert kept.other["unknown_product"]["en"] == [new]


def test_the_corpus_is_the_same_for_the_same_seed_only(training: phrases.Phrasebook) -> None:
    def first(seed: int) -> list[object]:
        return [(d.scenario, d.turns) for d in itertools.islice(Author(training, seed).documents(), 200)]

    assert first(3) == first(3)
    assert first(3) != first(4)


def test_every_reply_of_the_corpus_is_a_fact_or_a_fixed_sentence(training: phrases.Phrasebook) -> None:
    fixed = {
        sentence
        for table in (answers.REFUSALS, answers.SMALL_TALK, answers.OVERVIEW)
        for by_language in table.values()
        for sentence in by_language.values()
    }
    facts = {scenario: facts_of(scenario, "en") | facts_of(scenario, "zh") for scenario in SCENARIOS}
    for document in itertools.islice(Author(training, 5).documents(), 1500):
        for role, text in document.turns:
            if role == "assistant" and text not in fixed:
                if document.scenario in SCENARIOS:
                    assert text in facts[document.scenario]
                else:
                    assert any(text in group for group in facts.values())


def test_augmenting_never_damages_the_product_name() -> None:
    wording = Wording(random.Random(1))
    for _ in range(500):
        text = wording.augment(
            "Could you tell me what {p} costs every year, please?", "Harbor Mortgage", "en"
        )
        assert "harbor mortgage" in text.lower()
        assert "港湾房贷" in wording.augment("请问{p}的年利率是多少？", "港湾房贷", "zh")


def test_invented_words_are_no_first_names() -> None:
    wording = Wording(random.Random(2))
    known = {name.lower() for group in FIRST_NAMES.values() for pair in group for name in pair}
    for language in LANGUAGES:
        assert not known & {wording.word(language).lower() for _ in range(2000)}


def test_examiner_asks_each_cell_and_refusal_kind(training: phrases.Phrasebook) -> None:
    questions = Examiner(sample(training, 2), products_per_line=2).all()
    assert {q.category for q in questions} >= {"ask", "follow_up", "switch", "wrong_kind", "off_topic", "bye"}
    assert {(q.scenario, q.language) for q in questions if q.category == "ask"} == set(
        itertools.product(SCENARIOS, LANGUAGES)
    )


TEXTS = [
    "",
    "Hello  \n\t wörld 😀 麒麟𠮷 ２３ \x00",
    " What's the rate of Zephyrfoo Loan, 12.5%?? ",
    "港湾消费贷的年利率是4.46%。",
    "\r\n <b>नमस्ते</b> \u200b",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_shipped_tokenizer_gives_every_text_back(text: str) -> None:
    tokenizer = tokens.load(MODEL)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_a_new_tokenizer_gives_texts_back_and_splits_han_and_digits(training: phrases.Phrasebook) -> None:
    tokenizer = tokens.train(training, seed=1, vocab=600)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    assert len(tokenizer.encode("1234").ids) == 4
    assert tokenizer.encode(tokens.START).ids == [tokenizer.token_to_id(tokens.START)]
