"""What the loader takes; that all else is refused before the first token, naming file and tensor."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_oracle import BACKENDS, chunked_logits, greedy, load
from safetensors.torch import load_file
from world import ARCHITECTURES, edit_config, tiny_checkpoint, write_weights

from moe_runtime.errors import CheckpointError

PROMPT = torch.arange(40, 61)
EXPERT = "model.layers.1.mlp.experts.7.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
EMBEDDING = "model.embed_tokens.weight"
Tensors = dict[str, torch.Tensor]


def _without(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


def _with(name: str, tensor: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensor})


def _holding(name: str, index: tuple[int, ...], value: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[name][index] = value

    return change


def _as(name: str, dtype: torch.dtype) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


BAD_TENSORS: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "missing expert": (_without(EXPERT), rf"{EXPERT}: missing from the checkpoint .*8 experts per layer"),
    "missing norm": (_without(NORM), rf"{NORM}: missing"),
    "missing router": (_without("model.layers.0.mlp.gate.weight"), r"layers.0.mlp.gate.weight: missing"),
    "missing head": (_without("lm_head.weight"), r"lm_head.weight: missing"),
    "one expert more": (
        _with("model.layers.0.mlp.experts.8.up_proj.weight", torch.ones(16, 32)),
        r"safetensors: model.layers.0.mlp.experts.8.up_proj.weight: no part of .*8 experts per layer",
    ),
    "one layer more": (_with("model.layers.2.mlp.gate.weight", torch.ones(8, 32)), "layers.2.*: no part"),
    "a bias nobody adds": (_with("lm_head.bias", torch.ones(272)), r"safetensors: lm_head.bias: no part"),
    "adapter": (_with("base_model.lora_A.weight", torch.ones(2, 2)), r"lora_A.weight: no part"),
    "transposed": (_with(EXPERT, torch.ones(32, 16)), rf"{EXPERT}: shape \[32, 16\], .*\[16, 32\]"),
    "flat": (_with(EXPERT, torch.ones(512)), rf"{EXPERT}: shape \[512\]"),
    "router row missing": (
        _with("model.layers.0.mlp.gate.weight", torch.ones(7, 32)),
        r"mlp.gate.weight: shape \[7, 32\], config.json makes it \[8, 32\]",
    ),
    "small vocabulary": (_with(EMBEDDING, torch.ones(271, 32)), rf"{EMBEDDING}: shape \[271, 32\]"),
    "NaN in an expert": (_holding(EXPERT, (3, 5), float("nan")), rf"tensors: {EXPERT}: NaN.*\[3, 5\]"),
    "infinity in the embedding": (_holding(EMBEDDING, (9, 31), float("inf")), rf"{EMBEDDING}: .*\[9, 31\]"),
    "-infinity in a norm": (_holding(NORM, (4,), float("-inf")), rf"{NORM}: NaN or infinity at \[4\]"),
    "NaN in a router": (
        _holding("model.layers.1.mlp.gate.weight", (0, 0), float("nan")),
        r"layers.1.mlp.gate.weight: NaN or infinity at \[0, 0\]",
    ),
    "integer weight": (_as(EXPERT, torch.int32), rf"{EXPERT}: dtype I32"),
    "integer norm": (_as(NORM, torch.int64), rf"{NORM}: dtype I64"),
    "double": (_as(EXPERT, torch.float64), rf"{EXPERT}: dtype F64"),
    "half in a float32 model": (_as(EXPERT, torch.float16), rf"{EXPERT}: dtype F16, but .*float32"),
    "bfloat16 in a float32 model": (_as(EMBEDDING, torch.bfloat16), rf"{EMBEDDING}: dtype BF16"),
    "float8 without a declaration": (_as(EXPERT, torch.float8_e4m3fn), rf"{EXPERT}: dtype F8_E4M3"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("good"))


def copy_of(folder: Path, target: Path) -> Path:
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_wrong_tensors_are_refused(good: Path, tmp_path: Path, case: str) -> None:
    change, message = BAD_TENSORS[case]
    copy_of(good, tmp_path)
    tensors = load_file(good / "model.safetensors")
    change(tensors)
    write_weights(tmp_path, tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path, "reference")
    assert caught.value.tensor


def test_end_of_text_comes_from_the_generation_config(good: Path) -> None:
    assert load(good, "reference").config.eos_token_ids == (258, 256)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_checkpoints_run_as_their_widened_copies(
    tmp_path: Path, architecture: str, dtype: str, backend: str
) -> None:
    """float16 logits differ by the order of sums only; bfloat16 ones by the rounding of the cache, 2^-9, and
    on the fast path of the activations too. With that a token near a tie may choose another expert, so the
    bound is on the median token; transformers in bfloat16 is at about 0.01 by the same measure.
    """
    folder = tiny_checkpoint(tmp_path / "half", architecture, torch_dtype=dtype)
    wide = edit_config(copy_of(folder, _made(tmp_path / "wide")), torch_dtype="float32")
    tensors = load_file(folder / "model.safetensors")
    write_weights(wide, {name: tensor.float() for name, tensor in tensors.items()})
    model = load(folder, backend)
    assert model.config.dtype == dtype
    ours = chunked_logits(model, [PROMPT])[0]
    expected = chunked_logits(load(wide, "reference"), [PROMPT])[0]
    assert model.config.weight_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    error = float(((ours - expected).norm(dim=1) / expected.norm(dim=1)).median())
    print(f"{architecture} {dtype} {backend}: median relative error {error:.1e}")
    assert error <= {"float16": 2e-6, "bfloat16": 0.005 if backend == "reference" else 0.02}[dtype]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_routers_norms_and_biases_may_keep_float32_in_a_half_precision_checkpoint(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "glm4_moe", torch_dtype="bfloat16")
    before = chunked_logits(load(folder, "reference"), [PROMPT])[0]
    tensors = load_file(folder / "model.safetensors")
    small = {name for name in tensors if "norm" in name or name.endswith(("mlp.gate.weight", ".bias"))}
    write_weights(folder, {name: t.float() if name in small else t for name, t in tensors.items()})
    assert len(small) > 10
    for backend in BACKENDS:
        after = chunked_logits(load(folder, backend), [PROMPT])[0]
        errors = (after - before).norm(dim=1) / before.norm(dim=1)
        assert float(errors.median()) <= (0.0 if backend == "reference" else 0.02)


def test_sharded_checkpoints_equal_single_files(good: Path, tmp_path: Path) -> None:
    sharded = tiny_checkpoint(tmp_path, shards=3)
    assert greedy(load(sharded, "reference"), PROMPT, 8) == greedy(load(good, "reference"), PROMPT, 8)


def test_extra_layers_and_old_rotary_buffers_are_left_aside_by_name_only(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "deepseek_v3", num_nextn_predict_layers=1)
    tensors = load_file(folder / "model.safetensors")
    before = greedy(load(folder, "reference"), PROMPT, 8)
    tensors["model.layers.2.eh_proj.weight"] = torch.ones(32, 64)
    tensors["model.layers.2.mlp.experts.0.up_proj.weight"] = torch.ones(16, 32)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    write_weights(folder, tensors)
    assert greedy(load(folder, "reference"), PROMPT, 8) == before
    write_weights(folder, {**tensors, "model.layers.3.eh_proj.weight": torch.ones(32, 64)})
    with pytest.raises(CheckpointError, match=r"model.layers.3.eh_proj.weight: no part"):
        load(folder, "reference")


def test_the_config_may_leave_the_dtype_to_the_tensors(tmp_path: Path) -> None:
    folder = edit_config(tiny_checkpoint(tmp_path, torch_dtype="bfloat16"), torch_dtype=None)
    assert load(folder, "reference").config.dtype == "bfloat16"
    assert "torch_dtype" not in json.loads((folder / "config.json").read_text())
