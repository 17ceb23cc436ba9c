"""Choosing a device on machines that are not here: torch's answers are replaced."""

import asyncio
import dataclasses
import importlib
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_model import FakeModel, byte_tokenizer
from world import tiny_checkpoint

from moe_runtime import engine_load, kernels
from moe_runtime.async_engine import AsyncEngine
from moe_runtime.batch import Batch
from moe_runtime.config import EngineConfig
from moe_runtime.device import DeviceChoice, choose_device, told_as_config_errors, told_when_lost
from moe_runtime.engine import Engine
from moe_runtime.errors import CheckpointError, ConfigError, DeviceLost
from moe_runtime.sampling import SamplingParams

GPU = torch.device("cuda", 0)


class Machine:
    """What torch.cuda says of a machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.capability = (9, 0)
        self.available = True
        self.warning = ""
        self.fault: Exception | None = None
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.version, "hip", None)
        self.num_gpus = 1
        monkeypatch.setattr(torch.cuda, "is_available", self._is_available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: self.num_gpus)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: self.capability)
        monkeypatch.setattr(torch, "zeros", self._zeros)
        monkeypatch.setattr(importlib, "import_module", self._import_module)
        self.has_triton = True

    def _is_available(self) -> bool:
        if self.warning:
            warnings.warn(self.warning, UserWarning, stacklevel=2)
        return self.available

    def _zeros(self, *_: Any, **__: Any) -> None:
        if self.fault is not None:
            raise self.fault

    def _import_module(self, name: str) -> Any:
        if not self.has_triton:
            raise ImportError(f"No module named {name!r}")
        return sys


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_auto_and_cuda_take_the_gpu_and_say_which(machine: Machine) -> None:
    for name in ("auto", "cuda"):
        choice = choose_device(name)
        assert choice.device == GPU
        assert choice.reason == "computing on cuda:0, Some GPU (compute capability 9.0)"
    assert choose_device("cpu").device == torch.device("cpu")


def test_one_of_several_gpus_is_named_by_its_number(machine: Machine) -> None:
    machine.num_gpus = 3
    for number in range(3):
        choice = choose_device(f"cuda:{number}")
        assert choice.device == torch.device("cuda", number)
        assert choice.reason == f"computing on cuda:{number}, Some GPU (compute capability 9.0)"


@pytest.mark.parametrize(
    ("num_gpus", "name", "there"),
    [
        (1, "cuda:1", "there is 1 GPU, cuda:0 "),
        (2, "cuda:2", "there are 2 GPUs, cuda:0 to cuda:1 "),
        (4, "cuda:999", "there are 4 GPUs, cuda:0 to cuda:3 "),
    ],
)
def test_a_gpu_that_is_not_there_is_refused_with_those_that_are(
    machine: Machine, num_gpus: int, name: str, there: str
) -> None:
    machine.num_gpus = num_gpus
    with pytest.raises(ConfigError) as caught:
        choose_device(name)
    assert str(caught.value) == (
        f"--device {name}: {there}(CUDA_VISIBLE_DEVICES decides which are seen); choose one of them, or use "
        "--device cpu"
    )


def test_an_amd_gpu_needs_no_capability(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    machine.capability = (1, 0)
    assert choose_device("auto").reason == "computing on cuda:0, Some GPU (ROCm)"


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_auto_stays_where_the_backend_runs(machine: Machine, backend: str) -> None:
    choice = choose_device("auto", backend)
    assert choice.device.type == "cpu"
    assert choice.reason == f"computing on the CPU: --backend {backend} runs nowhere else"


def refused(message: str) -> None:
    """ "cuda" raises ConfigError, "auto" takes the CPU, both for this reason."""
    with pytest.raises(ConfigError, match=message) as caught:
        choose_device("cuda")
    assert str(caught.value).startswith("--device cuda: ")
    assert str(caught.value).endswith(", or use --device cpu")
    choice = choose_device("auto")
    assert choice.device.type == "cpu"
    assert choice.reason == str(caught.value).replace("--device cuda:", "computing on the CPU:").replace(
        ", or use --device cpu", " to use a GPU"
    )


def test_torch_without_cuda(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.available = False
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    refused(r"no CUDA device was found \(torch 2.13.0\+cpu was built without CUDA\); install torch's CUDA")


def test_no_gpu_or_a_driver_that_torch_does_not_like(machine: Machine) -> None:
    machine.available = False
    refused(r"no CUDA device was found \(torch [^,]+, CUDA 13.0\); check the driver and CUDA_VISIBLE_DEVICES")
    machine.warning = "The NVIDIA driver on your system is too old (found version 11040).\nPlease update"
    refused(r"CUDA 13.0: The NVIDIA driver on your system is too old \(found version 11040\).\); check")


def test_a_gpu_that_is_too_old(machine: Machine) -> None:
    machine.capability = (7, 5)
    refused(r"Some GPU has compute capability 7.5, the kernels need 8.0 or more")


@pytest.mark.parametrize(
    "fault",
    [RuntimeError("CUDA error: out of memory\nCompile with"), AssertionError("CUDA error: x"), OSError()],
)
def test_errors_of_the_driver_are_told_in_one_line(machine: Machine, fault: Exception) -> None:
    machine.fault = fault
    refused(r"the driver refused cuda:0: (CUDA error: (out of memory|x)|OSError); look at nvidia-smi")


def test_triton_that_is_missing(machine: Machine) -> None:
    machine.has_triton = False
    refused(r"triton cannot be imported \(No module named 'triton'\); install triton")


def test_the_interpreter_computes_on_the_cpu(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    refused("TRITON_INTERPRET=1 is set")


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_triton_without_a_gpu_is_refused(machine: Machine, name: str) -> None:
    machine.available = False
    with pytest.raises(ConfigError, match="--backend triton: no CUDA device .* --backend auto --device cpu"):
        choose_device(name, "triton")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried\nmore"),
            r"cuda:0 has too little memory .*\(CUDA out of memory. Tried\); lower --cache-bytes",
        ),
        (torch.AcceleratorError("CUDA error: illegal"), "cuda:0 failed while .* or use --device cpu"),
        (RuntimeError("Triton Error [CUDA]: invalid"), r"cuda:0 failed while .*\(Triton Error \[CUDA\]"),
    ],
)
def test_what_a_gpu_refuses_while_loading_names_the_knobs(fault: Exception, message: str) -> None:
    with pytest.raises(ConfigError, match=message), told_as_config_errors(GPU):
        raise fault


def test_other_errors_while_loading_are_no_news_of_the_device() -> None:
    with pytest.raises(RuntimeError, match="our own"), told_as_config_errors(GPU):
        raise RuntimeError("our own")


STICKY = torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with")


def answering(monkeypatch: pytest.MonkeyPatch, fault: Exception | None) -> None:
    """A device that, asked whether it still lives, says so or fails."""

    def synchronize(device: torch.device) -> None:
        assert device == GPU
        if fault is not None:
            raise fault

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)


@pytest.mark.parametrize("first", [STICKY, RuntimeError("Triton Error [CUDA]: an illegal memory access")])
def test_a_device_that_repeats_its_error_is_lost(monkeypatch: pytest.MonkeyPatch, first: Exception) -> None:
    answering(monkeypatch, STICKY)
    with pytest.raises(DeviceLost) as caught, told_when_lost(GPU):
        raise first
    told = str(caught.value)
    assert told.startswith("cuda:0 has failed (") and "illegal memory access" in told and "\n" not in told
    assert "computes no more in this process" in told and caught.value.__cause__ is first


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("ours"), ValueError("ours too")]
)
def test_an_error_that_passes_is_itself(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    answering(monkeypatch, None)
    for device in (GPU, torch.device("cpu")):
        with pytest.raises(type(error)) as caught, told_when_lost(device):
            raise error
        assert caught.value is error


@pytest.mark.parametrize(
    "name", ["tpu", "cuda:", "cuda:-1", "cuda:1000", "cuda:1 ", "cuda:\u0661", "cpu:0", ""]
)
def test_another_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_device(name)
    assert str(caught.value).startswith(f"--device {name!r}: must be auto, cpu, cuda, or cuda:N")
    with pytest.raises(ConfigError, match="must be auto, cpu, cuda, or cuda:N"):
        EngineConfig(device=name)


# --- which GPU is the current one, on which thread ----------------------------------------------------------

SECOND = torch.device("cuda", 1)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, torch.device]]:
    """Threads and the devices that they have made their current one, in order."""
    told: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: told.append((threading.current_thread().name, device))
    )
    return told


def test_a_model_is_loaded_with_its_gpu_as_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, used: list[tuple[str, torch.device]]
) -> None:
    def load_model(_: Path, chosen: kernels.Kernels, *__: Any) -> None:
        assert chosen.device == SECOND and used == [("MainThread", SECOND)]
        raise CheckpointError("far enough")

    plain = kernels.choose("reference")
    monkeypatch.setattr(engine_load, "choose_device", lambda *_: DeviceChoice(SECOND, "as the test says"))
    monkeypatch.setattr(kernels, "choose", lambda _, *, device: dataclasses.replace(plain, device=device))
    monkeypatch.setattr(engine_load.loader, "load_model", load_model)
    with pytest.raises(CheckpointError, match="far enough"):
        Engine.load(tiny_checkpoint(tmp_path), EngineConfig(device="cuda:1"))
    assert used == [("MainThread", SECOND)]


def test_each_step_makes_the_models_gpu_the_current_one_of_its_thread(
    tmp_path: Path, used: list[tuple[str, torch.device]]
) -> None:
    class Watching(FakeModel):
        def forward(self, *arguments: Any) -> torch.Tensor:
            assert used and used[-1] == (threading.current_thread().name, SECOND)
            return super().forward(*arguments)

    model = Watching()
    engine = Engine(model, byte_tokenizer(tmp_path), EngineConfig(num_blocks=8))
    assert used == [], "nothing is launched for a model on the CPU"
    model.device = SECOND
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    engine.generate([[1, 2, 3]], params)

    async def ask() -> list[str | None]:
        served = AsyncEngine(engine)
        served.start()
        try:
            return [event.finish_reason async for event in served.submit("r", [1, 2, 3], params)]
        finally:
            served.stop()

    assert asyncio.run(ask()) == [None, "length"]
    assert used == [("MainThread", SECOND)] * 2 + [("engine", SECOND)] * 2


def test_backends_that_compute_elsewhere_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="backend = 'cpu' computes on the CPU, not on cuda"):
        kernels.choose("cpu", device=torch.device("cuda"))
    with pytest.raises(ConfigError, match="backend = 'reference' computes on the CPU"):
        kernels.choose("auto", {"attention": "reference"}, device=torch.device("cuda"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="TRITON_INTERPRET=1 .* use --device cuda, or --backend auto"):
        kernels.choose("triton")


def test_a_batch_travels_as_one_run_of_aligned_bytes() -> None:
    batch = Batch(
        token_ids=torch.tensor([5, 1 << 40, 7]),
        positions=torch.tensor([0, 1, 2], dtype=torch.int32),
        slots=torch.tensor([16, 17, -1]),
        sequence_rows=torch.tensor([0, 0, 1], dtype=torch.int32),
        block_tables=torch.tensor([[1, 0], [3, 4]], dtype=torch.int32),
        logit_rows=torch.empty(0, dtype=torch.int64),
        mask_rows=torch.tensor([-1, 0, 63], dtype=torch.int32),
    )
    run = batch.staged(pinned=False)
    there = batch.on(run)
    for field in dataclasses.fields(Batch):
        expected, got = getattr(batch, field.name), getattr(there, field.name)
        assert got.dtype is expected.dtype and torch.equal(got, expected)
        assert (got.data_ptr() - run.data_ptr()) % 16 == 0 or not got.numel()
        assert got.is_contiguous() and getattr(batch.to(torch.device("meta")), field.name).is_meta
    assert batch.to(torch.device("cpu")) is batch
