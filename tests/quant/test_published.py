"""AWQ and GPTQ checkpoints run as the weights they stand for, code by code; all else about them is
refused.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_oracle import BACKENDS, chunked_logits, greedy, load
from published_int4 import AWQ, GPTQ, Tensors, publish
from safetensors.torch import load_file
from world import edit_config, tiny_checkpoint, write_weights

from moe_runtime.errors import CheckpointError
from moe_runtime.kernels import WeightFormat

PROMPT = torch.arange(40, 61)
WIDE = {"hidden_size": 64, "moe_intermediate_size": 40}  # one full group and one short one
PUBLISHED: dict[str, dict[str, Any]] = {
    "awq": {**AWQ, "modules_to_not_convert": ["lm_head", "gate"]},
    "awq-g64": {**AWQ, "group_size": 64, "version": "GEMM", "do_fuse": True},
    "gptq": {**GPTQ, "damp_percent": 0.01, "true_sequential": True, "static_groups": False},
    "gptq-asymmetric": {**GPTQ, "sym": False},
    "gptq-v2": {**GPTQ, "sym": False, "checkpoint_format": "gptq_v2", "meta": {"quantizer": ["x"]}},
    "gptq-whole-rows": {**GPTQ, "group_size": -1},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", PUBLISHED)
def test_a_published_checkpoint_runs_as_the_weights_it_stands_for(
    tmp_path: Path, case: str, backend: str
) -> None:
    shape = {} if PUBLISHED[case]["quant_method"] == "gptq" else {"moe_intermediate_size": 64}
    group = PUBLISHED[case]["group_size"]
    folder = tiny_checkpoint(tmp_path / "published", **{**WIDE, **shape})
    plain = tiny_checkpoint(tmp_path / "plain", **{**WIDE, **shape})
    write_weights(plain, publish(folder, PUBLISHED[case]))
    ours, oracle = load(folder, backend), load(plain, "reference")
    zeros = case not in ("gptq", "gptq-whole-rows")
    weight_format = WeightFormat("int4", 128 if group == -1 else group, zeros)
    assert ours.blocks[0].attention.inputs.packed.format == weight_format
    assert ours.blocks[1].mlp.experts.packed.format == weight_format
    expected = chunked_logits(oracle, [PROMPT])[0]
    errors = (chunked_logits(ours, [PROMPT])[0] - expected).norm(dim=1) / expected.norm(dim=1)
    # The reference computes with the very numbers; the kernels round activations to 8 bits.
    assert float(errors.median()) <= (1e-6 if backend == "reference" else 0.03)
    if backend == "reference":
        assert greedy(ours, PROMPT, 8) == greedy(oracle, PROMPT, 8)


@pytest.mark.parametrize("skip", ["k_proj", "nothing"])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_matrices_that_cannot_stay_in_codes_are_widened(tmp_path: Path, architecture: str, skip: str) -> None:
    """A stack with a part that is not quantised, and the matrix that latent attention takes apart."""
    folder = tiny_checkpoint(tmp_path / "published", architecture)
    plain = tiny_checkpoint(tmp_path / "plain", architecture)
    write_weights(plain, publish(folder, GPTQ, skip))
    expected = chunked_logits(load(plain, "reference"), [PROMPT])[0]
    logits = chunked_logits(load(folder, "reference"), [PROMPT])[0]
    assert float((logits - expected).norm() / expected.norm()) <= 2e-6


def _changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


def _without(name: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        del tensors[name]

    return change


O = "model.layers.1.self_attn.o_proj."  # noqa: E741
BAD: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "no codes": (_without(O + "qweight"), "o_proj.weight: missing"),
    "no scales": (_without(O + "scales"), "o_proj.scales: missing"),
    "no zeros": (_without(O + "qzeros"), "o_proj.qzeros: missing"),
    "codes of another shape": (_changed(O + "qweight", torch.t), r"o_proj.qweight: shape \[32, 8\]"),
    "codes as floats": (_changed(O + "qweight", torch.Tensor.float), "qweight: dtype F32, expected I32"),
    "wide scales": (_changed(O + "scales", torch.Tensor.float), "scales: dtype F32, expected F16 or BF16"),
    "infinite scale": (_changed(O + "scales", lambda t: t / 0), r"scales: NaN or infinity at \[0, 0\]"),
    "zero points": (_changed(O + "qzeros", lambda t: t + 1), "qzeros: a zero point other than 8, .*sym"),
    "reordered": (_changed(O + "g_idx", lambda t: t.flip(0)), "o_proj.g_idx: .*desc_act.*desc_act=False"),
    "a stranger": (lambda t: t.update({O + "wf": torch.ones(2)}), "o_proj.wf: no part"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_damaged_tensors_are_refused(tmp_path: Path, case: str) -> None:
    folder = tiny_checkpoint(tmp_path)
    publish(folder, GPTQ)
    tensors = load_file(folder / "model.safetensors")
    change, message = BAD[case]
    change(tensors)
    write_weights(folder, {name: tensor.contiguous() for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match=message):
        load(folder, "reference")


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "AWQ of 8 bits": ({**AWQ, "bits": 8}, "bits: 8 is not supported: only 4-bit AWQ"),
    "AWQ gemv": ({**AWQ, "version": "gemv"}, "version: 'gemv' is not supported; supported: gemm"),
    "AWQ without zeros": ({**AWQ, "zero_point": False}, "zero_point: False is not supported"),
    "AWQ groups": ({**AWQ, "group_size": 48}, "group_size: 48 is not supported; supported: -1, 32, 64 and"),
    "GPTQ of 3 bits": ({**GPTQ, "bits": 3}, "bits: 3 is not supported: only 4-bit GPTQ"),
    "GPTQ marlin": ({**GPTQ, "is_marlin_format": True}, "is_marlin_format: True is not supported"),
    "GPTQ format": ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format: 'marlin' is not supported"),
    "GPTQ head": ({**GPTQ, "lm_head": True}, "lm_head: True is not supported"),
    "GPTQ per module": ({**GPTQ, "dynamic": {"x": {}}}, "quantization_config.dynamic: unknown setting"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_not_implemented_are_refused(tmp_path: Path, case: str) -> None:
    settings, message = SETTINGS[case]
    folder = edit_config(tiny_checkpoint(tmp_path), quantization_config=settings)
    with pytest.raises(CheckpointError, match=f"config.json: .*{message}"):
        load(folder, "reference")
