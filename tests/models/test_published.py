"""Configs as published load and give models of the published sizes; no weights are needed, nor allocated."""

import json
import math
from pathlib import Path

import pytest

from moe_runtime.hf_config import Fields
from moe_runtime.kernels import choose
from moe_runtime.models import find_architecture, known_architectures

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_gives_a_model_of_the_published_size(name: str) -> None:
    values = PUBLISHED[name]["config"]
    architecture = find_architecture(values["model_type"], values.get("architectures"))
    config = architecture.read_config(Fields(values))
    model = architecture.build(config, choose("reference"))
    parameters = sum(math.prod(slot.shape) for slot in model.slots())
    assert parameters / 1e9 == pytest.approx(PUBLISHED[name]["billions"], rel=0.01)
    cached = PUBLISHED[name]["cached_numbers_per_layer"] * config.num_layers
    assert model.cache_bytes_per_block(16) == 16 * cached * 2, "two bytes each, as the weights are bfloat16"


def test_every_architecture_is_a_file_and_has_a_published_config() -> None:
    assert known_architectures() == [
        "bailing_moe_v2",
        "deepseek_v2",
        "deepseek_v3",
        "glm4_moe",
        "mixtral",
        "olmoe",
        "qwen2_moe",
        "qwen3_moe",
    ]
    published = {entry["config"]["model_type"] for entry in PUBLISHED.values()}
    assert published - {"bailing_moe"} | {"bailing_moe_v2"} == set(known_architectures())
