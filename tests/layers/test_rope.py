"""Rotary frequencies and table scales against transformers, over random settings of each kind of scaling."""

import random
from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig

from moe_runtime.hf_config import Fields
from moe_runtime.hf_rope import read_rope
from moe_runtime.layers.rope import build_rotation, frequencies

CONTEXT = 4096


def settings(kind: str, random_source: random.Random) -> dict[str, Any]:
    """A random rope_parameters of the kind, optional keys included or not."""
    values: dict[str, Any] = {
        "rope_type": kind,
        "rope_theta": random_source.choice([1e4, 6e5, 1e6, 1e7]),
        "factor": random_source.choice([1.0, 1.5, 4.0, 40.0]),
        "partial_rotary_factor": random_source.choice([0.25, 0.5, 1.0]),
    }
    if kind == "llama3":
        values |= {"low_freq_factor": random_source.choice([1.0, 2.0]), "high_freq_factor": 4.0}
        values["original_max_position_embeddings"] = random_source.choice([64, 1024, 8192])
    if kind == "yarn":
        values["original_max_position_embeddings"] = random_source.choice([64, 1024, 4096])
        options = {
            "beta_fast": [8, 32, 64.0], "beta_slow": [1, 2.0], "truncate": [True, False],
            "mscale": [0.707, 1.0], "mscale_all_dim": [0.5, 1.0], "attention_factor": [0.9, 1.3],
        }  # fmt: skip
        for key, choices in options.items():
            if random_source.random() < 0.5:
                values[key] = random_source.choice(choices)
    return values


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn"])
@pytest.mark.parametrize("seed", range(25))
def test_scaled_frequencies_equal_transformers(kind: str, seed: int) -> None:
    values = settings(kind, random.Random(seed))
    head_dim = random.Random(seed).choice([16, 64, 128])
    config = Glm4MoeConfig(head_dim=head_dim, max_position_embeddings=CONTEXT, rope_parameters=dict(values))
    expected, scale = ROPE_INIT_FUNCTIONS[kind](config)
    fields = Fields({"max_position_embeddings": CONTEXT, "rope_parameters": values})
    rope = read_rope(fields, head_dim, rotary_fraction=1.0)
    torch.testing.assert_close(frequencies(rope), expected, rtol=1e-6, atol=0.0)
    assert rope.table_scale == pytest.approx(scale, rel=1e-12)


def test_plain_frequencies_follow_the_definition() -> None:
    rope = read_rope(Fields({"rope_theta": 500000.0}), 8)
    assert frequencies(rope).tolist() == pytest.approx([500000.0 ** (-i / 4) for i in range(4)], rel=1e-6)


def test_tables_hold_cosine_and_sine_of_every_position() -> None:
    rotation = build_rotation(read_rope(Fields({}), 4), 3)
    angles = torch.tensor([[0.0, 0.0], [1.0, 0.01], [2.0, 0.02]])
    torch.testing.assert_close(rotation.cos, angles.cos())
    torch.testing.assert_close(rotation.sin, angles.sin())
