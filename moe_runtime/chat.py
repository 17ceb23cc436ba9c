"""ChatTemplate. (Signatures; body follows.)"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_runtime.tokenizer import Tokenizer


class ChatTemplate:
    @classmethod
    def load(cls, model_dir: Path, tokenizer: Tokenizer) -> "ChatTemplate | None":
        """None when the folder has no template. Raises CheckpointError when it cannot compile or render."""
        raise NotImplementedError

    def render(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The prompt text. Raises RequestError(param="messages") when the template refuses."""
        raise NotImplementedError

    def encode(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The prompt's token ids; special tokens written inside messages become plain text. Use this one."""
        raise NotImplementedError
