"""Second moments of the layers' inputs: exactly those, and rounding with them moves the model less."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from world import ARCHITECTURES, edit_config, tiny_checkpoint

from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine
from moe_runtime.errors import CheckpointError, ConfigError
from moe_runtime.kernels import choose
from moe_runtime.loader import load_model
from moe_runtime.quant import statistics
from moe_runtime.quant.statistics import load_moments, record, save_moments

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 3


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_weight_that_is_multiplied_has_moments(tmp_path: Path, architecture: str) -> None:
    folder = tiny_checkpoint(tmp_path, architecture)
    moments, num_tokens = record(folder, TEXT)
    model = load_model(folder, choose("reference"))
    wanted = {s.name: s.shape for s in model.slots() if s.part is not None and s.matrices is None}
    missing = {name for name in wanted if name not in moments}
    # An expert that no token of the text chose has none.
    assert all(".experts." in name for name in missing) and len(missing) < len(wanted) / 3
    assert num_tokens == len(TEXT)
    for name, moment in moments.items():
        assert moment.shape == wanted[name][1:] and moment.dtype is torch.float32
        assert bool((moment >= 0).all()) and float(moment.max()) > 0


def test_the_moments_are_those_of_the_inputs(tmp_path: Path) -> None:
    """Of the first layer, whose inputs can be written down: the norm of the embedding."""
    folder = tiny_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    moments, _ = record(folder, TEXT)
    ids = torch.tensor(list(TEXT.encode()))
    x = tensors["model.embed_tokens.weight"][ids].double()
    x = x / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    x = x * tensors["model.layers.0.input_layernorm.weight"].double()
    expected = x.square().mean(0)
    for part in ("q", "k", "v"):
        found = moments[f"model.layers.0.self_attn.{part}_proj.weight"].double()
        assert float(((found - expected) / expected).abs().max()) <= 1e-5
    # gate and up of one expert read the same tokens, another expert others.
    experts = [f"model.layers.1.mlp.experts.{i}" for i in range(8)]
    gates = [moments[f"{name}.gate_proj.weight"] for name in experts if f"{name}.gate_proj.weight" in moments]
    ups = [moments[f"{name}.up_proj.weight"] for name in experts if f"{name}.up_proj.weight" in moments]
    assert all(torch.equal(a, b) for a, b in zip(gates, ups, strict=True))
    assert len(gates) > 1 and not torch.equal(gates[0], gates[1])


def test_a_file_made_by_the_command_is_used_by_the_engine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = edit_config(tiny_checkpoint(tmp_path / "model"), eos_token_id=None)
    text, out = tmp_path / "text.txt", tmp_path / "moments.safetensors"
    text.write_text(TEXT)
    assert statistics.main(["--model", str(folder), "--text", str(text), "--out", str(out)]) == 0
    assert f"weights over {len(TEXT)} tokens" in capsys.readouterr().out
    plain = EngineConfig(quantize="int4", packed_file=False)
    weighted = EngineConfig(quantize="int4", packed_file=False, quantize_statistics=out)
    data = [
        Engine.load(folder, config).model.blocks[0].attention.inputs.packed.data
        for config in (plain, weighted)
    ]
    assert data[0].shape == data[1].shape and not torch.equal(*data)
    assert statistics.main(["--model", str(folder), "--text", str(tmp_path), "--out", str(out)]) == 2


def test_moments_of_another_model_or_other_files_are_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model")
    path = tmp_path / "moments"
    save_moments(path, folder, {"a": torch.ones(3)}, 5)
    assert load_moments(path, folder)["a"].tolist() == [1, 1, 1]
    save_moments(path, folder, {"a": torch.tensor([1.0, float("nan")])}, 5)
    with pytest.raises(CheckpointError, match="moments: a: not second moments"):
        load_moments(path, folder)
    save_file({"a": torch.ones(3)}, path)
    with pytest.raises(ConfigError, match="made for another config.json"):
        load_moments(path, folder)
    path.write_bytes(b"not a file of tensors")
    with pytest.raises(ConfigError, match="--quantize-statistics"):
        load_moments(path, folder)
    with pytest.raises(ConfigError, match="--quantize-statistics"):
        load_moments(tmp_path / "absent", folder)
