"""``moe-experts shard``: a model folder with one file of experts per scenario."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from moe_runtime.errors import ConfigError
from moe_runtime.experts.registry import Registry, scenario_folder
from moe_runtime.experts.shards import write_shards


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Write the model anew as one file for what no scenario may lack, one of experts per scenario, one of "
        "those that several share, and one of the rest. Other engines load the folder, too; ours also "
        "without the files that its scenarios do not need."
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the model folder")
    parser.add_argument(
        "--scenario-dir",
        type=Path,
        metavar="DIR",
        help="its scenarios (default: scenarios in the model folder)",
    )
    parser.add_argument("--scenarios", help="split by these, comma-separated (default: all)")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet"
    )
    parser.add_argument(
        "--allow-uncertified", action="store_true", help="also by scenarios without a valid certificate"
    )


def run(arguments: argparse.Namespace) -> int:
    """0 when the folder is written."""
    folder = scenario_folder(arguments.model, arguments.scenario_dir)
    if folder is None:
        raise ConfigError(f"{arguments.model} has no folder of scenarios; name it with --scenario-dir")
    registry = Registry(folder, arguments.model, allow_uncertified=arguments.allow_uncertified)
    names = arguments.scenarios.split(",") if arguments.scenarios else registry.names()
    shards = write_shards(arguments.model, [registry.open(name.strip()) for name in names], arguments.out)
    if arguments.json:
        print(json.dumps({"shards": [asdict(shard) for shard in shards]}))
    else:
        for shard in shards:
            count = sum(map(len, shard.experts.values()))
            print(f"{shard.file:40} {count:6} experts {shard.num_bytes / 1e6:10.1f} MB")
    return 0
