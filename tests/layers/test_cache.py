"""The cache is zero, has the size it promises, and costs nothing before it is used."""

from pathlib import Path

import pytest
import torch
from model_oracle import load
from world import tiny_checkpoint

from moe_runtime.kernels.cache_rows import row_size
from moe_runtime.layers.cache import zeroed


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_cache_has_the_bytes_it_promises(tmp_path: Path, architecture: str, dtype: str) -> None:
    model = load(tiny_checkpoint(tmp_path, architecture, torch_dtype=dtype), "reference")
    cache = model.new_cache(num_blocks=7, block_size=16)
    assert cache.num_bytes == 7 * model.cache_bytes_per_block(16)
    expected = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    assert {layer.keys.dtype for layer in cache.layers} == {expected}
    assert not any(layer.keys.any() for layer in cache.layers)


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize(
    ("kv_dtype", "expected"),
    [("bfloat16", torch.bfloat16), ("float32", torch.float32), ("int8", torch.int8)],
)
def test_the_type_of_a_cache_can_be_chosen(
    tmp_path: Path, architecture: str, kv_dtype: str, expected: torch.dtype
) -> None:
    model = load(tiny_checkpoint(tmp_path, architecture), "reference")
    cache = model.new_cache(7, 16, kv_dtype)
    assert cache.num_bytes == 7 * model.cache_bytes_per_block(16, kv_dtype)
    assert {layer.keys.dtype for layer in cache.layers} == {expected}


def test_an_int8_row_is_its_codes_and_a_scale_for_every_64() -> None:
    assert [row_size(dim, torch.int8) for dim in (1, 64, 65, 128, 576)] == [8, 68, 76, 136, 612]


def test_a_gigabyte_of_cache_takes_no_memory_before_it_is_written() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    tensor = zeroed((1024, 1024, 512), torch.bfloat16)
    assert resident() - before < 64 << 20
    tensor[1000, 1, 1] = 1.0
    assert float(tensor[1000, 1, 1]) == 1.0
