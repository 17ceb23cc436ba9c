"""A sequence's logits are the same bits alone, in any mix of sequences, and in chunks of any size."""

from pathlib import Path

import pytest
import torch
from devices import ComputeDevice
from model_oracle import chunked_logits
from world import ARCHITECTURES, tiny_checkpoint

from moe_runtime.loader import load_model

pytestmark = pytest.mark.every_isa  # a library's matrix product depends on its rows; ours do not


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_batch_mates_and_chunks_do_not_change_a_bit(
    tmp_path: Path, compute_device: ComputeDevice, architecture: str, dtype: str
) -> None:
    folder = tiny_checkpoint(tmp_path, architecture, torch_dtype=dtype)
    model = load_model(folder, compute_device.kernels())
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 272, (length,), generator=generator) for length in (33, 40, 27, 18)]
    alone = [chunked_logits(model, [ids], chunk=64)[0] for ids in prompts]
    for chunk in (10, 13, 29):
        for expected, logits in zip(alone, chunked_logits(model, prompts, chunk), strict=True):
            assert torch.equal(logits, expected)
    for expected, ids in zip(alone, prompts, strict=True):
        assert torch.equal(chunked_logits(model, [ids], chunk=1)[0], expected)
