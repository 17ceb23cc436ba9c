"""What a handler works with: the engine, the model's public face, the limits, the counters. Plain data."""

import hashlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from moe_runtime.async_engine import AsyncEngine
from moe_runtime.errors import ConfigError, ContextLengthExceeded
from moe_runtime.experts.registry import Scenario
from moe_runtime.server.drift_log import DriftLog
from moe_runtime.server.limits import Gate
from moe_runtime.server.metrics import Metrics
from moe_runtime.server.scenarios import Scenarios
from moe_runtime.server.settings import ServerConfig
from moe_runtime.tokenizer import Tokenizer

# Of files larger than twice this (weights) the fingerprint takes the two ends.
DIGEST_BYTES_PER_FILE = 4 << 20
MIN_TOKEN_BYTES, MAX_TOKEN_BYTES = 16, 4096
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
    scenarios: Scenarios = field(default_factory=Scenarios)
    drift_log: DriftLog | None = None
    admin_token: bytes = b""  # empty: nobody may administrate

    def require_room(self, num_characters: int, param: str) -> None:
        """Raises ContextLengthExceeded for a text too long for any tokenizing; to read it would take long."""
        if num_characters > self.max_prompt_characters:
            raise ContextLengthExceeded(
                f"the prompt has {num_characters} characters, more than the context of "
                f"{self.engine.engine.max_context} tokens could ever hold",
                param=param,
            )

    def require_model(self, name: str) -> Scenario | None:
        """The scenario that ``name`` asks for, None for the model with all its experts. Raises ModelNotFound
        for what is not served here, ScenarioUnavailable for what is leaving.
        """
        return self.scenarios.resolve(self.model.name, name)

    def prompt_read(self, scenario: str, num_tokens: int, lost_mass: float | None, drift: str | None) -> None:
        """Account for a prompt of a scenario, once."""
        self.metrics.scenarios.prompt_read(scenario, num_tokens, lost_mass, drift)
        if self.drift_log is not None and lost_mass is not None:
            self.drift_log.write(scenario, num_tokens, lost_mass, drift)

    def close(self) -> None:
        """Nothing more is accounted for."""
        if self.drift_log is not None:
            self.drift_log.close()

    def show_holdings(self) -> None:
        """Tell the metrics what is served and in memory from now on."""
        held = self.engine.engine.masks.absent.held()
        self.metrics.scenarios.holds(len(self.scenarios), held.num_experts, held.total, held.num_bytes)


def build_service(
    engine: AsyncEngine,
    model_dir: Path,
    name: str,
    config: ServerConfig,
    scenarios: Scenarios | None = None,
) -> Service:
    """The service of one model folder under one public name; the engine knows the ``scenarios`` already.
    Raises ConfigError.
    """
    model = describe_model(model_dir, name)
    longest = longest_token(engine.engine.tokenizer)
    metrics = Metrics(model.name, engine.stats)
    service = Service(
        engine,
        model,
        config,
        Gate(),
        metrics,
        max_prompt_characters=NORMALISING * longest * engine.engine.max_context,
        scenarios=Scenarios() if scenarios is None else scenarios,
        drift_log=DriftLog(config.drift_log, metrics.scenarios),
        admin_token=read_admin_token(config.admin_token_file),
    )
    service.show_holdings()
    return service


def read_admin_token(path: Path | None) -> bytes:
    """What opens the administration; empty without a file. Raises ConfigError for one that others can read or
    that is easily guessed.
    """
    if path is None:
        return b""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            token = file.read(MAX_TOKEN_BYTES).strip()
    except OSError as error:
        raise ConfigError(f"--admin-token-file {path}: {error.strerror}") from None
    if mode & 0o077:
        raise ConfigError(f"--admin-token-file {path}: others may read it (mode {mode & 0o777:o}); chmod 600")
    if len(token) < MIN_TOKEN_BYTES:
        raise ConfigError(
            f"--admin-token-file {path}: {len(token)} characters, at least {MIN_TOKEN_BYTES} are needed"
        )
    return token


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
