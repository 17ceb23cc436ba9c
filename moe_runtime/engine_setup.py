"""What the engine decides once, before the first request: cache size, end tokens, sampling defaults."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_runtime.config import EngineConfig
from moe_runtime.errors import CheckpointError, ConfigError, RequestError
from moe_runtime.hf_config import read_json
from moe_runtime.sampling import SamplingParams
from moe_runtime.tokenizer import Tokenizer

GENERATION_FILE = "generation_config.json"
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class CacheSize:
    """``num_blocks`` blocks of ``block_bytes`` each; one sequence of ``max_context`` tokens fits at least."""

    num_blocks: int
    block_bytes: int
    max_context: int


def plan_cache(model: Any, config: EngineConfig) -> CacheSize:
    """As many blocks as the limits allow and all running sequences at full length could use.

    Without --max-context the context is the model's own, or what the cache holds if that is less. Raises
    ConfigError, naming the knobs, when not even one sequence of --max-context fits.
    """
    own = model.config.max_position_embeddings
    if config.max_context is not None and config.max_context > own:
        raise ConfigError(f"--max-context {config.max_context}: the model was made for at most {own} tokens")
    block_bytes = model.cache_bytes_per_block(config.block_size, config.kv_dtype)
    wanted = config.max_context or own
    most = -(-wanted // config.block_size) * config.max_running
    num_blocks = config.num_blocks or min(config.cache_bytes // block_bytes, most)
    holds = num_blocks * config.block_size
    if holds < (config.max_context or 2):
        needed = -(-wanted // config.block_size) * block_bytes if config.max_context else block_bytes
        raise ConfigError(
            f"the cache holds {holds} tokens, not even one sequence of {config.max_context or 'any'} tokens; "
            f"that needs --cache-bytes {-(-needed // MIB)}MiB or more (or a higher --num-blocks), "
            "or a lower --max-context"
        )
    return CacheSize(num_blocks, block_bytes, min(wanted, holds))


def end_ids(model_config: Any, tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end an answer: the model's and the tokenizer's, as published models have either."""
    ids = set(model_config.eos_token_ids)
    if tokenizer.eos_id is not None:
        ids.add(tokenizer.eos_id)
    return frozenset(token_id for token_id in ids if 0 <= token_id < model_config.vocab_size)


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise CheckpointError when the tokenizer knows tokens that the model has no row for.

    The other way round is normal: published models pad their vocabulary.
    """
    if tokenizer.max_id >= vocab_size:
        raise CheckpointError(
            f"token {tokenizer.token(tokenizer.max_id)!r} has id {tokenizer.max_id}, but config.json gives "
            f"the model a vocab_size of {vocab_size}",
            file="tokenizer.json",
        )


def default_params(model_dir: Path) -> SamplingParams:
    """The sampling that generation_config.json recommends. Raises CheckpointError when it is out of range.

    ``do_sample: false`` means temperature 0; left out, the other values hold as they are.
    """
    path = model_dir / GENERATION_FILE
    values = read_json(path) if path.exists() else {}
    given: dict[str, Any] = {}
    for name, kind in (
        ("temperature", float),
        ("top_p", float),
        ("top_k", int),
        ("min_p", float),
        ("repetition_penalty", float),
    ):
        value = values.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | kind):
            raise CheckpointError(f"{name} must be a number, got {value!r}", file=GENERATION_FILE)
        given[name] = kind(value)
    if values.get("do_sample") is False:
        given["temperature"] = 0.0
    try:
        return SamplingParams(**given)
    except RequestError as error:
        raise CheckpointError(str(error), file=GENERATION_FILE) from error
