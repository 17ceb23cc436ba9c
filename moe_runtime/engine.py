"""Engine: tokens in, tokens out. (Signatures; body follows.)"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe_runtime.chat import ChatTemplate
from moe_runtime.config import EngineConfig
from moe_runtime.output import Completion, EngineStats, TokenEvent, TokenLogprob, TopLogprob
from moe_runtime.sampling import SamplingParams
from moe_runtime.tokenizer import Tokenizer

__all__ = ["Completion", "Engine", "EngineStats", "TokenEvent", "TokenLogprob", "TopLogprob"]


class Engine:
    model: Any
    config: EngineConfig
    tokenizer: Tokenizer
    chat: ChatTemplate | None
    default_params: (
        SamplingParams  # from generation_config.json; use dataclasses.replace(default_params, **given)
    )
    max_context: int  # tokens of prompt plus answer

    @classmethod
    def load(cls, model_dir: Path, config: EngineConfig) -> "Engine":
        raise NotImplementedError

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> None: ...
    def add(self, request_id: str, prompt_ids: Sequence[int], params: SamplingParams) -> None: ...
    def abort(self, request_id: str) -> list[TokenEvent]:
        raise NotImplementedError

    def step(self) -> list[TokenEvent]:
        raise NotImplementedError

    def has_work(self) -> bool:
        raise NotImplementedError

    def stats(self) -> EngineStats:
        raise NotImplementedError

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[list[Completion]]:
        raise NotImplementedError
