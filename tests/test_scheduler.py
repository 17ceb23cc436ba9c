"""Scheduler and block pool under random arrivals, aborts, budgets and tiny pools, against a literal model."""

import random
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.errors import RequestError
from moe_runtime.kv_cache import BlockPool
from moe_runtime.scheduler import Chunk, Scheduler, Step
from moe_runtime.sequence import Sequence

MODULES = ("config", "cli", "errors", "output", "sequence", "kv_cache", "scheduler")


@pytest.mark.parametrize("module", MODULES)
def test_the_scheduling_side_imports_without_torch(module: str) -> None:
    code = f"import sys, moe_runtime.{module}; assert not {{'torch', 'numpy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def next_token(history: list[int]) -> int:
    return hash(tuple(history)) % 3  # few different tokens, so that prefixes often agree


class World:
    """A scheduler, and a cache of token ids that it directs: what a model would do, without a model."""

    def __init__(
        self, num_blocks: int = 8, block_size: int = 4, *, tokens: int = 8, running: int = 4, **options: int
    ) -> None:
        self.pool = BlockPool(num_blocks, block_size, prefix_caching=bool(options.pop("caching", 1)))
        self.scheduler = Scheduler(self.pool, max_batch_tokens=tokens, max_running=running, **options)
        self.cache = [-1] * (num_blocks * block_size)
        self.sequences: dict[int, Sequence] = {}
        self.finished: dict[int, list[int]] = {}
        self.first_scheduled: list[int] = []
        self.asked_logits: set[tuple[int, int]] = set()
        self.next_id = 0

    def add(self, prompt: list[int], max_new: int = 4, *, salt: str = "", logits_from: int = -1) -> int:
        sequence = Sequence(self.next_id, list(prompt), len(prompt) + max_new, salt, logits_from=logits_from)
        self.scheduler.add(sequence)
        self.sequences[self.next_id] = sequence
        self.next_id += 1
        return sequence.sequence_id

    def remove(self, sequence_id: int) -> None:
        assert self.scheduler.remove(sequence_id)
        assert not self.sequences.pop(sequence_id).blocks

    def step(self) -> Step:
        step = self.scheduler.schedule()
        self.check_step(step)
        for chunk in step.chunks:  # all writes come before all reads, as in a layer of a model
            for position, token in enumerate(chunk.token_ids, chunk.start):
                self.cache[self.slot(chunk, position)] = token
        sampled = {}
        for chunk in step.chunks:
            history = [self.cache[self.slot(chunk, position)] for position in range(chunk.end)]
            assert history == self.sequences[chunk.sequence_id].token_ids[: chunk.end]
            if chunk.samples:
                sampled[chunk.sequence_id] = next_token(history)
        self.scheduler.update(step, sampled)
        for sequence_id in sampled:
            sequence = self.sequences[sequence_id]
            if sequence.num_total == sequence.max_total:
                self.finished[sequence_id] = sequence.token_ids
                self.remove(sequence_id)
        self.check_blocks()
        return step

    def run(self) -> None:
        while self.sequences:
            assert self.step().num_tokens > 0, "somebody waits and nothing is done"

    def slot(self, chunk: Chunk, position: int) -> int:
        size = self.pool.block_size
        return chunk.blocks[position // size] * size + position % size

    def check_step(self, step: Step) -> None:
        assert step.num_tokens <= self.scheduler.max_batch_tokens
        assert step.num_logit_rows <= self.scheduler.max_logit_rows
        assert len(step.chunks) <= self.scheduler.num_running <= self.scheduler.max_running
        ids = [chunk.sequence_id for chunk in step.chunks]
        assert ids == sorted(ids), "oldest first"
        for chunk in step.chunks:
            assert chunk.samples == (chunk.end == self.sequences[chunk.sequence_id].num_total)
            asked = {(chunk.sequence_id, position) for position in range(chunk.logit_start, chunk.end)}
            assert not asked & self.asked_logits, "no logits are computed twice, also after a preemption"
            self.asked_logits |= asked
        self.first_scheduled += [i for i in ids if i not in self.first_scheduled]
        assert self.first_scheduled == sorted(self.first_scheduled), "first come, first served"

    def check_blocks(self) -> None:
        held = Counter(block for sequence in self.sequences.values() for block in sequence.blocks)
        assert all(self.pool.references(block) == held[block] for block in range(self.pool.num_blocks))
        assert self.pool.num_free == self.pool.num_blocks - len(held)
        running = [i for i, sequence in self.sequences.items() if sequence.blocks]
        waiting = [i for i, sequence in self.sequences.items() if not sequence.blocks]
        assert running == self.scheduler.running_ids
        assert max(running, default=-1) < min(waiting, default=self.next_id)


def alone(prompt: list[int], max_new: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(max_new):
        tokens.append(next_token(tokens))
    return tokens


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=24)
ACTIONS = st.one_of(
    st.tuples(
        st.just("add"), PROMPTS, st.integers(1, 8), st.sampled_from(["", "a", "b"]), st.integers(-1, 0)
    ),
    st.tuples(st.just("abort"), st.integers(0, 30)),
    st.tuples(st.just("step"), st.integers(1, 4)),
)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(
    actions=st.lists(ACTIONS, max_size=40),
    num_blocks=st.integers(8, 20),
    tokens=st.integers(1, 12),
    running=st.integers(1, 6),
    rows=st.integers(1, 6),
    caching=st.integers(0, 1),
)
def test_every_request_ends_as_if_alone_and_no_block_is_lost(
    actions: list[tuple[object, ...]], num_blocks: int, tokens: int, running: int, rows: int, caching: int
) -> None:
    world = World(num_blocks, 4, tokens=tokens, running=running, max_logit_rows=rows, caching=caching)
    asked: dict[int, tuple[list[int], int, int]] = {}
    for kind, *arguments in actions:
        match kind, arguments:
            case "add", [list(prompt), int(max_new), str(salt), int(logits_from)]:
                number = world.add(prompt, max_new, salt=salt, logits_from=logits_from)
                asked[number] = prompt, max_new, logits_from
            case "abort", [int(which)] if which in world.sequences:
                world.remove(which)
                del asked[which]
            case "step", [int(times)]:
                for _ in range(times):
                    world.step()
    world.run()
    wanted = {i: alone(prompt, max_new) for i, (prompt, max_new, _) in asked.items()}
    assert wanted.items() <= world.finished.items()
    for i, (prompt, max_new, logits_from) in asked.items():
        first = 0 if logits_from == 0 else len(prompt) - 1
        positions = {position for sequence_id, position in world.asked_logits if sequence_id == i}
        assert positions == set(range(first, len(prompt) + max_new - 1))
    assert world.pool.num_free == num_blocks


def test_a_long_random_life_leaves_the_pool_whole() -> None:
    draw = random.Random(7)
    world = World(12, 4, tokens=9, running=5)
    for _ in range(3000):
        if draw.random() < 0.3:
            world.add([draw.randrange(2) for _ in range(draw.randint(1, 30))], draw.randint(1, 12))
        if world.sequences and draw.random() < 0.1:
            world.remove(draw.choice(list(world.sequences)))
        world.step()
    world.run()
    assert world.pool.num_free == 12
    assert world.scheduler.num_preemptions > 50
    assert world.scheduler.prefix_hit_tokens > 200


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    world = World(8, 4, tokens=8)
    world.add([0] * 19, max_new=1)
    assert [world.step().chunks[0].end for _ in range(3)] == [8, 16, 19]


def test_a_decoding_sequence_goes_on_while_a_newer_prompt_is_read() -> None:
    world = World(16, 4, tokens=8)
    world.add([0], max_new=9)
    world.step()
    world.add([1] * 20, max_new=1)
    assert [len(chunk.token_ids) for chunk in world.step().chunks] == [1, 7]


def test_equal_prompts_in_one_step_share_all_but_the_last_block() -> None:
    world = World(16, 4, tokens=32)
    for _ in range(3):
        world.add([0, 1] * 5, max_new=1)
    assert [(chunk.start, chunk.end) for chunk in world.step().chunks] == [(0, 10), (8, 10), (8, 10)]


def test_the_last_prompt_token_is_computed_even_if_its_block_is_known() -> None:
    world = World()
    world.add([0, 1, 0, 1] * 2, max_new=1)
    world.run()
    world.add([0, 1, 0, 1] * 2, max_new=1)
    assert world.step().chunks[0].start == 4


def test_a_second_turn_reuses_the_blocks_of_the_first_answer() -> None:
    world = World(16, 4, tokens=16)
    first = world.add([0, 1, 0], max_new=6)
    world.run()
    world.add([*world.finished[first], 1, 1], max_new=1)
    assert world.step().chunks[0].start == 8


def test_another_salt_shares_nothing() -> None:
    world = World()
    world.add([0] * 9, max_new=1, salt="a")
    world.run()
    world.add([0] * 9, max_new=1, salt="b")
    assert world.step().chunks[0].start == 0


def test_the_newest_is_preempted_and_keeps_its_tokens() -> None:
    world = World(4, 2, tokens=8, running=2)
    world.add([0, 0, 0], max_new=5)
    world.add([1, 1], max_new=3)
    steps = [world.step() for _ in range(3)]
    assert [step.preempted for step in steps] == [(), (), (1,)]
    kept = list(world.sequences[1].token_ids)
    assert len(kept) > 2
    world.run()
    assert world.finished[1][: len(kept)] == kept


def test_a_prompt_whose_logits_are_wanted_is_computed_whole_within_the_row_budget() -> None:
    world = World(8, 4, tokens=8, max_logit_rows=3)
    world.add([0] * 8, max_new=1)
    world.run()
    world.add([0] * 8, max_new=1, logits_from=0)
    steps = [world.step() for _ in range(3)]
    assert [(step.chunks[0].logit_start, step.chunks[0].end) for step in steps] == [(0, 3), (3, 6), (6, 8)]


def test_a_request_that_could_never_fit_is_refused_with_the_knob() -> None:
    with pytest.raises(RequestError, match="raise --cache-bytes"):
        World(4, 4).add([0] * 10, max_new=7)


def test_removing_what_is_not_there_changes_nothing() -> None:
    world = World()
    assert not world.scheduler.remove(99)
    world.check_blocks()
