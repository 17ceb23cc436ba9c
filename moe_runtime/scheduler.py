"""Scheduler: which tokens of which sequences to compute next. Pure Python; a step is plain numbers.

One queue in order of arrival. Its front runs (holds cache blocks), the rest waits; a step serves the
running ones oldest first and then starts waiting ones, until the token budget is spent. When blocks run
out, the newest running sequence is preempted: it gives its blocks back, keeps its tokens, and waits at the
front of the waiting. So every running sequence is older than every waiting one, the oldest always advances,
and nobody starves.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

from moe_runtime.errors import RequestError
from moe_runtime.kv_cache import BlockPool
from moe_runtime.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one sequence for one step; positions start .. end-1, all blocks up to there."""

    sequence_id: int
    start: int
    token_ids: tuple[int, ...]
    blocks: tuple[int, ...]
    logit_start: int  # logits are wanted of positions logit_start .. end-1; == end for none
    samples: bool  # the chunk ends where the sequence ends: its last logits choose the next token
    mask_row: int = -1  # of Batch.mask_rows

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Step:
    """What one forward pass computes, oldest sequence first."""

    chunks: tuple[Chunk, ...] = ()
    preempted: tuple[int, ...] = ()  # sequence ids, newest first

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.chunks)

    @property
    def num_logit_rows(self) -> int:
        return sum(chunk.end - chunk.logit_start for chunk in self.chunks)


