"""Scores of a demo model: exact match per scenario and language, refusals by kind, expert specialisation.

The blind set's texts are never shown: only rates leave this module for it.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from moe_runtime.experts.demo import phrases
from moe_runtime.experts.demo.answers import is_refusal
from moe_runtime.experts.demo.corpus import Author
from moe_runtime.experts.demo.decode import gate_mass, greedy
from moe_runtime.experts.demo.facts import LANGUAGES, SCENARIOS
from moe_runtime.experts.demo.network import Network
from moe_runtime.experts.demo.phrases import Phrasebook
from moe_runtime.experts.demo.questions import Examiner, Question, sample

REFUSED = ("unknown_product", "wrong_kind", "wrong_attribute", "unknown_attribute", "off_topic")
Rates = dict[str, tuple[int, int]]  # right, asked


def ask(
    network: Network, tokenizer: Tokenizer, questions: Sequence[Question], keep: Tensor | None = None
) -> list[str]:
    """The reply to each question's last turn; earlier replies in a dialogue are the model's own."""
    dialogues: list[list[tuple[str, str]]] = [[] for _ in questions]
    replies = [""] * len(questions)
    for turn in range(max(len(q.turns) for q in questions)):
        active = [i for i, q in enumerate(questions) if turn < len(q.turns)]
        for index in active:
            dialogues[index].append(("user", questions[index].turns[turn]))
        for index, reply in zip(
            active, greedy(network, tokenizer, [dialogues[i] for i in active], keep), strict=True
        ):
            dialogues[index].append(("assistant", reply))
            replies[index] = reply
    return replies


def right(question: Question, reply: str) -> bool:
    """Facts and small talk: the exact sentence. Refusals: any refusal sentence, whatever its kind."""
    if question.category in REFUSED:
        return is_refusal(reply)
    return reply == question.expected


def rates(questions: Sequence[Question], replies: Sequence[str]) -> Rates:
    """``{"ask credit en": (right, asked), ...}``; refusals also as "... exact kind"."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for question, reply in zip(questions, replies, strict=True):
        scenario = question.scenario if question.category not in REFUSED else ""
        names = [" ".join(part for part in (question.category, scenario, question.language) if part)]
        if question.category in ("ask", "follow_up", "switch"):
            names.append(f"all {question.scenario} {question.language}")
        for name in names:
            counts[name][0] += right(question, reply)
            counts[name][1] += 1
        if question.category in REFUSED:
            counts[names[0] + " exact kind"][0] += reply == question.expected
            counts[names[0] + " exact kind"][1] += 1
    return {name: (good, total) for name, (good, total) in counts.items()}


def book_for(name: str) -> tuple[Phrasebook, dict[str, tuple[int, int]]]:
    """The phrasings of a set and ``(kept, dropped)`` per category: near-duplicates of training go."""
    training = phrases.load(*phrases.TRAINING)
    if name == "train":
        return sample(training, 8), {}
    return phrases.held_out(phrases.load(name), training)


def evaluate(network: Network, tokenizer: Tokenizer, name: str) -> tuple[Rates, dict[str, tuple[int, int]]]:
    """Rates on the set ``train`` (seen), ``tune`` or ``blind``, and the dropped counts."""
    book, dropped = book_for(name)
    questions = Examiner(book).all()
    return rates(questions, ask(network, tokenizer, questions)), dropped


def failures(network: Network, tokenizer: Tokenizer, name: str) -> list[tuple[Question, str]]:
    """Wrong replies, to learn from. Refuses the blind set: its texts are not to be looked at."""
    if name == "blind":
        raise ValueError("the blind set's texts stay unread")
    questions = Examiner(book_for(name)[0]).all()
    replies = ask(network, tokenizer, questions)
    return [(q, reply) for q, reply in zip(questions, replies, strict=True) if not right(q, reply)]


def keep_top(network: Network, tokenizer: Tokenizer, scenario: str, count: int) -> Tensor:
    """Bool [layers, E]: per layer the ``count`` experts with most gate weight on the scenario's dialogues."""
    author = Author(phrases.load("train"), seed=99)
    dialogues = [author.scenario_document(scenario).turns for _ in range(150)]
    mass = gate_mass(network, tokenizer, dialogues)
    keep = torch.zeros_like(mass, dtype=torch.bool)
    return keep.scatter_(1, mass.topk(count, dim=1).indices, True)


def specialisation(network: Network, tokenizer: Tokenizer, name: str) -> dict[str, dict[str, float]]:
    """``{"credit keep 10": {"credit en": rate, ...}}``: first-turn facts with a scenario's top experts."""
    questions = list(Examiner(sample(book_for(name)[0], 3), products_per_line=5).asks())
    out = {}
    for count in (network.shape.experts // 2, network.shape.experts // 4):
        for scenario in SCENARIOS:
            keep = keep_top(network, tokenizer, scenario, count)
            found = rates(questions, ask(network, tokenizer, questions, keep))
            out[f"{scenario} keep {count}"] = {
                f"{other} {language}": round(
                    found[f"ask {other} {language}"][0] / found[f"ask {other} {language}"][1], 4
                )
                for other in SCENARIOS
                for language in LANGUAGES
            }
    return out
