"""Tiny models with few bits, as published or in the cache, on Triton's kernels against the reference."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from model_oracle import chunked_logits  # noqa: E402
from test_loader_memory import as_fp8  # noqa: E402
from world import tiny_checkpoint, write_weights  # noqa: E402

from moe_runtime.config import EngineConfig  # noqa: E402
from moe_runtime.engine import Engine  # noqa: E402
from moe_runtime.kernels import WeightFormat, choose  # noqa: E402
from moe_runtime.loader import load_model  # noqa: E402
from moe_runtime.sampling import SamplingParams  # noqa: E402

# Codes are multiplied exactly, activations rounded to bfloat16; the widened copy's weights are rounded to
# bfloat16: two roundings of 2 ** -9 in about ten products one after the other, relative to a row's norm.
FLOAT8_BOUND = 10 * 2 * 2.0**-9
# Keys and values out of an int8 cache, queries and softmax weights are rounded to bfloat16, 2 ** -9 each, in
# two layers. In nats, of logits of a few units.
CACHE_BOUND = 0.02
SHAPES = {"qwen3_moe": {"moe_intermediate_size": 136, "head_dim": 64}, "deepseek_v3": {}}


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (length,), generator=generator) for length in (9, 5)]


@pytest.mark.parametrize("architecture", SHAPES)
def test_published_float8_runs_as_its_codes(tmp_path: Path, device: torch.device, architecture: str) -> None:
    """Several blocks of scales, the last ones cut off; deepseek_v3's stacked inputs straddle one."""
    shape = {"hidden_size": 160, "intermediate_size": 136, **SHAPES[architecture]}
    folder = tiny_checkpoint(tmp_path / "float8", architecture, torch_dtype="bfloat16", **shape)
    plain = tiny_checkpoint(tmp_path / "plain", architecture, torch_dtype="bfloat16", **shape)
    write_weights(plain, as_fp8(folder, (128, 128)))
    ours = load_model(folder, choose("triton", device=device))
    attention, float8 = ours.blocks[1].attention, WeightFormat("float8", 128)
    assert ours.blocks[1].mlp.experts.packed.format == attention.output.packed.format == float8
    assert (attention.inputs.packed.format == float8) == (architecture == "qwen3_moe")
    reference = load_model(plain, choose("reference"))
    pairs = (chunked_logits(model, prompts(), chunk=8) for model in (ours, reference))
    for logits, expected in zip(*pairs, strict=True):
        error = float(((logits.cpu() - expected).norm(dim=1) / expected.norm(dim=1)).max())
        print(f"relative error {error:.1e}")
        assert error <= FLOAT8_BOUND


@pytest.mark.parametrize("architecture", SHAPES)
def test_the_engine_answers_from_an_int8_cache_as_the_reference_does(
    tmp_path: Path, device: torch.device, architecture: str
) -> None:
    folder = tiny_checkpoint(tmp_path, architecture)
    params = SamplingParams(temperature=0.0, max_tokens=3, logprobs=0, ignore_eos=True)
    answers = []
    for backend, where in (("triton", device.type), ("reference", "cpu")):
        config = EngineConfig(device=where, backend=backend, kv_dtype="int8", num_blocks=8)  # type: ignore[arg-type]
        engine = Engine.load(folder, config)
        answers.append(engine.generate([ids.tolist() for ids in prompts()], params))
    for (ours,), (expected,) in zip(*answers, strict=True):
        assert ours.token_ids == expected.token_ids
        for mine, truth in zip(ours.logprobs or (), expected.logprobs or (), strict=True):
            print(f"off by {abs(mine.logprob - truth.logprob):.1e} nats")
            assert abs(mine.logprob - truth.logprob) <= CACHE_BOUND


def test_a_tied_head_is_the_embedding_itself(tmp_path: Path, device: torch.device) -> None:
    shape = {"hidden_size": 64, "tie_word_embeddings": True}
    model = load_model(tiny_checkpoint(tmp_path, **shape), choose("triton", device=device))
    assert model.head.packed.data.data_ptr() == model.embedding.table.data_ptr()
