"""What a handler works with: the engine, the model's public face, the limits, the counters. Plain data."""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

from moe_runtime.async_engine import AsyncEngine
from moe_runtime.errors import ContextLengthExceeded, ModelNotFound
from moe_runtime.server.limits import Gate
from moe_runtime.server.metrics import Metrics
from moe_runtime.server.settings import ServerConfig
from moe_runtime.tokenizer import Tokenizer

# Of files larger than twice this (weights) the fingerprint takes the two ends.
DIGEST_BYTES_PER_FILE = 4 << 20
NORMALISING = 4  # a tokenizer may shorten a text before it reads it, by composing letters: at most to a third


@dataclass(frozen=True)
class ModelCard:
    """How the model presents itself. ``fingerprint`` tells folders apart; it proves no integrity."""

    name: str
    created: int
    fingerprint: str

    def as_object(self, max_context: int) -> dict[str, object]:
        """OpenAI's model object, with the context length where vLLM's clients look for it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "moe-runtime",
            "max_model_len": max_context,
        }


@dataclass(frozen=True)
class Service:
    """One per app; holds no state of a single request."""

    engine: AsyncEngine
    model: ModelCard
    config: ServerConfig
    gate: Gate
    metrics: Metrics
    max_prompt_characters: int = sys.maxsize

    def require_room(self, num_characters: int, param: str) -> None:
        """Raises ContextLengthExceeded for a text too long for any tokenizing; to read it would take long."""
        if num_characters > self.max_prompt_characters:
            raise ContextLengthExceeded(
                f"the prompt has {num_characters} characters, more than the context of "
                f"{self.engine.engine.max_context} tokens could ever hold",
                param=param,
            )

    def require_model(self, name: str) -> None:
        """Raises ModelNotFound unless ``name`` is the model served here."""
        if name != self.model.name:
            raise ModelNotFound(
                f"The model '{name[:128]}' does not exist; this server has '{self.model.name}'."
            )


def build_service(engine: AsyncEngine, model_dir: Path, name: str, config: ServerConfig) -> Service:
    """The service of one model folder under one public name."""
    model = describe_model(model_dir, name)
    longest = longest_token(engine.engine.tokenizer)
    return Service(
        engine, model, config, Gate(), Metrics(model.name, engine.stats),
        max_prompt_characters=NORMALISING * longest * engine.engine.max_context,
    )  # fmt: skip


def longest_token(tokenizer: Tokenizer) -> int:
    """Characters of the longest token, as the vocabulary spells it: never fewer than in the text."""
    return max(len(tokenizer.token(token_id) or "") for token_id in range(tokenizer.vocab_size))


def describe_model(model_dir: Path, name: str) -> ModelCard:
    """The card of a model folder, from its files' names and sizes and the two ends of each."""
    digest = hashlib.sha256()
    newest = 0.0
    for path in sorted(path for path in model_dir.iterdir() if path.is_file()):
        size = path.stat().st_size
        newest = max(newest, path.stat().st_mtime)
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(DIGEST_BYTES_PER_FILE))
            if size > DIGEST_BYTES_PER_FILE:  # equal heads do not make equal weights: sample the end as well
                file.seek(-min(size - DIGEST_BYTES_PER_FILE, DIGEST_BYTES_PER_FILE), 2)
                digest.update(file.read(DIGEST_BYTES_PER_FILE))
    return ModelCard(name, int(newest), f"fp_{digest.hexdigest()[:16]}")
