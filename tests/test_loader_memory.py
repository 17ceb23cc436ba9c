"""Weights go from the mapped file straight to their home, so peak memory is the weights; and float8."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from model_oracle import BACKENDS, chunked_logits, load
from safetensors.torch import load_file
from world import edit_config, tiny_checkpoint, write_weights

from moe_runtime.errors import CheckpointError

PROMPT = torch.arange(40, 61)

BIG = {
    "hidden_size": 512, "moe_intermediate_size": 512, "num_experts": 16, "num_hidden_layers": 8,
    "head_dim": 32, "num_attention_heads": 16, "torch_dtype": "bfloat16", "vocab_size": 2048,
    "eos_token_id": None,
}  # fmt: skip

MEASURE = """
import re, sys
from pathlib import Path
from moe_runtime.kernels import choose
from moe_runtime.loader import load_model

def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

kernels = choose(sys.argv[2])
load_model(Path(sys.argv[1]) / "small", kernels)        # whatever is allocated once, is now
Path("/proc/self/clear_refs").write_text("5")           # peak = present
before = kilobytes("VmRSS")
model = load_model(Path(sys.argv[1]) / "big", kernels)
print(model.config.weight_bytes, (kilobytes("VmHWM") - before) * 1024)
"""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_while_loading_is_the_weights_and_a_tenth(tmp_path: Path, backend: str) -> None:
    tiny_checkpoint(tmp_path / "small", torch_dtype="bfloat16")
    tiny_checkpoint(tmp_path / "big", shards=3, **BIG)
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), backend],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    weights, peak = map(int, output.split())
    print(f"{backend}: weights {weights / 1e6:.1f} MB, peak {peak / 1e6:.1f} MB, ratio {peak / weights:.3f}")
    assert weights >= 200_000_000
    assert peak <= 1.10 * weights


def as_fp8(folder: Path, block: tuple[int, int] = (16, 8)) -> dict[str, torch.Tensor]:
    """Rewrite a bfloat16 checkpoint as DeepSeek publishes its float8; the widened weights it stands for."""
    stored, widened = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored[name] = widened[name] = tensor
        if not name.endswith("_proj.weight") and "_proj_with_mqa" not in name:
            continue
        rows, columns = tensor.shape
        scales = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
        small, wide = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
                scales[i, j] = tensor[part].float().abs().max() / 448
                small[part] = (tensor[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
                wide[part] = small[part].float() * scales[i, j]
        stored[name], widened[name] = small, wide.bfloat16()
        stored[f"{name}_scale_inv"] = scales
    write_weights(folder, stored)
    edit_config(
        folder,
        quantization_config={
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(block),
        },
    )
    return widened


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_float8_checkpoints_run_as_their_widened_copies(
    tmp_path: Path, architecture: str, backend: str
) -> None:
    folder = tiny_checkpoint(tmp_path / "float8", architecture, torch_dtype="bfloat16")
    plain = tiny_checkpoint(tmp_path / "plain", architecture, torch_dtype="bfloat16")
    original = chunked_logits(load(plain, backend), [PROMPT])[0]
    write_weights(plain, as_fp8(folder))
    ours = load(folder, backend)
    assert ours.config.dtype == "bfloat16" and ours.config.fp8 is not None
    logits = chunked_logits(ours, [PROMPT])[0]
    assert torch.equal(logits, chunked_logits(load(plain, backend), [PROMPT])[0])
    assert not torch.equal(logits, original)


def test_damaged_float8_checkpoints_are_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, torch_dtype="bfloat16")
    as_fp8(folder)
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.experts.3.down_proj.weight"
    scale = f"{name}_scale_inv"
    overflowing = stored[scale].clone()
    overflowing[1, 0] = 3e38
    infinite, not_a_number = stored[scale].clone(), stored[name].clone()
    infinite[0, 0] = float("inf")
    not_a_number.view(torch.uint8)[5, 6] = 0x7F
    cases = [
        ({name: stored[name].bfloat16()}, rf"{scale}: scales for a tensor that is not float8"),
        ({scale: torch.ones(1, 2)}, rf"{scale}: F32 \[1, 2\], expected F32 or BF16 \[2, 2\]"),
        ({scale: stored[scale].half()}, rf"{scale}: F16 \[2, 2\]"),
        ({scale: infinite}, rf"{scale}: NaN or infinity at \[0, 0\]"),
        ({scale: overflowing}, rf"{name}: NaN or infinity at \[(1[6-9]|2\d|3[01]), \d\]"),
        ({name: not_a_number}, rf"{name}: NaN or infinity at \[5, 6\]"),
        ({"lm_head.weight_scale_inv": torch.ones(17, 4)}, r"lm_head.weight_scale_inv: scales for a tensor"),
        ({"model.norm.weight_scale_inv": torch.ones(1)}, r"model.norm.weight_scale_inv: scales for a tensor"),
        ({"nothing.weight_scale_inv": torch.ones(1)}, r"nothing.weight_scale_inv: no part"),
    ]
    for change, message in cases:
        write_weights(folder, {**stored, **change})
        with pytest.raises(CheckpointError, match=message):
            load(folder, "reference")
    del stored[scale]
    write_weights(folder, stored)
    with pytest.raises(CheckpointError, match=rf"{name}: float8 without its scales"):
        load(folder, "reference")
