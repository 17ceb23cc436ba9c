"""The block pool by itself: who may share what, what is evicted first, what cannot be confused."""

import pytest

from moe_runtime.kv_cache import BlockPool


def fill(pool: BlockPool, tokens: list[int], salt: str = "") -> list[int]:
    """Take blocks for ``tokens`` and register the full ones, as a sequence would."""
    blocks = pool.allocate(pool.blocks_for(len(tokens)))
    node: int | str = salt
    for index in range(len(tokens) // pool.block_size):
        content = tokens[index * pool.block_size : (index + 1) * pool.block_size]
        node = pool.register(node, content, blocks[index])
    return blocks


def test_only_full_blocks_match_and_only_up_to_the_limit() -> None:
    pool = BlockPool(8, 2)
    blocks = fill(pool, [1, 2, 3, 4, 5])
    assert pool.match([1, 2, 3, 4, 5, 6], 6, "")[0] == blocks[:2]
    assert pool.match([1, 2, 3, 4], 3, "")[0] == blocks[:1]
    assert pool.match([1, 2, 3, 9], 4, "")[0] == blocks[:1]
    assert pool.match([1, 2], 1, "")[0] == []


def test_the_same_block_after_another_beginning_does_not_match() -> None:
    pool = BlockPool(8, 2)
    fill(pool, [1, 2, 7, 7])
    fill(pool, [3, 4])
    assert len(pool.match([3, 4, 7, 7], 4, "")[0]) == 1


def test_tokens_with_equal_hashes_are_told_apart() -> None:
    assert hash((-1,)) == hash((-2,))  # the classic collision of Python's hash
    pool = BlockPool(8, 1)
    fill(pool, [-1])
    assert pool.match([-2], 1, "")[0] == []


def test_a_reused_parent_block_does_not_revive_its_old_children() -> None:
    pool = BlockPool(2, 2)
    parent, child = fill(pool, [1, 2, 3, 4])
    pool.release([parent, child])
    pool.share([child])  # somebody keeps the child alive while the parent is evicted
    assert fill(pool, [8, 9]) == [parent]
    assert pool.match([8, 9, 3, 4], 4, "")[0] == [parent]
    assert pool.match([1, 2, 3, 4], 4, "")[0] == []


def test_free_blocks_keep_their_content_until_taken_least_recently_freed_first() -> None:
    pool = BlockPool(3, 2)
    old, new = fill(pool, [1, 1]), fill(pool, [2, 2])
    pool.release(old)
    pool.release(new)
    assert pool.num_free == 3
    pool.allocate(2)  # the untouched block, then the one freed first
    assert pool.match([1, 1], 2, "")[0] == []
    assert pool.match([2, 2], 2, "")[0] == new


def test_free_blocks_without_reusable_content_are_taken_first() -> None:
    pool = BlockPool(3, 2)
    kept, partial = fill(pool, [1, 1]), fill(pool, [2])
    pool.release(kept)
    pool.release(partial)
    assert pool.allocate(1) == partial
    assert pool.match([1, 1], 2, "")[0] == kept


def test_the_end_of_a_text_is_evicted_before_its_beginning() -> None:
    pool = BlockPool(2, 2)
    blocks = fill(pool, [1, 2, 3, 4])
    pool.release(blocks)
    assert pool.allocate(1) == [blocks[1]]
    assert pool.match([1, 2, 3, 4], 4, "")[0] == blocks[:1]


def test_shared_blocks_are_free_only_when_the_last_holder_lets_go() -> None:
    pool = BlockPool(4, 2)
    blocks = fill(pool, [1, 2])
    pool.share(blocks)
    pool.release(blocks)
    assert pool.num_free == 3
    pool.release(blocks)
    assert pool.num_free == 4


def test_releasing_twice_is_a_bug_and_says_so() -> None:
    pool = BlockPool(2, 2)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(RuntimeError, match="released twice"):
        pool.release(blocks)


def test_forgotten_content_is_not_matched() -> None:
    pool = BlockPool(2, 2)
    pool.forget(fill(pool, [1, 2]))
    assert pool.match([1, 2], 2, "")[0] == []


def test_without_prefix_caching_nothing_matches() -> None:
    pool = BlockPool(2, 2, prefix_caching=False)
    fill(pool, [1, 2])
    assert pool.match([1, 2], 2, "")[0] == []
