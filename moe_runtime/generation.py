"""Generation: one choice of one request, from admission to its last event. Knows no batch and no model."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

from moe_runtime.detokenizer import StopStrings, detokenizer_for
from moe_runtime.errors import RequestFailed
from moe_runtime.output import FinishReason, TokenEvent, TokenLogprob, TopLogprob
from moe_runtime.sampling import (
    Chooser,
    History,
    Logits,
    SamplingParams,
    best_tokens,
    check_finite,
    log_softmax,
    sample,
)
from moe_runtime.scheduler import Chunk
from moe_runtime.sequence import Sequence
from moe_runtime.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Sampled:
    """The outcome of the last row of logits: a token, unless only the prompt was asked about."""

    token_id: int | None
    logprob: TokenLogprob | None = None


# What a chunk's logits came to: None while no token is due, RequestFailed (not raised) when it failed alone.
Outcome = Sampled | RequestFailed | None


@dataclass(frozen=True, slots=True)
class Draw:
    """All that decides the next token beside its logits; see ``sampling.sample``."""

    params: SamplingParams
    history: History
    seed: int
    choice: int


class Generation:
    """``look`` at each chunk's logits, then ``advance`` by what was sampled; the events tell the rest."""

    def __init__(
        self,
        request_id: str,
        choice: int,
        sequence: Sequence,
        params: SamplingParams,
        seed: int,
        tokenizer: Tokenizer,
        end_ids: Collection[int],
        chooser: Chooser | None = None,
    ) -> None:
        self.request_id = request_id
        self.choice = choice
        self.sequence = sequence
        self._params = params
        self._seed = seed
        self._tokenizer = tokenizer
        self._chooser = chooser
        self._end_ids = frozenset() if params.ignore_eos else frozenset(end_ids)
        self._detokenizer = detokenizer_for(tokenizer, sequence.token_ids)
        self._stops = StopStrings(params.stop, include_stop=params.include_stop)
        self._max_tokens = sequence.max_total - sequence.num_prompt
        may_end = self._end_ids.union(params.stop_token_ids)
        self._history = History(params, sequence.prompt_ids, may_end)
        self._prompt_logprobs: list[TokenLogprob | None] | None = None
        self.start_over()

    def start_over(self) -> None:
        """Know nothing of the prompt's logits; for a sequence that has no token of its own yet."""
        if self._params.prompt_logprobs is not None and self.choice == 0:
            self._prompt_logprobs = [None]

    def look(self, chunk: Chunk, logits: Logits) -> Sampled | None:
        """Use the logits (rows, V) of positions ``chunk.logit_start`` onwards; None while no token is due.

        Raises RequestFailed when they are not finite. Sampling changes nothing here: see ``advance``.
        """
        self._look_at_prompt(chunk, logits)
        if not chunk.samples:
            return None
        row = logits[-1]
        if self._max_tokens == 0:
            check_finite(row)
            return Sampled(None)
        token_id = sample(row, self._params, self._history, self._seed, self.choice, self._chooser)
        if self._params.logprobs is None:
            return Sampled(token_id)
        return Sampled(token_id, self._logprob(row, token_id, self._params.logprobs))

    def draw(self, chunk: Chunk) -> Draw | None:
        """By what to choose a token from the chunk's last row; None unless ``look`` would do no more."""
        if not chunk.samples or self._prompt_logprobs is not None or self._max_tokens == 0:
            return None
        return Draw(self._params, self._history, self._seed, self.choice)

    def sampled(self, token_id: int, logprob: float, likeliest: Iterable[tuple[int, float]]) -> Sampled:
        """A token that was chosen by ``draw`` elsewhere, with the numbers of its TokenLogprob."""
        return Sampled(token_id, self._told(token_id, logprob, likeliest))

    def advance(self, sampled: Sampled) -> TokenEvent:
        """The event of one sampled token, whether or not it is the last."""
        token_id = sampled.token_id
        if token_id is None:
            return self.end("length")
        self._history.add(token_id)
        reason, stop_reason, text = self._read(token_id)
        return self._event(
            text=text,
            token_ids=(token_id,),
            logprobs=None if sampled.logprob is None else (sampled.logprob,),
            finish_reason=reason,
            stop_reason=stop_reason,
        )

    def end(self, reason: FinishReason, error: str | None = None) -> TokenEvent:
        """The last event of a choice that ends without a token of its own."""
        return self._event(finish_reason=reason, error=error)

    def _look_at_prompt(self, chunk: Chunk, logits: Logits) -> None:
        if self._prompt_logprobs is None or self._params.prompt_logprobs is None:
            return
        known = self.sequence.prompt_ids
        for position, row in enumerate(logits, start=chunk.logit_start):
            if position + 1 < len(known):
                check_finite(row)
                count = self._params.prompt_logprobs
                self._prompt_logprobs.append(self._logprob(row, known[position + 1], count))

    def _logprob(self, row: Logits, token_id: int, count: int) -> TokenLogprob:
        logprobs = log_softmax(row)
        best = ((i, float(logprobs[i])) for i in best_tokens(logprobs, count))
        return self._told(token_id, float(logprobs[token_id]), best)

    def _told(self, token_id: int, logprob: float, likeliest: Iterable[tuple[int, float]]) -> TokenLogprob:
        top = tuple(TopLogprob(i, *self._tokenizer.piece(i), logprob=value) for i, value in likeliest)
        return TokenLogprob(token_id, *self._tokenizer.piece(token_id), logprob, top)

    def _read(self, token_id: int) -> tuple[FinishReason | None, str | int | None, str]:
        """(finish reason, stop reason, text to show) once ``token_id`` has been appended."""
        may_stop = self._history.num_output > self._params.min_tokens
        if may_stop and token_id in self._end_ids:
            return self._finish("stop", None, "")
        if may_stop and token_id in self._params.stop_token_ids:
            text = self._detokenizer.push(token_id) if self._params.include_stop else ""
            return self._finish("stop", token_id, text)
        text, stop = self._stops.push(self._detokenizer.push(token_id), may_stop=may_stop)
        if stop is not None:
            return "stop", stop, text
        if self._history.num_output >= self._max_tokens:
            return self._finish("length", None, text, may_stop=may_stop)
        return None, None, text

    def _finish(
        self, reason: FinishReason, stop_reason: int | None, text: str, *, may_stop: bool = True
    ) -> tuple[FinishReason, str | int | None, str]:
        """Let out what was held back: it may still complete a stop string."""
        rest, stop = self._stops.push(self._detokenizer.finish(), may_stop=may_stop)
        if stop is not None:
            return "stop", stop, text + rest
        return reason, stop_reason, text + rest + self._stops.finish()

    def _event(
        self,
        *,
        text: str = "",
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] | None = None,
        finish_reason: FinishReason | None = None,
        stop_reason: str | int | None = None,
        error: str | None = None,
    ) -> TokenEvent:
        prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, None
        return TokenEvent(
            request_id=self.request_id,
            choice=self.choice,
            text=text,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            error=error,
            num_prompt_tokens=self.sequence.num_prompt,
            num_cached_tokens=self.sequence.num_cached,
            lost_mass=self.sequence.lost_mass,
            drift=self.sequence.drift,
            prompt_logprobs=None if prompt_logprobs is None else tuple(prompt_logprobs),
        )


def token_ids_of(sampled: Mapping[int, Sampled]) -> dict[int, int]:
    """The tokens among the outcomes, under the same keys."""
    return {key: outcome.token_id for key, outcome in sampled.items() if outcome.token_id is not None}


def rows_of(chunks: tuple[Chunk, ...]) -> list[slice]:
    """Which rows of a step's logits are each chunk's own."""
    ends = list(accumulate(chunk.end - chunk.logit_start for chunk in chunks))
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def look_at(generation: Generation, chunk: Chunk, logits: Logits) -> Outcome:
    """As ``Generation.look``, of perhaps no rows."""
    try:
        return generation.look(chunk, logits) if len(logits) else None
    except RequestFailed as error:
        return error


def sample_on_host(
    chunks: tuple[Chunk, ...], logits: Logits, generations: Mapping[int, Generation]
) -> list[Outcome]:
    """The outcome of each chunk of a step with ``logits`` (R, V); ``generations`` by sequence id."""
    parts = zip(chunks, rows_of(chunks), strict=True)
    return [look_at(generations[chunk.sequence_id], chunk, logits[rows]) for chunk, rows in parts]
