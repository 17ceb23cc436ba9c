"""Decode steps on a GPU: captured once per batch size, then replayed with one call of the host.

A decode step of 48 layers is nearly a thousand launches of a few microseconds each, about as long as the host
needs for one. So a step in which every row is another sequence's next token is padded to one of a few batch
sizes and replayed. All that differs between steps is data in static memory: tokens, positions, block tables,
and for each row its scenario's mask; one graph serves any mix of them. Rows that pad write nothing, see
nothing and choose no expert. A row has the same bits as in a step that is launched kernel by kernel, which
remains the way of all other steps (prompts in chunks), of larger batches, and of what could not be captured.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from moe_runtime.batch import Batch
from moe_runtime.config import EngineConfig
from moe_runtime.graph_recorder import Recorder, recorder_for
from moe_runtime.kernels import RouteMeter
from moe_runtime.layers.experts import TieredExperts

LOGGER = logging.getLogger(__name__)
LARGEST_BATCH = 256  # beyond, the device is busy with a step for longer than the host with launching it
NARROWEST = 4096  # positions that the narrowest block tables hold; each next width holds four times as many
MIB = 1 << 20


class Steps(Protocol):
    def prepare(self) -> None:
        """Make ready, before requests come, what decode steps without scenarios need and does not fit the
        model as it is now. Cheap when there is nothing to do.
        """

    def forward(self, batch: Batch, meter: RouteMeter | None = None) -> torch.Tensor:
        """As the model's ``forward``; the logits are valid until the next call."""


