"""Engine: token ids in, events out. One step at a time, on one thread; knows no HTTP and no asyncio."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch

from moe_runtime import kernels, loader
from moe_runtime.batch import Batch
from moe_runtime.chat import ChatTemplate
from moe_runtime.config import EngineConfig
from moe_runtime.device import choose_device, told_as_config_errors
from moe_runtime.engine_setup import CacheSize, check_vocabulary, default_params, end_ids, plan_cache
from moe_runtime.errors import ContextLengthExceeded, RequestError, RequestFailed
from moe_runtime.generation import Generation, Sampled, rows_of
from moe_runtime.kv_cache import BlockPool
from moe_runtime.output import Completion, EngineStats, TokenEvent, TokenLogprob, TopLogprob
from moe_runtime.packed_store import PackedStore
from moe_runtime.quant.quality import Gate
from moe_runtime.quant.recipe import Recipe
from moe_runtime.quant.statistics import load_moments
from moe_runtime.sampling import Chooser, Logits, SamplingParams, draw_seed
from moe_runtime.scheduler import Chunk, Scheduler, Step
from moe_runtime.sequence import Sequence as QueuedSequence
from moe_runtime.tokenizer import Tokenizer

__all__ = ["Completion", "Engine", "EngineStats", "TokenEvent", "TokenLogprob", "TopLogprob"]

LOGGER = logging.getLogger(__name__)
MAX_LOGIT_VALUES = 1 << 26  # logits held at once: 256 MiB of float32


class Engine:
    """Not thread-safe, except ``check``, which only reads.

    model           what ``loader.load_model`` gives: ``config``, ``new_cache``, ``forward``
    tokenizer       for stop strings and for the text of events
    chat            the model folder's chat template, None when it has none
    default_params  generation_config.json's; a request is ``dataclasses.replace(default_params, **given)``
    max_context     tokens of prompt plus answer
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Tokenizer,
        config: EngineConfig,
        *,
        chat: ChatTemplate | None = None,
        params: SamplingParams | None = None,
        chooser: Chooser | None = None,
    ) -> None:
        """Allocates the cache. ``chooser`` draws the tokens, see ``sampling.sample``.

        Raises ConfigError when ``config`` asks for what cannot be.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.chat = chat
        self.config = config
        self.default_params = params or SamplingParams()
        self._chooser = chooser
        self.cache_size: CacheSize = plan_cache(model, config)
        self.max_context = self.cache_size.max_context
        self._cache = model.new_cache(self.cache_size.num_blocks, config.block_size, config.kv_dtype)
        self._end_ids = end_ids(model.config, tokenizer)
        self._scheduler = Scheduler(
            BlockPool(self.cache_size.num_blocks, config.block_size, prefix_caching=config.prefix_caching),
            max_batch_tokens=config.max_batch_tokens,
            max_running=config.max_running,
            max_logit_rows=max(1, config.max_running, MAX_LOGIT_VALUES // model.config.vocab_size),
        )
        self._open: dict[int, Generation] = {}  # by sequence id
        self._requests: dict[str, list[int]] = {}  # sequence ids of each open request
        self._next_id = count()
        self._counts: Counter[str] = Counter()

    @classmethod
    def load(cls, model_dir: Path, config: EngineConfig) -> "Engine":
        """Read everything a model folder holds. Raises CheckpointError or ConfigError.

        On the cpu backend torch is left with one thread: ours do the work, torch's would spin beside them.
        """
        tokenizer = Tokenizer.load(model_dir)
        # Before the weights: they take minutes. Their dtype does not matter here.
        _, model_config = loader.read_model_config(model_dir, "float32")
        check_vocabulary(tokenizer, model_config.vocab_size)
        chat = ChatTemplate.load(model_dir, tokenizer)
        params = default_params(model_dir)
        if config.threads is not None:
            kernels.set_num_threads(config.threads)
            torch.set_num_threads(config.threads)
        place = choose_device(config.device, config.backend)
        LOGGER.info(place.reason)
        chosen, recipe = kernels.choose(config.backend, device=place.device), Recipe.of(config)
        if config.quantize_statistics is not None:
            recipe = replace(recipe, moments=load_moments(config.quantize_statistics, model_dir))
        store = None
        if config.packed_file and chosen.backend == "cpu":
            store = PackedStore(model_dir, recipe, config.packed_dir, config.packed_verify)
        gate = Gate.choose(config.max_quant_kl, recipe, model_config, model_dir, tokenizer)
        with told_as_config_errors(chosen.device):
            model = loader.load_model(model_dir, chosen, recipe, store, gate)
            if chosen.backend == "cpu":
                torch.set_num_threads(1)
            return cls(model, tokenizer, config, chat=chat, params=params, chooser=chosen.choose_token)

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise RequestError or ContextLengthExceeded for a request that must not be admitted."""
        vocab_size = self.model.config.vocab_size
        if not prompt_ids:
            raise RequestError("the prompt is empty; it needs at least one token", param="prompt")
        if min(prompt_ids) < 0 or max(prompt_ids) >= vocab_size:
            raise RequestError(f"prompt token ids must be from 0 to {vocab_size - 1}", param="prompt")
        room = self.max_context - len(prompt_ids)
        if room < (0 if params.max_tokens == 0 else 1):
            raise ContextLengthExceeded(
                f"the prompt has {len(prompt_ids)} tokens and the context is {self.max_context} tokens, "
                "which must hold at least one more; shorten it or raise --max-context",
                param="prompt",
            )
        if params.max_tokens is not None and params.max_tokens > room:
            raise ContextLengthExceeded(
                f"the prompt has {len(prompt_ids)} tokens and max_tokens is {params.max_tokens}, "
                f"together more than the context of {self.max_context}; lower max_tokens to {room} or less",
                param="max_tokens",
            )
        if params.min_tokens > room:
            raise RequestError(f"min_tokens must be at most {room} for this prompt", param="min_tokens")
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids)):
            if any(not 0 <= token_id < vocab_size for token_id in ids):
                raise RequestError(f"{name} has token ids beyond 0 to {vocab_size - 1}", param=name)

    def add(
        self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams, *, salt: str = ""
    ) -> None:
        """Queue a request of ``params.n`` choices. Raises RequestError as ``check``, or for an id in use.

        Cached prefixes are shared only between requests of equal ``salt``.
        """
        self.check(prompt_ids, params)
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use", param="request_id")
        seed = draw_seed() if params.seed is None else params.seed
        room = self.max_context - len(prompt_ids)
        max_total = len(prompt_ids) + (room if params.max_tokens is None else params.max_tokens)
        self._requests[request_id] = []
        for choice in range(params.n):
            wants_prompt = params.prompt_logprobs is not None and choice == 0
            sequence = QueuedSequence(
                next(self._next_id), list(prompt_ids), max_total, salt, logits_from=0 if wants_prompt else -1
            )
            self._scheduler.add(sequence)
            self._requests[request_id].append(sequence.sequence_id)
            self._open[sequence.sequence_id] = Generation(
                request_id, choice, sequence, params, seed, self.tokenizer, self._end_ids, self._chooser
            )
        self._counts["prompt_tokens"] += len(prompt_ids)

    def step(self) -> list[TokenEvent]:
        """Compute one batch; the events of every choice that moved. An empty list when nothing can be told.

        Raises what the model raises; then call ``fail_running``.
        """
        step = self._scheduler.schedule()
        if not step.chunks:
            return []
        logits = self._compute(step)
        sampled, failed = self._sample(step, logits)
        self._scheduler.update(step, _token_ids(sampled))
        return self._fail(failed) + self._advance(sampled)

    def has_work(self) -> bool:
        return bool(self._open)

    def open_choices(self, request_id: str) -> set[int]:
        """Choices of a request that have not had their last event; empty for unknown ids."""
        return {self._open[sequence_id].choice for sequence_id in self._requests.get(request_id, ())}

    def abort(self, request_id: str) -> list[TokenEvent]:
        """End a request now; its blocks are free when this returns. Unknown ids are ignored."""
        ids = list(self._requests.get(request_id, ()))
        return [self._close(sequence_id, self._open[sequence_id].end("abort")) for sequence_id in ids]

    def fail_running(self, message: str) -> list[TokenEvent]:
        """After ``step`` raised: end every running choice with an error, trust nothing in the cache."""
        failed = dict.fromkeys(self._scheduler.running_ids, message)
        self._scheduler.pool.forget_all()
        return self._fail(failed)

    def stats(self) -> EngineStats:
        """Numbers of this moment; see EngineStats."""
        pool = self._scheduler.pool
        return EngineStats(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free,
            preemptions=self._scheduler.num_preemptions,
            prefix_query_tokens=self._scheduler.prefix_query_tokens,
            prefix_hit_tokens=self._scheduler.prefix_hit_tokens,
            **self._counts,
        )

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[Completion]]:
        """Answer all prompts and return, for each, its ``params.n`` completions. For scripts and tests."""
        for prompt_ids in prompts:
            self.check(prompt_ids, params)
        names = [f"generate-{next(self._next_id)}" for _ in prompts]
        events: dict[tuple[str, int], list[TokenEvent]] = {}
        for name, prompt_ids in zip(names, prompts, strict=True):
            self.add(name, prompt_ids, params)
        try:
            while any(name in self._requests for name in names):
                for event in self.step():
                    events.setdefault((event.request_id, event.choice), []).append(event)
        except BaseException:
            self.fail_running("a step failed")
            for name in names:
                self.abort(name)
            raise
        return [[_completion(events[name, choice]) for choice in range(params.n)] for name in names]

    def _compute(self, step: Step) -> Logits:
        batch = Batch.build(step, self.config.block_size)
        logits: Logits = self.model.forward(batch, self._cache).numpy(force=True)
        self._counts["steps"] += 1
        self._counts["computed_tokens"] += step.num_tokens
        return logits

    def _sample(self, step: Step, logits: Logits) -> tuple[dict[int, Sampled], dict[int, str]]:
        """By sequence id: what was sampled where a token was due, and what failed alone."""
        sampled: dict[int, Sampled] = {}
        failed: dict[int, str] = {}
        for chunk, rows in zip(step.chunks, rows_of(step.chunks, logits), strict=True):
            try:
                outcome = self._look(chunk, rows)
            except RequestFailed as error:
                failed[chunk.sequence_id] = str(error)
            else:
                if outcome is not None:
                    sampled[chunk.sequence_id] = outcome
        return sampled, failed

    def _look(self, chunk: Chunk, rows: Logits) -> Sampled | None:
        return self._open[chunk.sequence_id].look(chunk, rows) if len(rows) else None

    def _advance(self, sampled: dict[int, Sampled]) -> list[TokenEvent]:
        events = []
        for sequence_id, outcome in sampled.items():
            event = self._open[sequence_id].advance(outcome)
            self._counts["generation_tokens"] += len(event.token_ids)
            events.append(event if event.finish_reason is None else self._close(sequence_id, event))
        return events

    def _fail(self, failed: dict[int, str]) -> list[TokenEvent]:
        return [
            self._close(sequence_id, self._open[sequence_id].end("error", message))
            for sequence_id, message in failed.items()
        ]

    def _close(self, sequence_id: int, event: TokenEvent) -> TokenEvent:
        """Forget a choice that has ended and give its blocks back."""
        self._scheduler.remove(sequence_id, trusted=event.finish_reason != "error")
        del self._open[sequence_id]
        remaining = self._requests[event.request_id]
        remaining.remove(sequence_id)
        if not remaining:
            del self._requests[event.request_id]
        self._counts[f"finished_{event.finish_reason}"] += 1
        return event


def _token_ids(sampled: dict[int, Sampled]) -> dict[int, int]:
    return {key: outcome.token_id for key, outcome in sampled.items() if outcome.token_id is not None}


def _completion(events: Sequence[TokenEvent]) -> Completion:
    first, last = events[0], events[-1]
    logprobs = [logprob for event in events for logprob in event.logprobs or ()]
    return Completion(
        choice=last.choice,
        text="".join(event.text for event in events),
        token_ids=tuple(token_id for event in events for token_id in event.token_ids),
        logprobs=tuple(logprobs) if any(event.logprobs is not None for event in events) else None,
        finish_reason=last.finish_reason or "error",
        stop_reason=last.stop_reason,
        error=last.error,
        num_prompt_tokens=last.num_prompt_tokens,
        num_cached_tokens=last.num_cached_tokens,
        prompt_logprobs=first.prompt_logprobs,
    )