class Scheduler:
    """``add`` sequences, then ``schedule`` / ``update`` in turn; ``remove`` one at any time between."""

    def __init__(
        self, pool: BlockPool, *, max_batch_tokens: int, max_running: int, max_logit_rows: int | None = None
    ) -> None:
        self.pool = pool
        self.max_batch_tokens = max_batch_tokens
        self.max_running = max_running
        self.max_logit_rows = max_logit_rows or max_batch_tokens
        self.num_preemptions = 0
        self.prefix_query_tokens = 0
        self.prefix_hit_tokens = 0
        self._running: OrderedDict[int, Sequence] = OrderedDict()  # oldest first, all older than any waiting
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def running_ids(self) -> list[int]:
        return list(self._running)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue. Raises RequestError when it could never fit the pool."""
        needed = self.pool.blocks_for(sequence.max_total)
        if needed > self.pool.num_blocks:
            raise RequestError(
                f"prompt and answer of up to {sequence.max_total} tokens need {needed} cache blocks, "
                f"there are {self.pool.num_blocks}; ask for fewer tokens or raise --cache-bytes",
                param="max_tokens",
            )
        self._waiting[sequence.sequence_id] = sequence

    def schedule(self) -> Step:
        """Choose the next step and reserve its blocks. An empty step means that there is nothing to do."""
        chunks: list[Chunk] = []
        preempted: list[int] = []
        tokens, rows = self.max_batch_tokens, self.max_logit_rows
        for sequence in list(self._running.values()):
            if tokens == 0 or rows == 0 or not self._grow(sequence, preempted):
                break
            chunks.append(self._chunk(sequence, tokens, rows))
            tokens -= len(chunks[-1].token_ids)
            rows -= chunks[-1].end - chunks[-1].logit_start
        while self._waiting and tokens and rows and self.num_running < self.max_running:
            sequence = next(iter(self._waiting.values()))
            if not self._start(sequence):
                break
            chunks.append(self._chunk(sequence, tokens, rows))
            tokens -= len(chunks[-1].token_ids)
            rows -= chunks[-1].end - chunks[-1].logit_start
        return Step(tuple(chunks), tuple(preempted))

    def update(self, step: Step, sampled: Mapping[int, int]) -> None:
        """Record that ``step`` was computed; append the sampled token of each sequence id in ``sampled``."""
        for chunk in step.chunks:
            sequence = self._running.get(chunk.sequence_id)
            if sequence is None:
                continue  # removed since
            sequence.num_computed = chunk.end
            sequence.logits_from = max(sequence.logits_from, chunk.end)
            if chunk.sequence_id in sampled:
                sequence.token_ids.append(sampled[chunk.sequence_id])

    def remove(self, sequence_id: int, *, trusted: bool = True) -> bool:
        """Take a sequence out, wherever it is, and its blocks back. False when it is not here.

        ``trusted=False`` also forgets the content of its blocks: nobody shall reuse them as a prefix.
        """
        sequence = self._running.pop(sequence_id, None) or self._waiting.pop(sequence_id, None)
        if sequence is None:
            return False
        if not trusted:
            self.pool.forget(sequence.blocks)
        self.pool.release(sequence.restart())
        return True

    def start_over(self, sequence_id: int, salt: str, mask_row: int) -> None:
        """Send a running sequence that has only its prompt back, right behind all that run, to be computed
        anew under another mask and with a salt that belongs to it.
        """
        sequence = self._running.pop(sequence_id)
        self.pool.release(sequence.start_over(salt, mask_row))
        self._waiting[sequence_id] = sequence
        self._waiting.move_to_end(sequence_id, last=False)

    def _grow(self, sequence: Sequence, preempted: list[int]) -> bool:
        """Give a running sequence blocks for all its tokens. False when that took its own place too."""
        if sequence.sequence_id not in self._running:
            return False  # preempted a moment ago, for an older one
        needed = self.pool.blocks_for(sequence.num_total) - len(sequence.blocks)
        while needed > self.pool.num_free:
            newest_id, newest = self._running.popitem()
            self.pool.release(newest.restart())
            self._waiting[newest_id] = newest
            self._waiting.move_to_end(newest_id, last=False)
            preempted.append(newest_id)
            self.num_preemptions += 1
            if newest is sequence:
                return False
        sequence.blocks += self.pool.allocate(needed)
        return True

    def _start(self, sequence: Sequence) -> bool:
        """Move the first waiting sequence to the running if the blocks for all its tokens are there.

        One more block is left for each sequence already running, so that their next tokens do not throw
        the newcomer out again at once.
        """
        # The last token is always computed, and so is every token whose logits are wanted.
        limit = min(sequence.num_total - 1, sequence.logits_from)
        matched, node = self.pool.match(sequence.token_ids, limit, sequence.salt)
        needed = self.pool.blocks_for(sequence.num_total) - len(matched)
        if needed + self.num_running > self.pool.num_free_without(matched):
            return False
        self.pool.share(matched)
        sequence.blocks = matched + self.pool.allocate(needed)
        sequence.num_computed = len(matched) * self.pool.block_size
        sequence.num_registered, sequence.prefix_node = len(matched), node
        if sequence.num_starts == 0:
            sequence.num_cached = sequence.num_computed
            self.prefix_query_tokens += sequence.num_total
            self.prefix_hit_tokens += sequence.num_computed
        sequence.num_starts += 1
        self._running[sequence.sequence_id] = self._waiting.pop(sequence.sequence_id)
        return True

    def _chunk(self, sequence: Sequence, tokens: int, rows: int) -> Chunk:
        """As many pending tokens as the budgets allow, at least one."""
        start = sequence.num_computed
        logit_start = max(start, sequence.logits_from)
        end = min(sequence.num_total, start + tokens, logit_start + rows)
        self._register(sequence, end)
        return Chunk(
            sequence_id=sequence.sequence_id,
            start=start,
            token_ids=tuple(sequence.token_ids[start:end]),
            blocks=tuple(sequence.blocks[: self.pool.blocks_for(end)]),
            logit_start=min(logit_start, end),
            samples=end == sequence.num_total,
            mask_row=sequence.mask_row,
        )

    def _register(self, sequence: Sequence, end: int) -> None:
        """Make the blocks that this step fills known at once.

        A sequence later in the same step may already share them: in every layer, the keys and values of all
        tokens of the step are written before any is read. Should the step fail, see ``forget_all``.
        """
        size = self.pool.block_size
        for index in range(sequence.num_registered, end // size):
            content = sequence.token_ids[index * size : (index + 1) * size]
            sequence.prefix_node = self.pool.register(sequence.prefix_node, content, sequence.blocks[index])
            sequence.num_registered = index + 1