def choose_steps(
    model: Any, cache: Any, config: EngineConfig, *, max_context: int, max_logit_rows: int
) -> Steps:
    """How steps of ``model`` over ``cache`` are run; on a GPU they are rehearsed before the first request.

    Raises what the device raises when it has too little memory for the largest step.
    """
    plain = PlainSteps(model, cache)
    recorder = recorder_for(model.device)
    if recorder is None:
        return plain
    max_blocks = -(-max_context // config.block_size)
    plain.forward(_largest_step(config.max_batch_tokens, max_blocks, max_logit_rows))
    if not config.graphs:
        return plain
    if any(isinstance(mixture.experts, TieredExperts) for _, mixture in model.mixtures()):
        LOGGER.info("decode steps are launched kernel by kernel, since experts on the host take part in them")
        return plain
    graphs = DecodeGraphs(
        model, cache, recorder, config.max_running, block_size=config.block_size, max_blocks=max_blocks
    )
    graphs.prepare()
    return graphs


@dataclass(frozen=True)
class PlainSteps:
    """Every step kernel by kernel."""

    model: Any
    cache: Any

    def prepare(self) -> None:
        """There is nothing to make ready."""

    def forward(self, batch: Batch, meter: RouteMeter | None = None) -> torch.Tensor:
        logits: torch.Tensor = self.model.forward(batch, self.cache, meter)
        return logits


@dataclass(frozen=True, slots=True)
class Shape:
    """What a graph is captured for. ``blocks``: the width of its block tables."""

    tokens: int
    blocks: int
    metered: bool = False


class DecodeGraphs:
    """Belongs to one thread at a time. Graphs are captured when they are first needed, those of the narrowest
    block tables by ``prepare``. Weights, masks and cache may change where they lie, and must not move; what
    the model counts as ``moves`` may, and each graph is captured anew when it is needed next.
    """

    def __init__(
        self, model: Any, cache: Any, recorder: Recorder, max_batch: int, *, block_size: int, max_blocks: int
    ) -> None:
        """``max_blocks``: of one sequence."""
        self._model, self._cache, self._recorder = model, cache, recorder
        self._sizes = tuple(batch_sizes(min(max_batch, LARGEST_BATCH)))
        self._widths = tuple(table_widths(max_blocks, block_size))
        self._replays: dict[Shape, Callable[[], None] | None] = {}  # None: could not be captured
        self._made: dict[Shape, int] = {}  # the model's moves at that time
        self._possible = True
        device, most = model.device, self._sizes[-1]
        largest = Batch.of_nobody(most, self._widths[-1]).staged(pinned=False)
        self._bytes = torch.empty(len(largest), dtype=torch.uint8, device=device)
        self._logits = torch.empty(most, model.config.vocab_size, device=device)
        self._lost = torch.zeros(most, device=device)
        self._outside = torch.zeros(1, dtype=torch.int64, device=device)

    def prepare(self) -> None:
        """Capture a graph for every batch size, the largest first: the others then fit into its memory. Those
        that there are and that are still right stay.
        """
        start, before = time.monotonic(), self._recorder.free_bytes()
        every = [Shape(tokens, self._widths[0]) for tokens in reversed(self._sizes)]
        stale = [shape for shape in every if self._is_stale(shape)]
        if not stale:
            return
        for shape in stale:
            self._capture_anew(shape)
        captured = sorted(shape.tokens for shape in stale if self._replays[shape] is not None)
        LOGGER.info(
            "captured decode steps of %s sequences in %.1f s and %d MiB",
            ", ".join(map(str, captured)) or "no", time.monotonic() - start,
            (before - self._recorder.free_bytes()) // MIB,
        )  # fmt: skip

    def forward(self, batch: Batch, meter: RouteMeter | None = None) -> torch.Tensor:
        """As the model's ``forward``; the logits are valid until the next call."""
        shape = self._shape_for(batch, meter is not None)
        replay = None if shape is None else self._captured(shape)
        if shape is None or replay is None:
            logits: torch.Tensor = self._model.forward(batch, self._cache, meter)
            return logits
        self._stage(batch.padded(shape.tokens, shape.blocks))
        replay()
        num_tokens = len(batch.token_ids)
        if meter is not None:
            meter.outside.add_(self._outside)
            if meter.lost is not None:
                meter.lost.add_(self._lost[:num_tokens])
        return self._logits[:num_tokens]

    def _shape_for(self, batch: Batch, metered: bool) -> Shape | None:
        """The smallest that holds ``batch``, if it is a decode step and any does."""
        if not batch.is_decode:
            return None
        num_tokens, blocks = batch.block_tables.shape
        tokens = next((size for size in self._sizes if size >= num_tokens), None)
        width = next((width for width in self._widths if width >= blocks), None)
        return None if tokens is None or width is None else Shape(tokens, width, metered)

    def _captured(self, shape: Shape) -> Callable[[], None] | None:
        if self._is_stale(shape):
            before = self._recorder.free_bytes()
            self._capture_anew(shape)
            if self._replays[shape] is not None:
                LOGGER.info(
                    "captured decode steps of %d sequences of %d blocks%s in %d MiB",
                    shape.tokens, shape.blocks, " with scenarios" if shape.metered else "",
                    (before - self._recorder.free_bytes()) // MIB,
                )  # fmt: skip
        return self._replays[shape]

    def _is_stale(self, shape: Shape) -> bool:
        return self._made.get(shape) != self._model.moves

    def _capture_anew(self, shape: Shape) -> None:
        self._replays.pop(shape, None)  # first, so that two graphs of one shape never hold memory
        self._replays[shape] = self._capture(shape)

    def _capture(self, shape: Shape) -> Callable[[], None] | None:
        """None, and the reason in the log, when the device cannot. Raises RuntimeError if it is lost."""
        self._made[shape] = self._model.moves
        if not self._possible:
            return None
        nobody = Batch.of_nobody(shape.tokens, shape.blocks)
        self._stage(nobody)
        static = nobody.on(self._bytes)
        meter = RouteMeter(self._lost[: shape.tokens], self._outside) if shape.metered else None

        def run() -> None:
            if meter is not None:
                self._lost.zero_()
                self._outside.zero_()
            logits = self._model.forward(static, self._cache, meter)
            self._logits[: shape.tokens].copy_(logits)

        try:
            return self._recorder.record(run)
        except RuntimeError as error:  # out of memory and what else a driver says
            self._possible = isinstance(error, torch.OutOfMemoryError)  # a smaller one may fit
            told = (str(error).strip().splitlines() or [type(error).__name__])[0]
            LOGGER.warning(
                "a decode step of %d sequences could not be captured (%s); %s launched kernel by kernel: the "
                "same tokens, later. --no-graphs does not try, a smaller --cache-bytes leaves more memory",
                shape.tokens, told, "such steps are" if self._possible else "all new ones are",
            )  # fmt: skip
        self._recorder.settle()
        return None

    def _stage(self, batch: Batch) -> None:
        """Into the static memory, in one copy that the host does not wait for."""
        run = batch.staged(pinned=self._bytes.device.type == "cuda")
        self._bytes[: len(run)].copy_(run, non_blocking=True)


def batch_sizes(largest: int) -> Iterator[int]:
    """1, 2, 4, 8, then by eights, from 128 on by eighths of a power of two; the last is ``largest``."""
    size = 1
    while size < largest:
        yield size
        size += max(min(size, 8), (1 << (size.bit_length() - 1)) // 8)
    yield largest


def table_widths(max_blocks: int, block_size: int) -> Iterator[int]:
    """Blocks of one sequence. Attention shares its work out by the width, so short texts want narrow ones."""
    width = -(-NARROWEST // block_size)
    while width < max_blocks:
        yield width
        width *= 4
    yield max_blocks


def _largest_step(max_tokens: int, max_blocks: int, logit_rows: int) -> Batch:
    """A chunk of a prompt that nobody asked for, with as many logits as a step may have."""
    tokens = Batch.of_nobody(max_tokens, 1)
    return replace(
        tokens,
        sequence_rows=torch.zeros(max_tokens, dtype=torch.int32),
        block_tables=torch.zeros(1, max_blocks, dtype=torch.int32),
        logit_rows=torch.arange(min(max_tokens, logit_rows)),
    )
