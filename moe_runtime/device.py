"""Where a model computes: --device becomes a torch.device, or a sentence that says why it cannot.

Nothing here runs a kernel. What the driver refuses at start is told as a ConfigError, and what it refuses for
ever after as DeviceLost.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moe_runtime.config import check_device_name
from moe_runtime.errors import ConfigError, DeviceLost
from moe_runtime.kernels import triton_is_interpreted

CPU = torch.device("cpu")
# Of NVIDIA GPUs: what the kernels are compiled for begins with sm_80, the first with bfloat16 products.
LEAST_CAPABILITY = (8, 0)
CPU_BACKENDS = ("cpu", "reference")


@dataclass(frozen=True)
class DeviceChoice:
    """``reason``: one sentence for the log, what was chosen and why."""

    device: torch.device
    reason: str


class _Unusable(Exception):
    """Why there is no GPU to use; the sentence goes on with what to do instead."""


def choose_device(name: str, backend: str = "auto") -> DeviceChoice:
    """The device for ``--device name`` and ``--backend backend``.

    "auto" takes the first GPU if the kernels run on it, else the CPU; "cuda" (also the name of AMD's GPUs) is
    the first one, "cuda:1" the second. Raises ConfigError where there is none, and for another name.
    """
    check_device_name(name)
    if name == "cpu":
        return DeviceChoice(CPU, "computing on the CPU, as --device cpu says")
    if name == "auto" and backend in CPU_BACKENDS:
        return DeviceChoice(CPU, f"computing on the CPU: --backend {backend} runs nowhere else")
    try:
        device, what = _find_gpu(int(name.partition(":")[2] or 0))
    except _Unusable as reason:
        if backend == "triton" and not triton_is_interpreted():
            raise ConfigError(f"--backend triton: {reason}, or use --backend auto --device cpu") from reason
        if name != "auto":
            raise ConfigError(f"--device {name}: {reason}, or use --device cpu") from reason
        return DeviceChoice(CPU, f"computing on the CPU: {reason} to use a GPU")
    return DeviceChoice(device, f"computing on {device}, {what}")


def use(device: torch.device) -> None:
    """From now on this thread computes on ``device``: kernels are launched, memory is pinned and graphs are
    captured for the thread's current GPU, wherever their tensors are.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


@contextlib.contextmanager
def told_as_config_errors(device: torch.device) -> Iterator[None]:
    """Around the loading of a model: what a GPU's driver refuses is a ConfigError that names the knobs."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"--device {device.type}: {device} has too little memory for the model and its cache "
            f"({_first_line(error)}); lower --cache-bytes, use --quantize int8 or int4, or --device cpu"
        ) from error
    except RuntimeError as error:
        if not _is_drivers(error):
            raise
        raise ConfigError(
            f"--device {device.type}: {device} failed while the model was loaded ({_first_line(error)}); "
            "look at nvidia-smi or rocm-smi, or use --device cpu"
        ) from error


def free_bytes(device: torch.device) -> int:
    """Of a GPU's memory, what the driver would give this process now."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


@contextlib.contextmanager
def told_when_lost(device: torch.device) -> Iterator[None]:
    """Around a step: this thread, which need not be the one that loaded the model, computes on ``device``;
    DeviceLost instead of an error after which that computes nothing more.

    Most errors of a driver are of that kind: they belong to the process, and every later call repeats them.
    Any other error passes, so that it fails its batch alone. Nothing that was computed before is wrong: no
    token is read without waiting for the device, which raises.
    """
    try:
        use(device)
        yield
    except RuntimeError as error:
        if device.type == "cpu" or isinstance(error, torch.OutOfMemoryError):
            raise
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as repeated:
            raise DeviceLost(
                f"{device} has failed ({_first_line(error)}) and computes no more in this process "
                f"({_first_line(repeated)}); look at nvidia-smi or rocm-smi if it happens again"
            ) from error
        raise


def _is_drivers(error: RuntimeError) -> bool:
    """Whether the GPU's driver says so, through torch or through triton."""
    told = ("CUDA error", "CUDA driver error", "HIP error", "Triton Error")
    return isinstance(error, torch.AcceleratorError) or str(error).startswith(told)


def _find_gpu(index: int) -> tuple[torch.device, str]:
    """A GPU and what it is. Raises _Unusable."""
    if triton_is_interpreted():
        raise _Unusable("TRITON_INTERPRET=1 is set, with which kernels run on the CPU; unset it")
    try:
        with warnings.catch_warnings(record=True) as said:  # an old driver is a warning and no GPU
            warnings.simplefilter("always")
            found = torch.cuda.is_available()
        if not found:
            raise _Unusable(_why_none([str(warning.message) for warning in said]))
        if index >= (count := torch.cuda.device_count()):
            there = "is 1 GPU, cuda:0" if count == 1 else f"are {count} GPUs, cuda:0 to cuda:{count - 1}"
            raise _Unusable(
                f"there {there} (CUDA_VISIBLE_DEVICES decides which are seen); choose one of them"
            )
        device = torch.device("cuda", index)
        gpu_name = torch.cuda.get_device_name(device)
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and capability < LEAST_CAPABILITY:
            raise _Unusable(
                f"{gpu_name} has compute capability {_dotted(capability)}, the kernels need "
                f"{_dotted(LEAST_CAPABILITY)} or more (NVIDIA A100, RTX 30 and later); take such a GPU"
            )
        torch.zeros(1, device=device)  # a driver that lists a GPU may still not be able to use it
    except (RuntimeError, AssertionError, OSError) as error:
        told = f"the driver refused cuda:{index}: {_first_line(error)}; look at nvidia-smi or rocm-smi"
        raise _Unusable(told) from error
    try:
        importlib.import_module("triton")
    except ImportError as error:
        raise _Unusable(f"triton cannot be imported ({error}); install triton") from error
    kind = "ROCm" if torch.version.hip is not None else f"compute capability {_dotted(capability)}"
    return device, f"{gpu_name} ({kind})"


def _why_none(said: list[str]) -> str:
    built = torch.version.cuda or torch.version.hip
    if built is None:
        return (
            f"no CUDA device was found (torch {torch.__version__} was built without CUDA); "
            "install torch's CUDA or ROCm build"
        )
    told = f": {said[0].splitlines()[0]}" if said else ""
    kind = "CUDA" if torch.version.hip is None else "ROCm"
    return (
        f"no CUDA device was found (torch {torch.__version__}, {kind} {built}{told}); "
        "check the driver and CUDA_VISIBLE_DEVICES"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
