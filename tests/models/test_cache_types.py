"""What a cache of fewer bits costs: KL from a float32 cache, next-token distributions of every position."""

from pathlib import Path

import pytest
import torch
from model_oracle import load
from world import tiny_checkpoint

from moe_runtime.batch import Batch, no_masks
from moe_runtime.layers.decoder import Decoder
from moe_runtime.tokenizer import Tokenizer

DEMO = Path(__file__).parents[2] / "experts" / "demo" / "model"
DIALOGUE = """<|im_start|>user
What is the interest rate of Harbor Consumer Loan?<|im_end|>
<|im_start|>assistant
The interest rate of Harbor Consumer Loan is 4 %.<|im_end|>
<|im_start|>user
麒麟债券基金的风险等级是多少？<|im_end|>
<|im_start|>assistant
"""
BLOCK = 16


def log_probabilities(model: Decoder, ids: torch.Tensor, kv_dtype: str) -> torch.Tensor:
    """float64 [T, V], fed in chunks of 64."""
    num_blocks = -(-len(ids) // BLOCK)
    cache = model.new_cache(num_blocks, BLOCK, kv_dtype)
    logits = []
    for positions in torch.arange(len(ids)).split(64):
        batch = Batch(
            token_ids=ids[positions],
            positions=positions.int(),
            slots=positions,
            sequence_rows=torch.zeros(len(positions)).int(),
            block_tables=torch.arange(num_blocks).int().unsqueeze(0),
            logit_rows=torch.arange(len(positions)),
            mask_rows=no_masks(len(positions)),
        )
        logits.append(model.forward(batch, cache).double())
    return torch.cat(logits).log_softmax(-1)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "demo"])
def test_fewer_bits_move_the_distributions_little(tmp_path: Path, name: str, kv_dtype: str) -> None:
    """Mean KL below 2e-3; single positions are moved most where a router's choice is nearly a tie."""
    model = load(DEMO if name == "demo" else tiny_checkpoint(tmp_path, name), "cpu")
    ids = torch.randint(0, 256, (300,), generator=torch.Generator().manual_seed(0))
    if name == "demo":
        ids = torch.tensor(Tokenizer.load(DEMO).encode(DIALOGUE))
    exact, got = (log_probabilities(model, ids, kind) for kind in ("float32", kv_dtype))
    divergence = (exact.exp() * (exact - got)).sum(-1)
    print(f"{name}, {kv_dtype} cache: KL mean {divergence.mean():.1e}, largest {divergence.max():.1e}")
    assert divergence.mean() < 2e-3


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_both_backends_read_an_int8_cache_alike(tmp_path: Path, isa: str, name: str) -> None:
    """Up to codes that a last digit tips over, and on AVX-512 BF16 rows rounded to bf16 when widened."""
    folder = tiny_checkpoint(tmp_path, name)
    ids = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(1))
    truth, got = (log_probabilities(load(folder, backend), ids, "int8") for backend in ("reference", "cpu"))
    assert ((truth.exp() * (truth - got)).sum(-1)).mean() < (1e-3 if isa in ("avx512bf16", "amx") else 2e-4)
