"""A model without weights, for tests of everything above the model.

``FakeModel`` keeps token ids where a model keeps keys and values: it writes each token to its slot, and for
each logit row reads the whole history back through the block table. So a block that was leaked, shared
wrongly or freed too early shows as a wrong history. What it answers is a function of that history alone.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from world import MESSAGE_END, VOCAB_SIZE, write_tokenizer

from moe_runtime.batch import Batch
from moe_runtime.kernels import RouteMeter
from moe_runtime.tokenizer import Tokenizer

POISON = -1


@dataclass(frozen=True)
class FakeConfig:
    vocab_size: int = VOCAB_SIZE
    max_position_embeddings: int = 512
    eos_token_ids: tuple[int, ...] = (MESSAGE_END,)
    num_layers: int = 1


Answer = Callable[[list[int]], torch.Tensor]  # history -> logits (V,)


def random_answer(history: Sequence[int], vocab_size: int = VOCAB_SIZE) -> torch.Tensor:
    """Logits drawn from a generator seeded by the history: equal for equal text, unlike for any other."""
    generator = torch.Generator().manual_seed(hash(tuple(history)) & 0x7FFFFFFFFFFFFFFF)
    return torch.randn(vocab_size, generator=generator)


def echo_answer(history: Sequence[int]) -> torch.Tensor:
    """Repeat the prompt's last line for ever: the token that followed the last newline, and so on."""
    newline = history.index(10)  # the prompt is "canary\\n"
    period = newline + 1
    logits = torch.zeros(VOCAB_SIZE)
    logits[history[len(history) % period]] = 9.0
    return logits


class FakeModel:
    """Implements what the engine asks of a model."""

    def __init__(self, answer: Answer = random_answer, config: FakeConfig | None = None) -> None:
        self.config = config or FakeConfig()
        self.answer = answer
        self.batches: list[Batch] = []
        self.fail_next: Exception | None = None
        self.logits_device = torch.device("cpu")  # tokens may be chosen elsewhere (devices.py)

    def cache_bytes_per_block(self, block_size: int, kv_dtype: str = "auto") -> int:
        return block_size * 8

    def new_cache(self, num_blocks: int, block_size: int, kv_dtype: str = "auto") -> torch.Tensor:
        return torch.full((num_blocks, block_size), POISON, dtype=torch.int64)

    device = torch.device("cpu")

    def mixtures(self) -> Iterator[tuple[int, Any]]:
        """No layer has experts."""
        return iter(())

    def forward(self, batch: Batch, cache: torch.Tensor, meter: RouteMeter | None = None) -> torch.Tensor:
        self.batches.append(batch)
        if self.fail_next is not None:
            failure, self.fail_next = self.fail_next, None
            raise failure
        cache.view(-1)[batch.slots] = batch.token_ids
        rows = [self.answer(self.history(batch, cache, row)) for row in batch.logit_rows.tolist()]
        logits = torch.stack(rows) if rows else torch.empty(0, self.config.vocab_size)
        return logits.to(self.logits_device)

    def history(self, batch: Batch, cache: torch.Tensor, row: int) -> list[int]:
        table = batch.block_tables[batch.sequence_rows[row]].long()
        history: list[int] = cache[table].flatten()[: int(batch.positions[row]) + 1].tolist()
        assert POISON not in history
        return history


def byte_tokenizer(folder: Path) -> Tokenizer:
    """Token id = byte value, then three special tokens, the last of them for ending."""
    write_tokenizer(folder)
    return Tokenizer.load(folder)
