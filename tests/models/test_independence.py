"""A sequence's logits are the same bits alone, in any mix of sequences, and in chunks of any size."""

from pathlib import Path

import pytest
import torch
from model_oracle import chunked_logits, load
from world import ARCHITECTURES, tiny_checkpoint

pytestmark = pytest.mark.usefixtures("isa")  # a library's matrix product depends on its rows; ours do not


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_batch_mates_and_chunks_do_not_change_a_bit(tmp_path: Path, architecture: str, dtype: str) -> None:
    model = load(tiny_checkpoint(tmp_path, architecture, torch_dtype=dtype), "cpu")
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(0, 272, (length,), generator=generator) for length in (33, 40, 27, 18)]
    alone = [chunked_logits(model, [ids], chunk=64)[0] for ids in prompts]
    for chunk in (10, 13, 29):
        for expected, logits in zip(alone, chunked_logits(model, prompts, chunk), strict=True):
            assert torch.equal(logits, expected)
    for expected, ids in zip(alone, prompts, strict=True):
        assert torch.equal(chunked_logits(model, [ids], chunk=1)[0], expected)
