"""What the commands of ``moe-experts`` share: the engine's flags (how a model is run, not how it is served),
and the reading of --model, --plan and --statistics that belong together.
"""

from __future__ import annotations

import argparse

from moe_runtime import cli
from moe_runtime.config import EngineConfig
from moe_runtime.errors import PlanError
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.statistics import Statistics
from moe_runtime.experts.statistics_file import load_statistics

ENGINE_FLAGS = frozenset({
    "backend", "block_size", "device", "kv_dtype", "max_batch_tokens", "packed_dir", "packed_file",
    "packed_verify", "quantize", "quantize_group", "quantize_statistics", "quantize_zeros", "threads",
})  # fmt: skip


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    cli.add_arguments(parser, EngineConfig, ENGINE_FLAGS)


def engine_config(arguments: argparse.Namespace) -> EngineConfig:
    """Raises ConfigError for a flag out of range."""
    return cli.from_args(arguments, EngineConfig)


def read_planned(arguments: argparse.Namespace) -> tuple[PlanFile, Statistics, ModelIdentity]:
    """Of ``arguments.model``, ``plan``, ``statistics``. Raises CheckpointError, and PlanError for a plan or
    statistics of another model, and for statistics that the plan was not made from.
    """
    identity = ModelIdentity.of(arguments.model)
    plan = PlanFile.load(arguments.plan)
    identity.check(plan.model, arguments.plan.name)
    statistics = load_statistics(arguments.statistics, identity)
    if statistics.digest != plan.statistics:
        raise PlanError(f"{arguments.statistics.name}: {arguments.plan.name} was made from other statistics")
    return plan, statistics, identity
