"""Flags come from the dataclass, one for one, and wrong values are refused by the name of the flag."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from moe_runtime import cli
from moe_runtime.config import EngineConfig
from moe_runtime.errors import ConfigError


def parse(*words: str) -> EngineConfig:
    parser = argparse.ArgumentParser(exit_on_error=False)
    cli.add_arguments(parser, EngineConfig)
    return cli.from_args(parser.parse_args(words), EngineConfig)


def test_no_flags_give_the_defaults() -> None:
    assert parse() == EngineConfig()


def test_every_field_is_a_flag_and_comes_back() -> None:
    config = EngineConfig(
        max_context=4096, max_batch_tokens=7, max_running=3, max_queue=2, block_size=32, cache_bytes=123,
        num_blocks=9, kv_dtype="int8", prefix_caching=False, device="auto", backend="reference", threads=2,
        quantize="experts=int4,lm_head=int8", quantize_group=32, quantize_zeros=True,
        max_quant_kl=0.1, quantize_statistics=Path("y"), device_bytes=5, require_placement=True,
        graphs=False, autotune_dir=Path("z"), packed_file=False, packed_dir=Path("x"), packed_verify=False,
    )  # fmt: skip
    words = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        assert value != field.default, "the test must move every field"
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            words += [f"--{flag}" if value else f"--no-{flag}"]
        else:
            words += [f"--{flag}", str(value)]
    assert parse(*words) == config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4096", 4096),
        ("2GiB", 2 << 30),
        ("1.5 gib", 3 << 29),
        ("500MB", 500_000_000),
        ("3k", 3000),
        ("1Ti", 1 << 40),
    ],
)
def test_sizes_may_have_a_suffix(text: str, value: int) -> None:
    assert parse("--cache-bytes", text).cache_bytes == value


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "2 XiB", "１GiB"])
def test_what_is_not_a_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        cli.parse_bytes(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--block-size", "12"), "--block-size 12: must be a power of two"),
        (("--max-queue", "0"), "--max-queue 0: must be at least 1"),
        (("--cache-bytes", "0"), "--cache-bytes 0"),
        (
            ("--quantize", "int5"),
            "--quantize 'int5': 'int5' is not one of none, int8, int4 for all, nor part",
        ),
        (("--quantize", "experts=int4,norms=int8"), "'norms=int8' is not .* a part of experts, attention"),
        (("--quantize", "experts=int4,experts=int8"), "experts is named twice"),
        (("--max-quant-kl", "0"), "--max-quant-kl 0.0: must be above 0"),
        (("--max-quant-kl", "nan"), "--max-quant-kl nan: must be above 0"),
        (("--quantize-group", "16"), "--quantize-group 16: must be 32, 64 or 128"),
        (("--device", "cuda", "--backend", "cpu"), "--device cuda with --backend cpu, which computes on"),
        (("--device", "cuda", "--backend", "reference"), "use --backend auto, or --device cpu"),
        (("--device", "cuda:1", "--backend", "cpu"), "--device cuda:1 with --backend cpu, which computes on"),
        (("--device", "cuda:x"), "--device 'cuda:x': must be auto, cpu, cuda, or cuda:N"),
        (("--device-bytes", "1GiB"), "--device-bytes with --device cpu: there is no GPU"),
        (("--autotune-dir", "x"), "--autotune-dir with --device cpu: there is no GPU to measure"),
    ],
)
def test_values_out_of_range_name_the_flag(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(*words)


def test_help_shows_every_default_in_readable_form() -> None:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser, EngineConfig)
    text = " ".join(parser.format_help().split())
    assert "for example 2GiB (default: 1GiB)" in text
    assert "--prefix-caching, --no-prefix-caching" in text
