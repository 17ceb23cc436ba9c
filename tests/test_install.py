"""The package installs as one distribution: engine, experts, server, extension."""

import importlib


def test_the_three_packages_and_the_extension_import_under_one_name() -> None:
    for name in ("moe_runtime", "moe_runtime.experts", "moe_runtime.server", "moe_runtime._C"):
        assert importlib.import_module(name).__name__ == name
