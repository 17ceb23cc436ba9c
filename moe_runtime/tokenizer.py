"""Tokenizer. (Signatures; body follows.)"""

from collections.abc import Sequence
from pathlib import Path


class Tokenizer:
    @classmethod
    def load(cls, model_dir: Path) -> "Tokenizer":
        """Raises CheckpointError."""
        raise NotImplementedError

    def encode(self, text: str, *, add_special_tokens: bool = False, plain: bool = False) -> list[int]:
        """``plain``: special tokens inside the text are encoded as ordinary text. Raises RequestError on lone surrogates."""
        raise NotImplementedError

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        raise NotImplementedError

    def piece(self, token_id: int) -> tuple[str, bytes]:
        """Text (with replacement characters where half a character) and exact bytes of one token."""
        raise NotImplementedError
