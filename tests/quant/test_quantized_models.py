"""Models with quantised parts: exactly the model of the dequantised weights, on any backend, from any
form.
"""

from pathlib import Path

import pytest
import torch
from model_oracle import BACKENDS, chunked_logits, greedy
from safetensors.torch import load_file
from world import ARCHITECTURES, edit_config, tiny_checkpoint, write_weights

from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine
from moe_runtime.kernels import WeightFormat, choose
from moe_runtime.layers.decoder import Decoder
from moe_runtime.loader import load_model
from moe_runtime.quant.recipe import Recipe
from moe_runtime.quant.rounding import quantize

PROMPT = torch.arange(40, 61)
CHOICES = {
    "int8": EngineConfig(quantize="int8"),
    "int4": EngineConfig(quantize="int4"),
    "int4-g32z": EngineConfig(quantize="int4", quantize_group=32, quantize_zeros=True),
    "mixed": EngineConfig(quantize="experts=int4,attention=int8", quantize_group=64),
}


def load(folder: Path, backend: str, config: EngineConfig) -> Decoder:
    return load_model(folder, choose(backend), Recipe.of(config))


def part_of(name: str) -> str | None:
    if "norm" in name or "embed" in name or name.endswith(("gate.weight", "router.weight", "bias")):
        return None
    return "lm_head" if name.startswith("lm_head") else "attention" if "att" in name else "experts"


def dequantized(name: str, weight: torch.Tensor, config: EngineConfig) -> torch.Tensor:
    """What the model must compute with in place of ``weight``."""
    weight_format = Recipe.of(config).formats.get(part_of(name))  # type: ignore[call-overload]
    if weight_format is None:
        return weight
    if name.endswith("kv_b_proj.weight"):  # 4 heads of 8 keys and 12 values
        per_head = weight.view(4, 20, -1)
        keys = [quantize(head.t(), weight_format).dequantize().t() for head in per_head[:, :8]]
        values = [quantize(head, weight_format).dequantize() for head in per_head[:, 8:]]
        return torch.cat((torch.stack(keys), torch.stack(values)), 1).flatten(0, 1).contiguous()
    return quantize(weight, weight_format).dequantize()


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_quantised_model_is_the_model_of_its_dequantised_weights(
    tmp_path: Path, architecture: str, choice: str
) -> None:
    config = CHOICES[choice]
    folder = tiny_checkpoint(tmp_path, architecture)
    ours = {backend: load(folder, backend, config) for backend in BACKENDS}
    tensors = load_file(folder / "model.safetensors")
    write_weights(folder, {name: dequantized(name, tensor, config) for name, tensor in tensors.items()})
    oracle = load(folder, "reference", EngineConfig())
    expected = chunked_logits(oracle, [PROMPT])[0]
    literal = chunked_logits(ours["reference"], [PROMPT])[0]
    # The same numbers, in sums of another order where a matrix is stored transposed.
    assert float((literal - expected).norm() / expected.norm()) <= 2e-6
    tokens = greedy(oracle, PROMPT, 8)
    assert greedy(ours["reference"], PROMPT, 8) == tokens
    if "cpu" in BACKENDS:
        fast = chunked_logits(ours["cpu"], [PROMPT])[0]
        errors = (fast - expected).norm(dim=1) / expected.norm(dim=1)
        print(f"{architecture} {choice}: median error {errors.median():.1e}, largest {errors.max():.1e}")
        # Activations have 8 bits: half a step of 1/127 of the largest of 64, per layer of the four. With them
        # a token near a tie may choose another expert, so the bound is on the median token.
        assert float(errors.median()) <= 0.03
        gap = float(expected[-1].topk(2).values.diff().abs())
        if gap > 4 * float((fast[-1] - expected[-1]).abs().max()):
            assert int(fast[-1].argmax()) == tokens[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tied_head_is_quantised_and_its_embedding_is_not(tmp_path: Path, backend: str) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen3_moe", tie_word_embeddings=True)
    model = load(folder, backend, EngineConfig(quantize="lm_head=int4"))
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.embedding.table, table)
    assert model.head.packed.format == WeightFormat("int4", 128)
    ids = torch.tensor([3])
    wanted = model.embedding(ids) @ quantize(table, WeightFormat("int4", 128)).dequantize().t()
    assert float((model.head(model.embedding(ids)) - wanted).norm() / wanted.norm()) <= 0.02


def test_parts_get_their_formats_and_all_else_keeps_its_own(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "glm4_moe", torch_dtype="bfloat16")
    model = load(folder, "cpu", EngineConfig(quantize="experts=int4,attention=int8"))
    plain = WeightFormat("bfloat16")
    layer = model.blocks[1]
    assert (
        layer.attention.inputs.packed.format == layer.attention.output.packed.format == WeightFormat("int8")
    )
    experts = WeightFormat("int4", 128)
    assert layer.mlp.experts.packed.format == layer.mlp.shared.experts.packed.format == experts
    assert model.blocks[0].mlp.experts.packed.format == experts
    assert layer.mlp.router.packed.format == model.head.packed.format == plain
    full = load(folder, "cpu", EngineConfig()).config.weight_bytes
    assert model.config.weight_bytes < 0.75 * full


def test_float8_checkpoints_are_quantised_as_their_widened_copies(tmp_path: Path) -> None:
    from test_loader_memory import as_fp8

    folder = tiny_checkpoint(tmp_path / "float8", torch_dtype="bfloat16")
    plain = tiny_checkpoint(tmp_path / "plain", torch_dtype="bfloat16")
    write_weights(plain, as_fp8(folder))
    for config in CHOICES.values():
        logits = [chunked_logits(load(path, "cpu", config), [PROMPT])[0] for path in (folder, plain)]
        assert torch.equal(*logits)


def test_the_engine_takes_the_options(tmp_path: Path) -> None:
    folder = edit_config(tiny_checkpoint(tmp_path), eos_token_id=None)
    engine = Engine.load(folder, EngineConfig(quantize="int4", quantize_group=32))
    assert engine.model.head.packed.format == WeightFormat("int4", 32)
