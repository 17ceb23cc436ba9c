"""--expert-statistics: what a profile counted decides which experts stay on a GPU that cannot hold all."""

import logging
from pathlib import Path

from moe_runtime.errors import ConfigError, PlanError
from moe_runtime.experts.file_digests import DigestMemo
from moe_runtime.experts.hotness import expert_counts
from moe_runtime.server.scenarios import Scenarios
from moe_runtime.server.settings import ServerConfig

logger = logging.getLogger("moe_runtime.server")


def read_hotness(
    model_dir: Path, config: ServerConfig, scenarios: Scenarios, memo: DigestMemo | None = None
) -> dict[int, list[int]] | None:
    """What ``Engine.load`` takes: how often each expert was chosen in the texts of the scenarios that the
    server holds experts for, or, if it holds the full model, of all in the file. None without the flag.

    Raises ConfigError for a file that cannot be used, and why: one of an export with its full router never,
    since a profile numbers the experts that it has, and the server those of the model that it was cut from.
    """
    path = config.expert_statistics
    if path is None:
        return None
    if scenarios.exported is not None:
        raise ConfigError(
            f"--expert-statistics {path}: the model is an export with its full router, whose experts are "
            "served under the numbers of the model that it was cut from, not under those of a profile; leave "
            "the flag out"
        )
    wanted = () if scenarios.full else tuple(scenario.name for scenario in scenarios)
    try:
        counts, names = expert_counts(path, model_dir, wanted, memo)
    except PlanError as error:
        raise ConfigError(f"--expert-statistics: {error}") from error
    logger.info(
        "experts are ranked by %s: %d choices in texts of %s",
        path.name, sum(map(sum, counts.values())), ", ".join(names),
    )  # fmt: skip
    return counts
