"""The engine's options, each stated once: default, limits, help. ``cli.py`` derives the flags from here.

This file knows neither argparse nor torch.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moe_runtime.errors import ConfigError

DEFAULT_CACHE_BYTES = 1 << 30
PARTS: tuple[Literal["experts", "attention", "lm_head"], ...] = ("experts", "attention", "lm_head")
KINDS = ("none", "int8", "int4")
DEVICE_NAME = re.compile("auto|cpu|cuda(:[0-9]{1,3})?")


def option(default: Any, help: str, *, unit: Literal["", "bytes"] = "") -> Any:
    """A dataclass field that is also a command line flag. ``unit="bytes"`` lets users write ``2GiB``."""
    return dataclasses.field(default=default, metadata={"help": help, "unit": unit})


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How much the engine takes on at once. Raises ConfigError naming the flag that is wrong."""

    max_context: int | None = option(
        None, "longest prompt plus answer, in tokens (default: the model's own, as far as the cache holds it)"
    )
    max_batch_tokens: int = option(
        512, "tokens computed per step; longer prompts are taken in chunks of this"
    )
    max_running: int = option(64, "sequences that hold cache blocks at the same time")
    max_queue: int = option(
        512, "sequences accepted beyond --max-running, to wait; more are refused (status 503)"
    )
    block_size: int = option(16, "tokens per cache block, a power of two")
    cache_bytes: int = option(
        DEFAULT_CACHE_BYTES, "memory for keys and values of all sequences, for example 2GiB", unit="bytes"
    )
    num_blocks: int | None = option(None, "number of cache blocks, instead of --cache-bytes")
    kv_dtype: Literal["auto", "bfloat16", "float32", "int8"] = option(
        "auto", "type of cached keys and values (auto: bfloat16 for bfloat16 weights, else float32)"
    )
    prefix_caching: bool = option(True, "reuse the cache blocks of equal prompt beginnings")
    device: str = option(
        "cpu",
        "where to compute: cpu, cuda, cuda:N or auto. cuda is the first NVIDIA or AMD GPU, cuda:N one of "
        "several, counted from 0 as CUDA_VISIBLE_DEVICES shows them, auto takes the first one if there is "
        "one. The kernels for it are compiled and tested without a GPU so far",
    )
    backend: Literal["auto", "cpu", "reference", "triton"] = option(
        "auto", "kernels to compute with; reference is literal torch, slow; triton is what auto is on a GPU"
    )
    device_bytes: int | None = option(
        None,
        "the GPU's memory for experts; what does not fit is computed on the CPU (default: what is free after "
        "the cache and the other weights)",
        unit="bytes",
    )
    require_placement: bool = option(
        False, "refuse to start when experts do not fit the GPU, instead of computing them on the CPU"
    )
    graphs: bool = option(
        True, "on a GPU, capture decode steps at start and replay them; takes some of its memory"
    )
    autotune_dir: Path | None = option(
        None,
        "private folder of tile sizes measured on this GPU; what it lacks for this model is measured at "
        "start, which takes minutes, once. Changes the speed, never an answer",
    )
    threads: int | None = option(None, "threads of the kernels (default: the CPUs this process may use)")
    quantize: str = option(
        "none",
        "weights in integers, made at load: none, int8 or int4, or for single parts, for example "
        "experts=int4,attention=int8,lm_head=int8. Embedding, router and norms keep their precision",
    )
    quantize_group: int = option(128, "weights that share an int4 scale: 32, 64 or 128")
    quantize_zeros: bool = option(False, "int4 with a zero point per group: 0.06 bits more per weight at 128")

    quantize_statistics: Path | None = option(
        None, "file of `python -m moe_runtime.quant.statistics`: int4 rounds for what the layers really read"
    )
    max_quant_kl: float | None = option(
        None,
        "largest mean KL divergence, in nats, of the quantised model from the full one on a short text; more "
        "is refused at start. Measured once, which loads the full model first",
    )
    packed_file: bool = option(True, "keep the packed weights in a file, which the next start maps")
    packed_dir: Path | None = option(
        None, "folder for packed weights (default: .moe_packed in the model folder, if it can be written)"
    )
    packed_verify: bool = option(
        True, "read a packed file whole at start and compare its checksums, else those of its table only"
    )

    def __post_init__(self) -> None:
        check_positive(self, "max_context", "max_batch_tokens", "max_running", "max_queue", "cache_bytes")
        if self.max_quant_kl is not None and not self.max_quant_kl > 0:
            raise ConfigError(f"--max-quant-kl {self.max_quant_kl}: must be above 0")
        check_positive(self, "block_size", "num_blocks", "threads")
        if self.device_bytes is not None and self.device_bytes < 0:
            raise ConfigError(f"--device-bytes {self.device_bytes}: must not be negative")
        if self.block_size & (self.block_size - 1):
            raise ConfigError(f"--block-size {self.block_size}: must be a power of two")
        if self.kv_dtype not in ("auto", "bfloat16", "float32", "int8"):
            raise ConfigError(f"--kv-dtype {self.kv_dtype!r}: must be auto, bfloat16, float32 or int8")
        if self.backend not in ("auto", "cpu", "reference", "triton"):
            raise ConfigError(f"--backend {self.backend!r}: must be auto, cpu, reference or triton")
        check_device(self)
        quantized_parts(self.quantize)
        if self.quantize_group not in (32, 64, 128):
            raise ConfigError(f"--quantize-group {self.quantize_group}: must be 32, 64 or 128")


def check_device(config: EngineConfig) -> None:
    """Refuse what cannot be computed together."""
    check_device_name(config.device)
    if config.device == "cpu" and config.backend != "triton" and config.device_bytes is not None:
        raise ConfigError("--device-bytes with --device cpu: there is no GPU to divide; use --device cuda")
    if config.device == "cpu" and config.autotune_dir is not None:
        raise ConfigError("--autotune-dir with --device cpu: there is no GPU to measure; use --device cuda")
    if config.device.startswith("cuda") and config.backend in ("cpu", "reference"):
        raise ConfigError(
            f"--device {config.device} with --backend {config.backend}, which computes on the CPU: "
            "use --backend auto, or --device cpu"
        )


def check_device_name(name: str) -> None:
    """Raise ConfigError for what is no name of a device, here or on any machine."""
    if DEVICE_NAME.fullmatch(name) is None:
        raise ConfigError(f"--device {name!r}: must be auto, cpu, cuda, or cuda:N with the number of a GPU")


def quantized_parts(text: str) -> Mapping[Literal["experts", "attention", "lm_head"], str]:
    """``int4`` -> all parts int4; ``experts=int4,lm_head=int8`` -> these, the others none. Raises
    ConfigError.
    """
    if text in KINDS:
        return dict.fromkeys(PARTS, text)
    kinds: dict[Literal["experts", "attention", "lm_head"], str] = {}
    for item in text.split(","):
        name, _, kind = item.strip().partition("=")
        part = next((part for part in PARTS if part == name), None)
        if part is None or kind not in KINDS:
            raise ConfigError(
                f"--quantize {text!r}: {item!r} is not one of {', '.join(KINDS)} for all, "
                f"nor part=format with a part of {', '.join(PARTS)}"
            )
        if part in kinds:
            raise ConfigError(f"--quantize {text!r}: {part} is named twice")
        kinds[part] = kind
    return dict.fromkeys(PARTS, "none") | kinds


def check_positive(config: Any, *names: str) -> None:
    """Refuse values below 1 in the named fields; None means "not given" and passes."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be at least 1")
