"""Documents side by side in batches: each from its own beginning, long ones over several batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moe_runtime.scheduler import Chunk, Step

MAX_DOCUMENTS = 64  # of a batch: each one takes a last block of the cache that it does not fill


def cache_blocks(lengths: Sequence[int], batch_tokens: int, block_size: int) -> int:
    """Blocks of the cache that ``pack`` needs for documents of these lengths."""
    longest = -(-max(lengths) // block_size)
    return longest + min(len(lengths), MAX_DOCUMENTS) + -(-batch_tokens // block_size)


def pack(documents: Sequence[Sequence[int]], batch_tokens: int, block_size: int) -> Iterator[Step]:
    """Steps of up to ``batch_tokens`` tokens that read all documents, in order; a chunk's ``sequence_id`` is
    its document's number, and no logits are asked for. A document is done before the one after the next
    begins, and its blocks are free when its last chunk has been computed.
    """
    num_blocks = cache_blocks([len(ids) for ids in documents], batch_tokens, block_size)
    free = list(range(num_blocks))
    chunks: list[Chunk] = []
    room = batch_tokens
    for number, ids in enumerate(documents):
        blocks: list[int] = []
        start = 0
        while start < len(ids):
            if not room or len(chunks) == MAX_DOCUMENTS:
                yield Step(tuple(chunks))
                for chunk in chunks:  # of a document that goes on the blocks are its own
                    if chunk.sequence_id != number:
                        free.extend(chunk.blocks)
                chunks, room = [], batch_tokens
            end = min(len(ids), start + room)
            while len(blocks) * block_size < end:
                blocks.append(free.pop())
            chunks.append(Chunk(number, start, tuple(ids[start:end]), tuple(blocks), end, samples=False))
            room -= end - start
            start = end
    if chunks:
        yield Step(tuple(chunks))
