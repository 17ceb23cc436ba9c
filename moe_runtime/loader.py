"""Loads a model folder: config, then every tensor from the mapped file straight into its final home.

All that can be wrong with a checkpoint is found here and raised as CheckpointError, never at the first token.
Peak memory is the weights plus the largest single matrix.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from moe_runtime.checkpoint import DTYPES, Checkpoint, TensorEntry
from moe_runtime.errors import CheckpointError
from moe_runtime.hf_config import Fields, read_json
from moe_runtime.kernels import Kernels
from moe_runtime.layers.decoder import Decoder
from moe_runtime.layers.slots import Slot
from moe_runtime.model_config import Fp8Config, ModelConfig
from moe_runtime.models import Architecture, find_architecture

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
CHECK_ELEMENTS = 1 << 22  # elements looked at together when searching for NaN
FP8_ROWS_PER_STEP = 8  # block rows widened together


def load_model(model_dir: Path, kernels: Kernels) -> Decoder:
    """The model in ``model_dir``, ready for ``forward``. Raises CheckpointError naming file and tensor."""
    require_model_folder(model_dir)
    checkpoint = Checkpoint(model_dir)
    architecture, config = read_model_config(model_dir, checkpoint.common_dtype())
    model = architecture.build(config, kernels)
    weight_bytes = fill(model, checkpoint)
    model.config = replace(config, weight_bytes=weight_bytes)
    return model


def require_model_folder(model_dir: Path) -> None:
    """Raises CheckpointError unless the folder has the files that say what the model and its text are, and
    the text is not another program's business.
    """
    if not model_dir.is_dir():
        raise CheckpointError("not a folder", file=str(model_dir))
    for name in (CONFIG_FILE, TOKENIZER_FILE):
        if not (model_dir / name).is_file():
            raise CheckpointError(f"missing from {model_dir}", file=name)
    path = model_dir / TOKENIZER_CONFIG_FILE
    if path.exists():
        # Where a folder brings a tokenizer of its own, tokenizer.json need not say the same.
        _check_auto_map(read_json(path).get("auto_map"), frozenset(), path.name)


def read_model_config(model_dir: Path, default_dtype: str | None) -> tuple[Architecture, ModelConfig]:
    """The architecture and its checked config; ``default_dtype`` serves configs that do not name one."""
    values = read_json(model_dir / CONFIG_FILE)
    if values.get("dtype") is None and values.get("torch_dtype") is None:
        values["dtype"] = default_dtype
    architecture = find_architecture(values.get("model_type"), values.get("architectures"))
    _check_auto_map(values.pop("auto_map", None), getattr(architecture, "PUBLISHED_CODE", frozenset()))
    config = architecture.read_config(Fields(values))
    if (model_dir / GENERATION_FILE).exists():
        generation = Fields(read_json(model_dir / GENERATION_FILE), GENERATION_FILE)
        stops = generation.integers("eos_token_id", 0, config.vocab_size - 1)
        config = replace(config, eos_token_ids=stops or config.eos_token_ids)
    return architecture, config


def _check_auto_map(auto_map: object, published: frozenset[str], file: str = CONFIG_FILE) -> None:
    """Code that comes with a checkpoint is never run; a map to code we implement ourselves is harmless."""
    if auto_map is None:
        return
    classes = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    for name in classes:
        if not isinstance(name, str) or name not in published:
            raise CheckpointError(
                f"auto_map asks for custom code ({str(name)[:80]}), which is never run", file=file
            )


def fill(model: Decoder, checkpoint: Checkpoint) -> int:
    """Write every tensor of the checkpoint into the slot that wants it; the weights' size in bytes.

    All names, shapes and dtypes are compared before the first byte of weights is read.
    """
    slots = {slot.name: slot for slot in _matched(model, checkpoint)}
    scales = {entry.name for entry in checkpoint.entries.values() if _scale_of(entry.name) in slots}
    for name, entry in checkpoint.entries.items():
        if name in slots:
            _check_entry(slots[name], entry, checkpoint, model.config)
        elif name in scales:
            _check_scale(entry, checkpoint.entries[_scale_of(name)], model.config.fp8)
        elif not model.ignores(name):
            hint = _expert_hint(name, model.config)
            raise CheckpointError(
                f"no part of a {model.config.model_type} model{hint}", file=entry.path.name, tensor=name
            )
    weight_bytes = 0
    # In the model's order, so that tensors stacked into one matrix come together, whatever file they are in.
    for slot in slots.values():
        entry = checkpoint.entries[slot.name]
        weight = _read(entry, checkpoint, model.config)
        slot.write(weight)
        weight_bytes += weight.numel() * weight.element_size()
        del weight
        checkpoint.drop(entry)
    return weight_bytes


def _matched(model: Decoder, checkpoint: Checkpoint) -> Iterator[Slot]:
    """The model's slots, as long as the checkpoint has a tensor for each: a config that claims a billion
    layers fails at the first one missing.
    """
    for slot in model.slots():
        if slot.name not in checkpoint.entries:
            hint = _expert_hint(slot.name, model.config)
            raise CheckpointError(f"missing from the checkpoint{hint}", tensor=slot.name)
        yield slot


def _expert_hint(name: str, config: ModelConfig) -> str:
    match = re.search(r"\.experts\.(\d+)\.", name)
    return f" (config.json says {config.moe.num_experts} experts per layer)" if match else ""


def _scale_of(name: str) -> str:
    """The weight whose block scales ``name`` holds, or something that is no tensor's name."""
    return name.removesuffix("_scale_inv") if name.endswith(".weight_scale_inv") else ""


