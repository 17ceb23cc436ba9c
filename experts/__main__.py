"""``moe-experts``: which experts a scenario needs, one step at a time.

Each step reads and writes hashed files and can be run again alone.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from moe_runtime.errors import MoeRuntimeError

# name -> the file that has its ``add_arguments`` and ``run``, imported when it is called; what it does
COMMANDS: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "profile": ("commands_profile", "scenario texts -> what every expert did with them"),
        "plan": ("commands_plan", "statistics and a budget -> the experts that a scenario keeps"),
        "recover": ("commands_recover", "small tensors that make up for a plan's missing experts"),
        "diff": ("commands_diff", "what two plans keep, each and in common"),
        "simulate": ("commands_simulate", "what plans change in every next-token distribution"),
        "evaluate": ("commands_evaluate", "full against masked on held-out texts -> a certificate"),
        "export": ("commands_export", "a plan -> a smaller checkpoint"),
        "verify": ("commands_verify", "is an exported checkpoint the masked model?"),
        "report": ("commands_report", "plans and what they cost, as a page to look at"),
        "policy": ("commands_policy", "a scenario's own prompts -> the threshold of its policy.json"),
        "drift": ("commands_drift", "has the traffic of a scenario left it?"),
        "shard": ("commands_shard", "a model folder with one file of experts per scenario"),
        "scenarios": ("commands_scenarios", "list, add and drop scenarios of a running server"),
    }
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command's exit status; 1 for anything that could not be done, with one line that says why."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="moe-experts", description="Cut, certify and export experts by scenario."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = None
    for name, (file, what) in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        if words[:1] == [name]:
            module = importlib.import_module(f"moe_runtime.experts.{file}")
            module.add_arguments(command)
            command.add_argument("--json", action="store_true", help="print the result as JSON on stdout")
            run = module.run
    arguments = parser.parse_args(words)
    assert run is not None, "argparse ends without a known command"
    try:
        status: int = run(arguments)
    except MoeRuntimeError as error:
        print(f"moe-experts {arguments.command}: {error}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
