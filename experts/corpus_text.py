"""One document's tokens as the model reads them, and which of them were written by whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.chat import ChatTemplate
from moe_runtime.errors import PlanError
from moe_runtime.loader import read_model_config
from moe_runtime.tokenizer import Tokenizer

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Rendered:
    """token_ids   of the whole document
    lead        how many of them, at the beginning, are the begin token and the system prompt (with the
                template's words on who speaks next)
    answers     [start, end) of what the assistant wrote, ascending
    prompt_ids  of a conversation that ends with the assistant: all before its last answer, ready to be
                answered again; else empty
    """

    token_ids: tuple[int, ...]
    lead: int = 0
    answers: tuple[tuple[int, int], ...] = ()
    prompt_ids: tuple[int, ...] = ()


class Renderer:
    """Tokenizer, chat template and context of one model."""

    def __init__(self, tokenizer: Tokenizer, chat: ChatTemplate | None, max_tokens: int) -> None:
        """``max_tokens``: what a document may have at most."""
        self._tokenizer = tokenizer
        self._chat = chat
        self._max_tokens = max_tokens

    @classmethod
    def load(cls, model_dir: Path) -> Renderer:
        """Documents may be as long as the model's context. Raises CheckpointError."""
        tokenizer = Tokenizer.load(model_dir)
        _, config = read_model_config(model_dir, "float32")  # whatever the dtype is
        return cls(tokenizer, ChatTemplate.load(model_dir, tokenizer), config.max_position_embeddings)

    def text(self, text: str) -> Rendered:
        """Plain text; a control token written in it is one. Raises PlanError, RequestError."""
        ids = self._tokenizer.encode(text, add_special_tokens=True)
        self._check(ids)
        return Rendered(tuple(ids), lead=self._begin_tokens(ids))

    def chat(self, messages: Sequence[Message], answer: str | None = None) -> Rendered:
        """A conversation; ``answer`` is the assistant's last word in it. Raises PlanError, RequestError."""
        if self._chat is None:
            raise PlanError(
                "the model folder has no chat template for messages; add one, or give {'text': ...} lines"
            )
        if answer is not None:
            if messages[-1]["role"] == "assistant":
                raise ValueError("messages end with the assistant, so an answer cannot follow")
            messages = [*messages, {"role": "assistant", "content": answer}]
        ids = self._chat.encode(messages, add_generation_prompt=False)
        self._check(ids)
        spans = [
            self._answer_span(self._chat, messages, turn, ids)
            for turn, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
        prompt: list[int] = []
        if messages[-1]["role"] == "assistant":
            prompt = self._chat.encode(messages[:-1], add_generation_prompt=True)
        return Rendered(
            tuple(ids),
            self._system_end(self._chat, messages, ids),
            tuple(span for span in spans if span[0] < span[1]),
            tuple(prompt),
        )

    @staticmethod
    def _answer_span(
        chat: ChatTemplate, messages: Sequence[Message], turn: int, ids: Sequence[int]
    ) -> tuple[int, int]:
        """Where in ``ids`` the answer ``messages[turn]`` is. Templates may show an earlier turn differently
        once others follow (they drop its reasoning): what is common counts.
        """
        prompt = chat.encode(messages[:turn], add_generation_prompt=True) if turn else []
        until = chat.encode(messages[: turn + 1], add_generation_prompt=False)
        return _common(prompt, ids), _common(until, ids)

    def _system_end(self, chat: ChatTemplate, messages: Sequence[Message], ids: Sequence[int]) -> int:
        """The end of the system prompt that the conversation brings; one that the template adds by itself is
        not told from what follows.
        """
        begin = self._begin_tokens(ids)
        if messages[0]["role"] != "system" or len(messages) < 2:
            return begin
        # Two conversations that differ in all that comes after the system prompt agree on it alone.
        first, second = (
            chat.encode([messages[0], {"role": "user", "content": text}], add_generation_prompt=False)
            for text in ("A", "\u4e00")
        )
        return max(begin, _common(first[: _common(first, second)], ids))

    def _begin_tokens(self, ids: Sequence[int]) -> int:
        begin = self._tokenizer.control_tokens.get(self._tokenizer.special_names.get("bos_token", ""))
        return int(bool(ids) and ids[0] == begin)

    def _check(self, ids: Sequence[int]) -> None:
        if not ids:
            raise PlanError("no tokens come out of it")
        if len(ids) > self._max_tokens:
            raise PlanError(
                f"a document of {len(ids)} tokens; the model's context is {self._max_tokens}: split it (in "
                "a .txt file, by blank lines)"
            )


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids both begin with."""
    for place, (mine, theirs) in enumerate(zip(first, second, strict=False)):
        if mine != theirs:
            return place
    return min(len(first), len(second))
