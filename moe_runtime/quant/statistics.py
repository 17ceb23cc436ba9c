"""The second moments of what each weight reads, E[x_k^2] over a text: `python -m
moe_runtime.quant.statistics`.

Rounding (rounding.py) then makes the error of a layer's output small instead of the weights'. The text runs
through the full-precision model on the reference backend, whose operations are wrapped to look at their
inputs: attention, head, and the experts' gate and up see x of the tokens routed to them; down sees the gated
product, computed again here. A weight that no token of the text reached has no moments and is rounded
without.

The file is safetensors: by the name of the weight in the checkpoint, float32 [K]; the metadata has the number
of tokens and the hash of the model's config.json.
"""

import argparse
import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from moe_runtime.batch import Batch, no_masks
from moe_runtime.errors import CheckpointError, ConfigError, MoeRuntimeError
from moe_runtime.kernels import Kernels, PackedExperts, PackedLinear, choose
from moe_runtime.layers.decoder import Decoder
from moe_runtime.loader import load_model
from moe_runtime.tokenizer import Tokenizer

CHUNK = 512  # tokens run together, each chunk from its own beginning
BLOCK_SIZE = 64


@dataclass
class _Sum:
    """Sum of x^2 over the tokens seen, in float64."""

    squares: torch.Tensor
    count: int = 0

    def add(self, x: torch.Tensor) -> None:
        self.squares += x.double().square().sum(0)
        self.count += len(x)

    @property
    def mean(self) -> torch.Tensor:
        return (self.squares / self.count).float()


@dataclass
class Recorder:
    """Wraps the operations that multiply by weights; ``sums`` by id of the packed weight, and for experts by
    expert and part too.
    """

    kernels: Kernels
    sums: dict[tuple[int, int, str], _Sum] = field(default_factory=dict)

    def wrapped(self) -> Kernels:
        return replace(self.kernels, linear=self._linear, fused_moe=self._fused_moe)

    def _add(self, key: tuple[int, int, str], x: torch.Tensor) -> None:
        if len(x):
            self.sums.setdefault(key, _Sum(torch.zeros(x.shape[1], dtype=torch.float64))).add(x)

    def _linear(
        self, x: torch.Tensor, packed: PackedLinear, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        self._add((id(packed), 0, ""), x)
        result: torch.Tensor = self.kernels.linear(x, packed, bias)
        return result

    def _fused_moe(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        experts: PackedExperts,
        constants: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert constants is None, "weights are looked at without scenarios"
        for expert_id in expert_ids.unique().tolist():
            rows = x[(expert_ids == expert_id).any(1)]
            gate, up = experts.gate_up[expert_id].to(x.dtype)
            for part in ("gate", "up"):
                self._add((id(experts), expert_id, part), rows)
            hidden = self.kernels.silu_mul(rows @ gate.T, rows @ up.T)
            self._add((id(experts), expert_id, "down"), hidden)
        result: torch.Tensor = self.kernels.fused_moe(x, expert_ids, weights, experts)
        return result

    def moments(self, model: Decoder) -> dict[str, torch.Tensor]:
        """By the name of each weight, float32 [K]."""
        found = {}
        for slot in model.slots():
            if slot.part is None or slot.matrices is not None:
                continue
            place = slot.places[-1]
            kept = getattr(place.owner, place.attribute)
            key = (id(kept), 0, "") if isinstance(kept, PackedLinear) else (id(kept), *slot.expert)
            if key in self.sums:
                found[slot.name] = self.sums[key].mean
        return found


def record(model_dir: Path, text: str) -> tuple[dict[str, torch.Tensor], int]:
    """The moments of the model in ``model_dir`` over ``text``, and the number of tokens."""
    recorder = Recorder(choose("reference"))
    model = load_model(model_dir, recorder.wrapped())
    ids = Tokenizer.load(model_dir).encode(text)
    if not ids:
        raise ConfigError("--text: the file holds no token")
    chunk = min(CHUNK, model.config.max_position_embeddings)
    for start in range(0, len(ids), chunk):
        _run(model, ids[start : start + chunk])
    return recorder.moments(model), len(ids)


def _run(model: Decoder, ids: list[int]) -> None:
    num_blocks = -(-len(ids) // BLOCK_SIZE)
    positions = torch.arange(len(ids))
    rows = torch.zeros(len(ids), dtype=torch.int32)
    tables = torch.arange(num_blocks, dtype=torch.int32).unsqueeze(0)
    batch = Batch(torch.tensor(ids), positions.int(), positions, rows, tables, positions, no_masks(len(ids)))
    model.forward(batch, model.new_cache(num_blocks, BLOCK_SIZE))


def save_moments(path: Path, model_dir: Path, moments: Mapping[str, torch.Tensor], num_tokens: int) -> None:
    metadata = {"config": _config_hash(model_dir), "num_tokens": str(num_tokens)}
    save_file(dict(moments), path, metadata=metadata)


def load_moments(path: Path, model_dir: Path) -> dict[str, torch.Tensor]:
    """What ``save_moments`` wrote. Raises ConfigError for another model's file, CheckpointError for a bad
    one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            moments = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"--quantize-statistics {path}: {error}") from error
    if metadata.get("config") != _config_hash(model_dir):
        raise ConfigError(f"--quantize-statistics {path}: made for another config.json; record them again")
    for name, tensor in moments.items():
        if tensor.dtype is not torch.float32 or tensor.dim() != 1 or not bool((tensor >= 0).all()):
            raise CheckpointError("not second moments (float32, one per input)", file=path.name, tensor=name)
    return moments


def _config_hash(model_dir: Path) -> str:
    return hashlib.sha256((model_dir / "config.json").read_bytes()).hexdigest()


def main(argv: list[str] | None = None) -> int:
    """The command's exit status: 0, or 2 for a wrong flag or folder."""
    parser = argparse.ArgumentParser(prog="python -m moe_runtime.quant.statistics")
    parser.add_argument("--model", type=Path, required=True, metavar="DIR")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="like what will be served")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    arguments = parser.parse_args(argv)
    try:
        moments, num_tokens = record(arguments.model, arguments.text.read_text(encoding="utf-8"))
        save_moments(arguments.out, arguments.model, moments, num_tokens)
    except (MoeRuntimeError, OSError, UnicodeDecodeError) as error:
        print(f"moe_runtime.quant.statistics: {error}", file=sys.stderr)
        return 2
    print(f"{len(moments)} weights over {num_tokens} tokens -> {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
