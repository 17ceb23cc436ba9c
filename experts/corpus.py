"""Scenario texts on disk -> documents of token ids, in a seeded order, with a digest.

    *.jsonl   one document a line: {"messages": [...]} goes through the model's chat template, the assistant's
              answers included; {"text": "..."} is taken as it is. {"messages": [...], "answer": "..."} is a
              question whose right answer is known: ``answer`` follows as the assistant's.
    *.txt     documents are paragraphs: blank lines part them

A scenario is such a file, or a folder with such files. Everything is UTF-8. What cannot be read is an error
that names file and line: no text is ever left out in silence.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moe_runtime.checkpoint import open_regular
from moe_runtime.errors import CheckpointError, PlanError, RequestError
from moe_runtime.experts.corpus_text import Rendered, Renderer
from moe_runtime.hf_config import parse_json
from moe_runtime.plan import SCENARIO_NAME

SUFFIXES = (".jsonl", ".txt")
MAX_FILE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Text:
    """One document.

    id         file and line, "a.jsonl:3"
    rendered   its tokens, and what they are
    answer     the right answer to a question, if the file has one
    """

    id: str
    rendered: Rendered
    answer: str | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.rendered.token_ids

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of its tokens."""
        return hashlib.sha256(np.array(self.token_ids, dtype="<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """The documents of one scenario, in the order of their seed."""

    scenario: str
    texts: tuple[Text, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(text.token_ids) for text in self.texts)

    @cached_property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of what is in it, wherever the files are and whatever the order is."""
        return hashlib.sha256("\n".join(sorted(text.digest for text in self.texts)).encode()).hexdigest()

    def take(self, max_tokens: int) -> Corpus:
        """Its first documents, while they are ``max_tokens`` or fewer together; the first one always."""
        taken: list[Text] = []
        total = 0
        for text in self.texts:
            total += len(text.token_ids)
            if taken and total > max_tokens:
                break
            taken.append(text)
        return Corpus(self.scenario, tuple(taken))

    def require(self, num_tokens: int, why: str) -> None:
        """Raises PlanError if there are fewer tokens; the message gives ``why`` that many are needed."""
        if self.num_tokens < num_tokens:
            raise PlanError(
                f"scenario {self.scenario!r} has {self.num_tokens} tokens in {len(self.texts)} documents; "
                f"{num_tokens} are needed: {why}"
            )


def find_scenarios(words: Sequence[str]) -> dict[str, Path]:
    """Where the texts of each scenario are. A word is ``NAME=PATH``; or a PATH: a file or a folder of files,
    whose name is the scenario's, or a folder of one folder per scenario.

    Raises PlanError for two of one name, a path that is not there, and a folder that is both.
    """
    found: dict[str, Path] = {}
    for word in words:
        name, equals, rest = word.partition("=")
        for scenario, path in [(name, Path(rest))] if equals else _named(Path(word)):
            if not SCENARIO_NAME.fullmatch(scenario):
                raise PlanError(
                    f"scenario {scenario[:80]!r}: a name has letters, digits, '_' and '-' and is 64 long at "
                    "most; give one with NAME=PATH"
                )
            if scenario in found:
                raise PlanError(f"two scenarios are called {scenario!r}; name them with NAME=PATH")
            found[scenario] = path
    return found


def find_texts_of(scenarios: Sequence[str], words: Sequence[str]) -> dict[str, Path]:
    """Of ``find_scenarios`` those of a plan's ``scenarios``: a single PATH is the text of a single one,
    whatever the file is called; a name that was given, NAME=PATH, is never another's.

    Raises PlanError as ``find_scenarios`` does, and for a scenario without text.
    """
    found = find_scenarios(words)
    if len(words) == len(found) == len(scenarios) == 1 and "=" not in words[0]:
        return dict(zip(scenarios, found.values(), strict=True))
    missing = [name for name in scenarios if name not in found]
    if missing:
        raise PlanError(
            f"no text of the plan's scenario {missing[0]!r}; there are texts of: {', '.join(sorted(found))}"
        )
    return {name: found[name] for name in scenarios}


def _named(path: Path) -> Iterator[tuple[str, Path]]:
    folders = sorted(item for item in path.iterdir() if item.is_dir()) if path.is_dir() else []
    folders = [item for item in folders if not item.name.startswith(".")]
    if not folders:
        yield (path.stem if path.suffix in SUFFIXES else path.resolve().name), path
        return
    if _text_files(path):
        raise PlanError(f"{path}: has files and folders of text; put each scenario's files into its folder")
    yield from ((item.name, item) for item in folders)


def read_corpus(scenario: str, path: Path, renderer: Renderer, *, seed: int = 0) -> Corpus:
    """All documents of one scenario. Raises PlanError for what cannot be read, and for no text at all."""
    if not path.exists():
        raise PlanError(f"scenario {scenario!r}: {path} does not exist")
    files = _text_files(path) if path.is_dir() else [path]
    if not files:
        raise PlanError(f"scenario {scenario!r}: no {' or '.join(SUFFIXES)} file in {path}")
    texts = [text for file in files for text in _read_file(file, renderer)]
    if not texts:
        raise PlanError(f"scenario {scenario!r}: {path} holds no text")
    random.Random(seed).shuffle(texts)
    return Corpus(scenario, tuple(texts))


def read_corpora(
    words: Sequence[str], renderer: Renderer, *, seed: int = 0, max_tokens: int | None = None
) -> list[Corpus]:
    """All that ``words`` name (``find_scenarios``), each cut to ``max_tokens`` (``take``) if given."""
    found = [read_corpus(name, path, renderer, seed=seed) for name, path in find_scenarios(words).items()]
    return found if max_tokens is None else [corpus.take(max_tokens) for corpus in found]


def _text_files(folder: Path) -> list[Path]:
    return sorted(item for item in folder.iterdir() if item.suffix in SUFFIXES and item.is_file())


def _read_file(path: Path, renderer: Renderer) -> Iterator[Text]:
    if path.suffix not in SUFFIXES:
        raise PlanError(f"{path}: a file of texts ends in {' or '.join(SUFFIXES)}")
    parts = _lines(path) if path.suffix == ".jsonl" else _paragraphs(path)
    for number, part in parts:
        where = f"{path.name}:{number}"
        try:
            yield (
                _read_line(where, part, renderer)
                if path.suffix == ".jsonl"
                else Text(where, renderer.text(part))
            )
        except (ValueError, RequestError) as error:
            raise PlanError(f"{where}: {error}") from error


def _read_line(where: str, line: str, renderer: Renderer) -> Text:
    value = parse_json(line.encode())
    if not isinstance(value, dict):
        raise ValueError("a line must be an object with messages or text")
    unknown = sorted(value.keys() - {"messages", "text", "answer"})
    if unknown or ("messages" in value) == ("text" in value):
        raise ValueError(f"a line has either messages or text, and perhaps an answer; got {sorted(value)}")
    answer = value.get("answer")
    if answer is not None and not (isinstance(answer, str) and answer and "messages" in value):
        raise ValueError("an answer is text, not empty, and belongs to messages")
    if "text" in value:
        if not isinstance(value["text"], str) or not value["text"].strip():
            raise ValueError("text must be a string that is not blank")
        return Text(where, renderer.text(value["text"]))
    return Text(where, renderer.chat(_messages(value["messages"]), answer), answer)


def _messages(value: Any) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not value:
        raise ValueError("messages must be a list, not empty")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError("a message must be an object with role and content")
    return value


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(_decoded(path).split("\n"), 1):
        if line.strip():
            yield number, line


def _paragraphs(path: Path) -> Iterator[tuple[int, str]]:
    lines: list[str] = []
    for number, line in enumerate([*_decoded(path).splitlines(), ""], 1):
        if line.strip():
            lines.append(line)
        elif lines:
            yield number - len(lines), "\n".join(lines)
            lines = []


def _decoded(path: Path) -> str:
    try:
        with open_regular(path) as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise PlanError(f"{path}: larger than {MAX_FILE_BYTES} bytes; split it")
        return data.decode("utf-8-sig")
    except (OSError, CheckpointError) as error:
        raise PlanError(f"{path}: cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise PlanError(f"{path}:{line}: not UTF-8 ({error.reason}); save it as UTF-8") from error
