"""Where the engine's tests compute: on the CPU, and again, unchanged, on this machine's GPU if it has one.

A test file takes part by ``pytestmark = pytest.mark.usefixtures("compute_device")``, or by asking for the
fixture (conftest.py). What its tests load with default options is then loaded for that device: the device
enters at ``load_parts``, through which every model folder becomes an engine, and nowhere else. Options that
name a device or a backend keep it.

    pytest --device cuda tests         the GPU's part alone
    pytest --device interpreter tests  the same code without a GPU, Triton's kernels on the CPU: very slow
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import moe_runtime._C as _C
from moe_runtime import engine_load, kernels
from moe_runtime.config import EngineConfig
from moe_runtime.device import choose_device
from moe_runtime.engine import Engine
from moe_runtime.errors import ConfigError
from moe_runtime.tokenizer import Tokenizer

NAMES = ("cpu", "cuda", "interpreter")
DOORS = ("moe_runtime.engine", "moe_runtime.experts.forward", "moe_runtime.experts.profile")
# Tests of kernels set it where there is no GPU, when they are collected; the caller's word comes first.
GIVEN = os.environ.get("TRITON_INTERPRET")


@dataclasses.dataclass(frozen=True)
class ComputeDevice:
    """``name``: one of NAMES. ``isa``: the CPU's instruction set, where a test asks for each."""

    name: str
    isa: str = ""

    def __str__(self) -> str:
        return f"{self.name}-{self.isa}" if self.isa else self.name

    def moved(self, config: EngineConfig) -> EngineConfig:
        """``config`` for this device, unless it names one."""
        if self.name == "cpu" or config.device != "cpu" or config.backend != "auto":
            return config
        if self.name == "cuda":
            return dataclasses.replace(config, device="cuda")
        return dataclasses.replace(config, backend="triton")

    def kernels(self) -> kernels.Kernels:
        """What a model for this device is loaded with."""
        moved = self.moved(EngineConfig())
        return kernels.choose(moved.backend, device=choose_device(moved.device, moved.backend).device)

    def engine(self, model: Any, tokenizer: Tokenizer, config: EngineConfig) -> Engine:
        """Over a model that is there already. Its tokens are chosen where its logits are: on this device, to
        which a FakeModel sends them.
        """
        if self.name == "cpu":
            return Engine(model, tokenizer, config)
        chosen = self.kernels()
        if hasattr(model, "logits_device"):
            model.logits_device = chosen.device
        return Engine(model, tokenizer, config, sampler=chosen.sample_rows)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Within, engines are loaded for this device."""
        plain = engine_load.load_parts

        def load_parts(model_dir: Path, config: EngineConfig, *places: Any, **options: Any) -> Any:
            return plain(model_dir, self.moved(config), *places, **options)

        with pytest.MonkeyPatch.context() as patch:
            for door in DOORS:
                patch.setattr(f"{door}.load_parts", load_parts)
            yield


@functools.cache
def refusal(name: str) -> str:
    """Why tests cannot run on this device; empty when they can."""
    if name == "interpreter" and importlib.util.find_spec("triton") is None:
        return "needs Triton's interpreter: triton is not installed"
    if name != "cuda":
        return ""
    with pytest.MonkeyPatch.context() as patch:
        if GIVEN is None:
            patch.delenv("TRITON_INTERPRET", raising=False)
        try:
            choose_device("cuda")
        except ConfigError as error:
            return f"needs a GPU: {str(error).removeprefix('--device cuda: ')}"
    return ""


def interpret() -> None:
    """Triton's kernels run on the CPU from now on; before anything imports triton."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.language.standard import cdiv
    from triton.runtime import JITFunction

    if isinstance(cdiv, JITFunction):
        raise pytest.UsageError("--device interpreter: something imported triton before; start with it alone")
    from kernels.triton.interpreter import forget_order, repair

    repair()
    forget_order()


def of(config: pytest.Config) -> tuple[str, ...]:
    """The devices that this run is for."""
    chosen: list[str] | None = config.getoption("--device")
    return ("cpu", "cuda") if chosen is None else tuple(dict.fromkeys(chosen))


def parameters(metafunc: pytest.Metafunc) -> list[Any]:
    """A test's devices, marked as skipped where it cannot run or, being ``cpu_only``, has nothing to say. One
    of ``every_isa`` runs on the CPU under each of its instruction sets.
    """
    mark = metafunc.definition.get_closest_marker("cpu_only")
    every_isa = metafunc.definition.get_closest_marker("every_isa") is not None
    made = []
    for name in of(metafunc.config):
        alone = f"on the CPU only: {mark.args[0]}" if mark is not None and name != "cpu" else ""
        reason = refusal(name) or alone
        for isa in _C.supported_isas() if every_isa and name == "cpu" else [""]:
            marks = [pytest.mark.skip(reason=reason)] if reason else []
            made.append(pytest.param(ComputeDevice(name, isa), marks=marks))
    return made
