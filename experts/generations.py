"""What a mask does to whole answers: they may loop, never end, grow or become wrong. One batch, both models.

Pruned models fail as loops and as confident wrong facts before their perplexity shows it, so answers are
generated (greedily) by the full model and under the mask and compared as texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moe_runtime.engine import Engine
from moe_runtime.experts.corpus import Text
from moe_runtime.output import Completion, TokenEvent
from moe_runtime.plan import ExpertMask
from moe_runtime.recovery import Recovery
from moe_runtime.sampling_params import SamplingParams

REPEATS, LONGEST_PERIOD, LEAST_TOKENS = 4, 64, 12
NAME = "under evaluation"


def loops(token_ids: Sequence[int]) -> bool:
    """Whether an answer ends in a stretch of tokens said four times over, twelve tokens or more in all."""
    for period in range(1, min(LONGEST_PERIOD, len(token_ids) // REPEATS) + 1):
        length = max(REPEATS * period, LEAST_TOKENS)
        tail = token_ids[-length:]
        if len(tail) == length and all(tail[i] == tail[i - period] for i in range(period, length)):
            return True
    return False


@dataclass(frozen=True, slots=True)
class Pair:
    """One question's answers."""

    full: Completion
    masked: Completion
    expected: str | None


def answer_pairs(
    engine: Engine,
    texts: Sequence[Text],
    mask: ExpertMask,
    max_tokens: int,
    advance: Callable[[int], None] = lambda answers: None,
    recovery: Recovery | None = None,
) -> list[Pair]:
    """Every text's question, answered by the full model and under the mask; ``advance`` is told of answers.

    The texts have ``rendered.prompt_ids``. Raises PlanError for a mask or recovery that does not fit, and
    what ``Engine.add`` raises.
    """
    engine.masks.add(NAME, mask, recovery=recovery)
    try:
        found = _answers(engine, texts, max_tokens, advance)
    finally:
        engine.masks.remove(NAME)
    return [Pair(found[f"full {row}"], found[f"masked {row}"], text.answer) for row, text in enumerate(texts)]


def _answers(
    engine: Engine, texts: Sequence[Text], max_tokens: int, advance: Callable[[int], None]
) -> dict[str, Completion]:
    events: dict[str, list[TokenEvent]] = {}
    for row, text in enumerate(texts):
        prompt = text.rendered.prompt_ids
        room = min(max_tokens, engine.max_context - len(prompt))
        params = SamplingParams(temperature=0.0, max_tokens=room)
        for kind, scenario in (("full", None), ("masked", NAME)):
            engine.add(f"{kind} {row}", prompt, params, scenario=scenario)
    try:
        while engine.has_work():
            for event in engine.step():
                events.setdefault(event.request_id, []).append(event)
                advance(event.finish_reason is not None)
    except BaseException:
        engine.fail_running("an evaluation was broken off")
        for request_id in [f"{kind} {row}" for row in range(len(texts)) for kind in ("full", "masked")]:
            engine.abort(request_id)
        raise
    return {request_id: Completion.of(of) for request_id, of in events.items()}


def summarise(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Rates from 0 to 1, as JSON: loops, natural ends, length, equal texts; where right answers are known,
    how many are exactly right, and the flips from right to wrong and back.
    """

    def rate(of: Callable[[Completion], bool], side: str) -> float:
        return sum(of(getattr(pair, side)) for pair in pairs) / len(pairs)

    lengths = [sum(len(getattr(pair, side).token_ids) for pair in pairs) for side in ("full", "masked")]
    summary: dict[str, Any] = {
        "answers": len(pairs),
        "loop_rate": {side: rate(lambda c: loops(c.token_ids), side) for side in ("full", "masked")},
        "natural_end": {side: rate(lambda c: c.finish_reason == "stop", side) for side in ("full", "masked")},
        "length_ratio": lengths[1] / max(lengths[0], 1),
        "same_text": sum(pair.full.text == pair.masked.text for pair in pairs) / len(pairs),
        "failed": sum(pair.full.error is not None or pair.masked.error is not None for pair in pairs),
    }
    known = [pair for pair in pairs if pair.expected is not None]
    if known:
        right = [(_right(pair.full, pair), _right(pair.masked, pair)) for pair in known]
        summary["exact_match"] = {
            "questions": len(known),
            "full": sum(full for full, _ in right) / len(right),
            "masked": sum(masked for _, masked in right) / len(right),
            "right_to_wrong": sum(full and not masked for full, masked in right),
            "wrong_to_right": sum(masked and not full for full, masked in right),
        }
    return summary


def _right(completion: Completion, pair: Pair) -> bool:
    return pair.expected is not None and completion.text.strip() == pair.expected.strip()
