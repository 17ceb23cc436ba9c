"""BlockPool: which cache blocks are free, shared, or still hold a reusable prefix. Numbers only, no tensors.

A full block is known by its *content*: the node of the block before it and the exact token ids in it. Nodes
are numbers that are never used twice, so a block that was evicted and filled anew cannot be taken for its
old content, and because token ids are compared, not hashes, two texts can never be mixed up.

    salt "" --(t0..t15)--> node 7, block 3 --(t16..t31)--> node 9, block 0
                                          \\-(t16'..t31')-> node 12, block 5

Free blocks stay in the index until they are taken for something else, least recently freed first.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import count

Node = int | str  # a salt is the root node of its own tree
Key = tuple[Node, tuple[int, ...]]


class BlockPool:
    """Reference counts over ``num_blocks`` blocks of ``block_size`` tokens."""

    def __init__(self, num_blocks: int, block_size: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # next to take is first
        self._index: dict[Key, tuple[int, int]] = {}  # content -> (node, block)
        self._content: list[Key | None] = [None] * num_blocks  # the inverse, for eviction
        self._next_node = count(1)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that ``num_tokens`` tokens fill, the last one maybe partly."""
        return -(-num_tokens // self.block_size)

    def references(self, block: int) -> int:
        return self._references[block]

    def match(self, token_ids: Sequence[int], limit: int, salt: str) -> tuple[list[int], Node]:
        """Blocks that already hold the beginning of ``token_ids``, at most ``limit`` tokens of it.

        Returns the blocks in order and the node of the last. Takes no reference: call ``share`` at once.
        """
        blocks: list[int] = []
        node: Node = salt
        for start in range(0, limit - self.block_size + 1, self.block_size):
            found = self._index.get((node, tuple(token_ids[start : start + self.block_size])))
            if found is None:
                break
            node, block = found
            blocks.append(block)
        return blocks, node

    def num_free_without(self, blocks: Iterable[int]) -> int:
        """Free blocks left once the matched ``blocks`` are shared."""
        return len(self._free) - sum(1 for block in blocks if self._references[block] == 0)

    def share(self, blocks: Iterable[int]) -> None:
        """Add one reference to each matched block."""
        for block in blocks:
            if self._references[block] == 0:
                del self._free[block]
            self._references[block] += 1

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks for new content. The caller has checked ``num_free``."""
        blocks = [self._free.popitem(last=False)[0] for _ in range(num_blocks)]
        for block in blocks:
            self.forget((block,))
            self._references[block] = 1
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference to each block of a sequence, given in order.

        The last blocks of a text are freed first, so that its beginning, likelier to be asked for again,
        is evicted last. Blocks without reusable content are taken before any that have some.
        """
        for block in reversed(blocks):
            if self._references[block] < 1:
                raise RuntimeError(f"block {block} is released twice")
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free[block] = None
                self._free.move_to_end(block, last=self._content[block] is not None)

    def register(self, parent: Node, token_ids: Sequence[int], block: int) -> Node:
        """Say that ``block`` holds ``token_ids`` (one full block) after ``parent``. Returns its node.

        When another block is known for this content, that one stays the one to reuse.
        """
        if not self.prefix_caching:
            return parent
        key = (parent, tuple(token_ids))
        if key not in self._index:
            self._index[key] = (next(self._next_node), block)
            self._content[block] = key
        return self._index[key][0]

    def forget(self, blocks: Iterable[int]) -> None:
        """Make the content of ``blocks`` unknown, so that nobody new can match it."""
        for block in blocks:
            key = self._content[block]
            if key is not None:
                del self._index[key]
                self._content[block] = None

    def forget_all(self) -> None:
        """Empty the index, for when the cache's memory can no longer be trusted."""
        self.forget(range(self.num_blocks))
