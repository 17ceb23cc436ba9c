"""A mapped model takes the memory of the weights it uses: none at start, those of its experts when they are
chosen.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_packed_file import start
from world import tiny_checkpoint

from moe_runtime.config import EngineConfig

# 200 MB of experts in bfloat16; attention and head are small beside them.
BIG = {
    "hidden_size": 512, "moe_intermediate_size": 1024, "num_experts": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 2, "head_dim": 32, "torch_dtype": "bfloat16", "eos_token_id": None,
}  # fmt: skip

MEASURE = """
import re, sys
from pathlib import Path
import torch
from moe_runtime.config import EngineConfig
from moe_runtime.kernels import choose
from moe_runtime.loader import load_model
from moe_runtime.packed_store import PackedStore
from moe_runtime.quant.quality import log_probabilities
from moe_runtime.quant.recipe import Recipe

def start(folder, verify):
    recipe = Recipe.of(EngineConfig(quantize=sys.argv[3]))
    return load_model(folder, choose("cpu"), recipe, PackedStore(folder, recipe, None, verify))

def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

log_probabilities(start(Path(sys.argv[1]), True), [[1, 2]])  # whatever is allocated once, is now
before, file_before = kilobytes("VmRSS"), kilobytes("RssFile")
model = start(Path(sys.argv[2]), sys.argv[4] == "verify")
loaded = kilobytes("RssFile") - file_before
log_probabilities(model, [[1, 2]])
used = kilobytes("RssFile") - file_before
generator = torch.Generator().manual_seed(0)
log_probabilities(model, [torch.randint(272, (500,), generator=generator).tolist() for _ in range(8)])
print(loaded, used, kilobytes("VmRSS") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("verify", ["verify", "trust"])
@pytest.mark.parametrize("quantize", ["none", "int4"])
def test_experts_take_memory_when_they_are_chosen(tmp_path: Path, quantize: str, verify: str) -> None:
    small = tiny_checkpoint(tmp_path / "small", torch_dtype="bfloat16")
    big = tiny_checkpoint(tmp_path / "big", **BIG)
    config = EngineConfig(quantize=quantize)
    start(small, config)
    size = start(big, config)[1].path.stat().st_size
    output = subprocess.run(
        [sys.executable, "-c", MEASURE, str(small), str(big), quantize, verify],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    loaded, used, everything = (int(number) * 1024 / size for number in output.split())
    print(f"{quantize} {verify}: {size / 1e6:.0f} MB; mapped at start {loaded:.3f} of it, after two tokens")
    print(f"{used:.3f}, with all experts {everything:.3f}")
    assert loaded <= 0.03, "a start maps no experts, even if it has read them to check them"
    # Two tokens choose at most 4 of 32 experts per layer; with their neighbours on shared 2 MiB pages.
    assert used <= 0.7
    # All weights, and what 500 tokens take on the way.
    assert everything <= 1.10 + 40e6 / size
