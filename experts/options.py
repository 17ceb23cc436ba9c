"""The engine's flags that the commands of ``moe-experts`` share: how a model is run, not how it is served."""

from __future__ import annotations

import argparse

from moe_runtime import cli
from moe_runtime.config import EngineConfig

ENGINE_FLAGS = frozenset({
    "backend", "block_size", "device", "kv_dtype", "max_batch_tokens", "packed_dir", "packed_file",
    "packed_verify", "quantize", "quantize_group", "quantize_statistics", "quantize_zeros", "threads",
})  # fmt: skip


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    cli.add_arguments(parser, EngineConfig, ENGINE_FLAGS)


def engine_config(arguments: argparse.Namespace) -> EngineConfig:
    """Raises ConfigError for a flag out of range."""
    return cli.from_args(arguments, EngineConfig)
