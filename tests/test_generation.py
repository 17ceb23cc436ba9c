"""One choice of one request, step by step."""

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_model import byte_tokenizer
from world import VOCAB_SIZE

from moe_runtime.generation import Generation
from moe_runtime.sampling import SamplingParams
from moe_runtime.scheduler import Chunk
from moe_runtime.sequence import Sequence

LONG = 200_000


@pytest.mark.parametrize(
    "given", [{}, {"presence_penalty": 1.0, "frequency_penalty": 0.5}, {"repetition_penalty": 1.1}]
)
def test_a_token_costs_no_copy_of_the_prompt(tmp_path: Path, given: dict[str, Any]) -> None:
    sequence = Sequence(0, [5, 6] * (LONG // 2), LONG + 100)
    params = SamplingParams(temperature=0.0, ignore_eos=True, **given)
    generation = Generation("r", 0, sequence, params, 0, byte_tokenizer(tmp_path), ())
    logits = np.zeros((1, VOCAB_SIZE), dtype=np.float32)
    peak = 0
    for _ in range(4):
        tracemalloc.start()
        end = sequence.num_total
        chunk = Chunk(0, end - 1, (sequence.token_ids[-1],), (), logit_start=end - 1, samples=True)
        sampled = generation.look(chunk, logits)
        assert sampled is not None and sampled.token_id is not None
        generation.advance(sampled)
        peak = max(peak, tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sequence.token_ids.append(sampled.token_id)
    assert peak < LONG  # bytes: an eighth of what one copy of the prompt's list would take
