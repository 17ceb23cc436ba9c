"""Texts of the invented bank as files: dialogues to plan with, and questions with their answers to test on.

The phrasings of dialogues, of questions to tune on (set ``tune``) and of those to test on (``blind``) were
written apart from each other, so they share no text but the bank's own fixed answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_runtime.experts.demo import phrases
from moe_runtime.experts.demo.corpus import Author
from moe_runtime.experts.demo.evaluate import book_for
from moe_runtime.experts.demo.facts import SCENARIOS
from moe_runtime.experts.demo.questions import Examiner, Question

GENERAL = "general"
DIALOGUES = 400  # per scenario, to plan with
QUESTIONS = 300  # per scenario, to test on
SEED = 2026


def write_texts(folder: Path) -> dict[str, int]:
    """``folder``/calibration/<scenario>/dialogues.jsonl to profile with, ``folder``/tune/<scenario> and
    ``folder``/test/<scenario>/questions.jsonl to choose a size by and to test on; lines by file. In the test
    small talk and refusals are "general".
    """
    written = {}
    for number, scenario in enumerate(SCENARIOS):
        author = Author(phrases.load("train"), seed=SEED + number)
        dialogues = [_messages(author.scenario_document(scenario).turns) for _ in range(DIALOGUES)]
        lines = [{"messages": messages} for messages in dialogues]
        written[f"calibration/{scenario}"] = _write(folder, f"calibration/{scenario}/dialogues.jsonl", lines)
    for name, phrasings, sets in (("tune", "tune", SCENARIOS), ("test", "blind", (*SCENARIOS, GENERAL))):
        examiner = Examiner(book_for(phrasings)[0], seed=SEED)
        questions = [question for question in examiner.all() if len(question.turns) == 1]
        examiner.rng.shuffle(questions)
        for scenario in sets:
            own = [question for question in questions if _set_of(question) == scenario][:QUESTIONS]
            file = f"{name}/{scenario}/questions.jsonl"
            written[f"{name}/{scenario}"] = _write(folder, file, [_line(question) for question in own])
    return written


def _set_of(question: Question) -> str:
    return question.scenario if question.category == "ask" else GENERAL


def _line(question: Question) -> dict[str, Any]:
    messages = [{"role": "user", "content": question.turns[0]}]
    return {"messages": messages, "answer": question.expected}


def _messages(turns: Iterable[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def _write(folder: Path, name: str, lines: Sequence[Mapping[str, Any]]) -> int:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [json.dumps(line, ensure_ascii=False) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return len(text)
