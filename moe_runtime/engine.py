"""Engine: token ids in, events out. One step at a time, on one thread; knows no HTTP and no asyncio."""

from collections import Counter
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch

from moe_runtime.admission import check_request
from moe_runtime.batch import Batch
from moe_runtime.chat import ChatTemplate
from moe_runtime.config import EngineConfig
from moe_runtime.device import told_as_config_errors, told_when_lost
from moe_runtime.device_sampling import Sampler, sample_on_device
from moe_runtime.engine_load import load_parts
from moe_runtime.engine_setup import CacheSize, end_ids, plan_cache
from moe_runtime.errors import RequestError, RequestFailed
from moe_runtime.generation import Generation, Sampled, sample_on_host, token_ids_of
from moe_runtime.ghost_router import GhostRouter
from moe_runtime.graphs import choose_steps
from moe_runtime.kernels import RouteMeter
from moe_runtime.kv_cache import BlockPool
from moe_runtime.live_experts import LiveExperts
from moe_runtime.lost_mass import LostMass
from moe_runtime.masks import NO_MASK, MaskTable
from moe_runtime.output import Completion, EngineStats, TokenEvent, TokenLogprob, TopLogprob
from moe_runtime.placement import Hotness, Placement
from moe_runtime.sampling import Chooser, SamplingParams, draw_seed
from moe_runtime.scheduler import Scheduler, Step
from moe_runtime.sequence import Sequence as QueuedSequence
from moe_runtime.tokenizer import Tokenizer

