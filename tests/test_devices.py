"""The way by which the engine's tests come to a device (devices.py): shown on the CPU, in the interpreter, on
a GPU where there is one.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import devices
import pytest
import torch
from devices import ComputeDevice
from world import tiny_checkpoint

from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine
from moe_runtime.experts.forward import Runner
from moe_runtime.sampling import SamplingParams

ROOT = Path(__file__).resolve().parent.parent


def test_what_a_test_loads_is_loaded_for_its_device(tmp_path: Path, compute_device: ComputeDevice) -> None:
    config = EngineConfig(num_blocks=8, packed_file=False)
    folder = tiny_checkpoint(tmp_path)
    engine = Engine.load(folder, config)
    [[answer]] = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True, seed=1))
    assert len(answer.token_ids) == 2
    models = [engine.model, Runner.load(folder, config).model]
    expected = ("cuda", "triton") if compute_device.name == "cuda" else ("cpu", "triton")
    for model in models:
        found = (model.device.type, model._kernels.backend)
        assert (
            found == expected
            if compute_device.name != "cpu"
            else found in (("cpu", "cpu"), ("cpu", "reference"))
        )
    named = Engine.load(folder, EngineConfig(num_blocks=8, backend="reference")).model
    assert (named.device.type, named._kernels.backend) == ("cpu", "reference")


def test_every_way_from_a_folder_to_a_model_is_known() -> None:
    users = {
        f"moe_runtime.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}".replace(".moe_runtime", "")
        for folder in ("moe_runtime", "experts", "server")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"^from moe_runtime.engine_load import .*\bload_parts\b", path.read_text(), re.MULTILINE)
    }
    assert users == set(devices.DOORS)


@pytest.mark.parametrize(
    ("name", "given", "moved"),
    [
        ("cpu", {}, ("cpu", "auto")),
        ("cuda", {}, ("cuda", "auto")),
        ("interpreter", {}, ("cpu", "triton")),
        ("cuda", {"backend": "reference"}, ("cpu", "reference")),
        ("cuda", {"device": "auto"}, ("auto", "auto")),
        ("interpreter", {"backend": "cpu"}, ("cpu", "cpu")),
    ],
)
def test_options_that_name_a_device_keep_it(name: str, given: dict[str, Any], moved: tuple[str, str]) -> None:
    config = ComputeDevice(name).moved(EngineConfig(**given))
    assert (config.device, config.backend) == moved


def test_a_device_that_is_not_there_is_a_reason() -> None:
    assert devices.refusal("cpu") == ""
    if not torch.cuda.is_available():
        assert devices.refusal("cuda").startswith("needs a GPU: ")


@pytest.mark.slow
def test_the_interpreter_runs_tests_of_the_engine_and_those_of_the_cpu_alone_say_so() -> None:
    """Real kernels in a real engine, and a fake model's logits. In a process of its own: it comes first."""
    pytest.importorskip("triton", reason="triton is not installed")
    names = "loaded_for or greedy_generation or logprobs_are"
    command = [
        sys.executable, "-m", "pytest", "--device", "interpreter", "-rs", "-k", names,
        "tests/test_engine.py", "tests/test_devices.py",
    ]  # fmt: skip
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "2 passed, 1 skipped" in run.stdout
    assert "on the CPU only: the same sums in the same order" in run.stdout