def _check_entry(slot: Slot, entry: TensorEntry, checkpoint: Checkpoint, config: ModelConfig) -> None:
    where = {"file": entry.path.name, "tensor": entry.name}
    if entry.shape != slot.shape:
        raise CheckpointError(f"shape {list(entry.shape)}, config.json makes it {list(slot.shape)}", **where)
    dtype = DTYPES.get(entry.dtype)
    if dtype is torch.float8_e4m3fn and config.fp8 is not None and len(slot.shape) == 2:
        if f"{entry.name}_scale_inv" not in checkpoint.entries:
            raise CheckpointError(f"float8 without its scales {entry.name}_scale_inv", **where)
        return
    if dtype is None or dtype is torch.float8_e4m3fn:
        raise CheckpointError(f"dtype {entry.dtype} is not one this model's config allows here", **where)
    if not slot.any_float and dtype is not getattr(torch, config.dtype):
        raise CheckpointError(f"dtype {entry.dtype}, but config.json says {config.dtype}", **where)


def _check_scale(entry: TensorEntry, weight: TensorEntry, fp8: Fp8Config | None) -> None:
    where = {"file": entry.path.name, "tensor": entry.name}
    if fp8 is None or weight.dtype != "F8_E4M3" or len(weight.shape) != 2:
        raise CheckpointError("scales for a tensor that is not float8", **where)
    rows, columns = weight.shape
    shape = (-(-rows // fp8.block_rows), -(-columns // fp8.block_columns))
    if entry.shape != shape or entry.dtype not in ("F32", "BF16"):
        raise CheckpointError(
            f"{entry.dtype} {list(entry.shape)}, expected F32 or BF16 {list(shape)}", **where
        )


def _read(entry: TensorEntry, checkpoint: Checkpoint, config: ModelConfig) -> torch.Tensor:
    """The tensor, all finite: a view of the file, or the widened copy of a float8 one."""
    tensor = checkpoint.read(entry)
    _check_finite(tensor, entry)
    if config.fp8 is None or tensor.dtype is not torch.float8_e4m3fn:
        return tensor
    scale_entry = checkpoint.entries[f"{entry.name}_scale_inv"]
    scale = checkpoint.read(scale_entry)
    _check_finite(scale, scale_entry)
    wide = widen_fp8(tensor, scale, config.fp8, getattr(torch, config.dtype))
    _check_finite(wide, entry)  # a finite scale may still carry it beyond the wider type
    return wide


def widen_fp8(weight: torch.Tensor, scale: torch.Tensor, fp8: Fp8Config, dtype: torch.dtype) -> torch.Tensor:
    """float8 [N, K] times its block's scale, computed in float32, rounded once to ``dtype``."""
    wide = torch.empty(weight.shape, dtype=dtype)
    columns = scale.float().repeat_interleave(fp8.block_columns, dim=1)[:, : weight.shape[1]]
    step = fp8.block_rows * FP8_ROWS_PER_STEP
    for start in range(0, len(weight), step):
        rows = weight[start : start + step].float()
        blocks = columns[start // fp8.block_rows :].repeat_interleave(fp8.block_rows, dim=0)
        wide[start : start + step] = rows.mul_(blocks[: len(rows)])
    return wide


def _check_finite(tensor: torch.Tensor, entry: TensorEntry) -> None:
    flat = tensor.view(-1)
    for start in range(0, len(flat), CHECK_ELEMENTS):
        part = flat[start : start + CHECK_ELEMENTS]
        if part.dtype is torch.float8_e4m3fn:
            bad = bool((part.view(torch.uint8) & 0x7F == 0x7F).any())  # e4m3fn has NaN but no infinity
        else:
            # The extremes of a part with NaN are NaN, of one with infinity infinite.
            low, high = part.aminmax()
            bad = not (math.isfinite(low) and math.isfinite(high))
        if bad:
            index = next(i for i, value in enumerate(part.float().tolist(), start) if value - value != 0)
            where = ", ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(index), tensor.shape))
            raise CheckpointError(f"NaN or infinity at [{where}]", file=entry.path.name, tensor=entry.name)