__all__ = ["Completion", "Engine", "EngineStats", "TokenEvent", "TokenLogprob", "TopLogprob"]

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
        sampler: Sampler | None = None,
        live: LiveExperts | None = None,
    ) -> None:
        """Allocates the cache. ``chooser`` draws the tokens, see ``sampling.sample``, unless there is a
        ``sampler`` that chooses them where the logits are, see device_sampling.py.

        Raises ConfigError when ``config`` asks for what cannot be.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.chat = chat
        self.config = config
        self.default_params = params or SamplingParams()
        self._chooser, self._sampler = chooser, sampler
        self.cache_size: CacheSize = plan_cache(model, config)
        self.max_context = self.cache_size.max_context
        self._cache = model.new_cache(self.cache_size.num_blocks, config.block_size, config.kv_dtype)
        self._end_ids = end_ids(model.config, tokenizer)
        self.masks, self.live = MaskTable(model), live
        self._lost_mass = LostMass(model, self.cache_size.num_blocks, config.block_size)
        max_logit_rows = max(1, config.max_running, MAX_LOGIT_VALUES // model.config.vocab_size)
        self._scheduler = Scheduler(
            BlockPool(self.cache_size.num_blocks, config.block_size, prefix_caching=config.prefix_caching),
            max_batch_tokens=config.max_batch_tokens,
            max_running=config.max_running,
            max_logit_rows=max_logit_rows,
        )
        self._steps = choose_steps(
            model, self._cache, config, max_context=self.max_context, max_logit_rows=max_logit_rows
        )
        self._open: dict[int, Generation] = {}  # by sequence id
        self._requests: dict[str, list[int]] = {}  # sequence ids of each open request
        self._next_id = count()
        self._counts: Counter[str] = Counter()

    @classmethod
    def load(
        cls,
        model_dir: Path,
        config: EngineConfig,
        *,
        placement: Placement | None = None,
        hotness: Hotness | None = None,
        live: bool = False,
        ghosts: GhostRouter | None = None,
    ) -> "Engine":
        """Read everything a model folder holds. Raises CheckpointError, ConfigError or PlanError.

        ``placement``: where experts are to be, and which are left out; None for all of them where the rest
        computes. ``hotness`` says which ones stay on a GPU that cannot hold all. See expert_room.py. With
        ``live`` they can come and go later, by the attribute ``live``. With ``ghosts`` the model is the one
        that an exported checkpoint was cut from: place what is there, and let requests name its mask.
        """
        parts = load_parts(model_dir, config, placement, hotness, live=live, ghosts=ghosts)
        told = ("chat", "params", "chooser", "sampler", "live")
        with told_as_config_errors(parts.model.device):
            return cls(parts.model, parts.tokenizer, config, **{name: getattr(parts, name) for name in told})

    def prepare(self) -> None:
        """For after the start's scenarios were added, which may make graphs stale. Raises ConfigError."""
        with told_as_config_errors(self.model.device):
            self._steps.prepare()

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None:
        """Raise RequestError or ContextLengthExceeded for a request that must not be admitted."""
        check_request(prompt_ids, params, self.model.config.vocab_size, self.max_context)

    def add(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        salt: str = "",
        scenario: str | None = None,
    ) -> None:
        """Queue a request of ``params.n`` choices, which use the experts of ``scenario`` (``masks``) alone.

        Raises RequestError as ``check``, or for an id in use; ModelNotFound for an unknown scenario. Cached
        prefixes are shared only between requests of equal ``salt`` and mask.
        """
        self.check(prompt_ids, params)
        if request_id in self._requests:
            raise RequestError(f"request id {request_id!r} is in use", param="request_id")
        grant = self.masks.grant(scenario)
        seed = draw_seed() if params.seed is None else params.seed
        room = self.max_context - len(prompt_ids)
        max_total = len(prompt_ids) + (room if params.max_tokens is None else params.max_tokens)
        for choice in range(params.n):
            wants_prompt = params.prompt_logprobs is not None and choice == 0
            sequence = QueuedSequence(
                next(self._next_id),
                list(prompt_ids),
                max_total,
                grant.salt + salt,
                logits_from=0 if wants_prompt else -1,
                mask_row=grant.row,
            )
            self._scheduler.add(sequence)
            self.masks.use(grant.row)
            self._requests.setdefault(request_id, []).append(sequence.sequence_id)
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
        with told_when_lost(self.model.device):
            logits, meter = self._compute(step)
            sampled, failed = self._sample(step, logits)
            self._measure(step, meter)
        refused = self._mind_drift(sampled)
        self._scheduler.update(step, token_ids_of(sampled))
        return refused + self._fail(failed) + self._advance(sampled)

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
            outside_mask=self._lost_mass.num_outside,
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
        return [[Completion.of(events[name, choice]) for choice in range(params.n)] for name in names]

    def _compute(self, step: Step) -> tuple[torch.Tensor, RouteMeter | None]:
        """The step's logits [R, V], which the device may still be busy with, and what its masks did."""
        batch = Batch.build(step, self.config.block_size)
        meter = self._lost_mass.start(step)
        logits = self._steps.forward(batch, meter)
        self._counts["steps"] += 1
        self._counts["computed_tokens"] += step.num_tokens
        return logits, meter

    def _sample(self, step: Step, logits: torch.Tensor) -> tuple[dict[int, Sampled], dict[int, str]]:
        """By sequence id: what was sampled where a token was due, and what failed alone."""
        if self._sampler is None:
            outcomes = sample_on_host(step.chunks, logits.numpy(force=True), self._open)
        else:
            outcomes = sample_on_device(step.chunks, logits, self._open, self._sampler)
        told = list(zip((chunk.sequence_id for chunk in step.chunks), outcomes, strict=True))
        sampled = {key: outcome for key, outcome in told if isinstance(outcome, Sampled)}
        failed = {key: str(outcome) for key, outcome in told if isinstance(outcome, RequestFailed)}
        return sampled, failed

    def _measure(self, step: Step, meter: RouteMeter | None) -> None:
        """What masks and missing experts did in ``step``: read when its tokens are here, to wait but once."""
        self.masks.absent.check_step()
        if meter is not None:
            self._lost_mass.read(step, meter, {key: each.sequence for key, each in self._open.items()})

    def _mind_drift(self, sampled: dict[int, Sampled]) -> list[TokenEvent]:
        """What the scenarios' policies do with the prompts that are read now: the last events of those that
        are refused. Whoever may not go on loses its place in ``sampled``.
        """
        refused = []
        for sequence_id in list(sampled):
            generation = self._open[sequence_id]
            verdict = self.masks.judge(generation.sequence)
            if verdict is None:
                continue
            generation.sequence.drift = verdict.action
            if verdict.action != "flag":
                del sampled[sequence_id]
            if verdict.action == "reject":
                refused.append(self._close(sequence_id, generation.end("drift", verdict.message)))
            elif verdict.action == "fallback":
                self.masks.release(generation.sequence.mask_row)
                self._scheduler.start_over(sequence_id, verdict.salt, NO_MASK)
                generation.start_over()
        return refused

    def _advance(self, sampled: dict[int, Sampled]) -> list[TokenEvent]:
        events = []
        for sequence_id, outcome in sampled.items():
            event = self._open[sequence_id].advance(outcome)
            self._counts["generation_tokens"] += len(event.token_ids)
            events.append(event if event.finish_reason is None else self._close(sequence_id, event))
        return events

    def _fail(self, failed: dict[int, str]) -> list[TokenEvent]:
        return [self._close(key, self._open[key].end("error", message)) for key, message in failed.items()]

    def _close(self, sequence_id: int, event: TokenEvent) -> TokenEvent:
        """Forget a choice that has ended and give its blocks back."""
        self._scheduler.remove(sequence_id, trusted=event.finish_reason != "error")
        self.masks.release(self._open.pop(sequence_id).sequence.mask_row)
        remaining = self._requests[event.request_id]
        remaining.remove(sequence_id)
        if not remaining:
            del self._requests[event.request_id]
        self._counts[f"finished_{event.finish_reason}"] += 1
        return event
