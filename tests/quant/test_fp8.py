"""Float8 checkpoints for kernels that multiply by codes and block scales: what stays so, and what cannot.

The reference backend stands in for such kernels: it takes the codes and computes with what they mean.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from model_oracle import chunked_logits, load
from safetensors.torch import load_file
from test_loader_memory import as_fp8
from world import tiny_checkpoint, write_weights

from moe_runtime.config import EngineConfig
from moe_runtime.errors import CheckpointError
from moe_runtime.kernels import Kernels, WeightFormat, choose
from moe_runtime.layers.decoder import Decoder
from moe_runtime.loader import load_model
from moe_runtime.quant.recipe import Recipe

PROMPT = torch.arange(40, 52)
# Queries are 256 rows, keys and values 128 each: no block of scales straddles two of the stacked matrices.
SHAPE = {"hidden_size": 160, "moe_intermediate_size": 136, "head_dim": 64, "torch_dtype": "bfloat16"}
FLOAT8, BF16 = WeightFormat("float8", 128), WeightFormat("bfloat16")
EXPERT = "model.layers.0.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return replace(choose("reference"), float8=True)


def published(folder: Path, block: tuple[int, int] = (128, 128), **shape: object) -> dict[str, torch.Tensor]:
    """A float8 checkpoint in ``folder``; the widened weights it stands for."""
    return as_fp8(tiny_checkpoint(folder, **{**SHAPE, **shape}), block)


def formats(model: Decoder) -> tuple[WeightFormat, ...]:
    """Of the first layer's stacked inputs, its attention's output, its experts, and of the head."""
    block = model.blocks[0]
    packed = (block.attention.inputs, block.attention.output, block.mlp.experts, model.head)
    return tuple(part.packed.format for part in packed)


def test_codes_and_scales_stay_as_published(tmp_path: Path, kernels: Kernels) -> None:
    """The only difference from the widened copy is its rounding to bfloat16: 2 ** -9 of each weight, in about
    ten products one after the other.
    """
    widened = published(tmp_path / "float8")
    plain = tiny_checkpoint(tmp_path / "plain", **SHAPE)
    write_weights(plain, widened)
    ours, oracle = load_model(tmp_path / "float8", kernels), load(plain, "reference")
    assert formats(ours) == (FLOAT8, FLOAT8, FLOAT8, BF16)
    assert ours.config.weight_bytes < 0.7 * oracle.config.weight_bytes
    expected = chunked_logits(oracle, [PROMPT])[0]
    error = (chunked_logits(ours, [PROMPT])[0] - expected).norm(dim=1) / expected.norm(dim=1)
    print(f"relative error {float(error.max()):.1e}")
    assert 0 < float(error.max()) <= 10 * 2.0**-9


def test_what_kernels_cannot_take_as_it_is_gets_widened(tmp_path: Path, kernels: Kernels) -> None:
    published(tmp_path / "other blocks", (64, 128))
    assert formats(load_model(tmp_path / "other blocks", kernels)) == (BF16,) * 4
    published(tmp_path / "straddling", head_dim=48)  # queries are 192 rows
    assert formats(load_model(tmp_path / "straddling", kernels)) == (BF16, FLOAT8, FLOAT8, BF16)
    widened = published(tmp_path / "one of a layer")
    stored = load_file(tmp_path / "one of a layer" / "model.safetensors")
    del stored[f"{EXPERT}_scale_inv"]
    write_weights(tmp_path / "one of a layer", {**stored, EXPERT: widened[EXPERT]})
    model = load_model(tmp_path / "one of a layer", kernels)
    assert formats(model) == (FLOAT8, FLOAT8, BF16, BF16)
    assert model.blocks[1].mlp.experts.packed.format == FLOAT8


def test_integers_that_the_user_asks_for_come_first(tmp_path: Path, kernels: Kernels) -> None:
    published(tmp_path)
    recipe = Recipe.of(EngineConfig(quantize="experts=int4"))
    assert formats(load_model(tmp_path, kernels, recipe)) == (FLOAT8, FLOAT8, WeightFormat("int4", 128), BF16)


def test_kernels_without_float8_get_none(tmp_path: Path) -> None:
    published(tmp_path)
    assert formats(load(tmp_path, "reference")) == (BF16,) * 4


def test_damaged_codes_are_refused_though_nothing_is_widened(tmp_path: Path, kernels: Kernels) -> None:
    published(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    scales = stored[f"{EXPERT}_scale_inv"].clone()
    scales[1, 0] = 3e38
    codes = stored[EXPERT].clone()
    codes.view(torch.uint8)[5, 6] = 0xFF
    infinite = rf"{EXPERT}: NaN or infinity at \[1(2[89]|3\d), \d+\]"
    for name, wrong, message in (
        (f"{EXPERT}_scale_inv", scales, infinite),
        (EXPERT, codes, rf"{EXPERT}: NaN or infinity at \[5, 6\]"),
    ):
        write_weights(tmp_path, {**stored, name: wrong})
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path, kernels)
