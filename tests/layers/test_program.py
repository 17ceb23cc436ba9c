"""The C++ step is the Python layers, bit for bit; it fails cleanly and shares a process with others."""

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from model_oracle import Paged, load
from world import ARCHITECTURES, tiny_checkpoint

import moe_runtime._C as _C
from moe_runtime.batch import Batch
from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine
from moe_runtime.errors import KernelError
from moe_runtime.kernels import RouteMeter, choose
from moe_runtime.layers.cache import Cache
from moe_runtime.layers.decoder import Decoder
from moe_runtime.layers.moe import MAX_MASKS
from moe_runtime.loader import load_model
from moe_runtime.sampling import SamplingParams
from moe_runtime.tokenizer import Tokenizer

# And what the architectures' tiny configs leave out: clips, biases, tied heads, plain queries, fp16 tables.
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in ARCHITECTURES} | {
    "qwen3_moe bf16 bias tied": (
        "qwen3_moe", {"torch_dtype": "bfloat16", "attention_bias": True, "tie_word_embeddings": True},
    ),
    "qwen3_moe fp16 dense layer": ("qwen3_moe", {"torch_dtype": "float16", "mlp_only_layers": [1]}),
    "olmoe clip": ("olmoe", {"clip_qkv": 0.5, "num_key_value_heads": 4}),
    "glm4_moe bf16 no norm": ("glm4_moe", {"torch_dtype": "bfloat16", "use_qk_norm": False}),
    "deepseek_v2 plain queries": ("deepseek_v2", {"q_lora_rank": None, "attention_bias": True}),
    "deepseek_v3 bf16": ("deepseek_v3", {"torch_dtype": "bfloat16"}),
}  # fmt: skip

# Tokens for each of three sequences, and whose logits are wanted: "all", "last" of each, or "none".
STEPS = (
    ({0: 90, 1: 7}, "last"), ({0: 1, 1: 30, 2: 100}, "none"), ({0: 1, 1: 1, 2: 1}, "all"), ({2: 1}, "all"),
    ({1: 60, 2: 1}, "all"), ({0: 1, 1: 1, 2: 1}, "last"),
)  # fmt: skip
LENGTH = 128


@pytest.fixture
def threads() -> Iterator[None]:
    yield
    _C.set_num_threads(0)


def steps(model: Decoder) -> list[Batch]:
    """STEPS as batches of random tokens, over caches of ``new_cache``."""
    paged = Paged(model, 3, LENGTH)
    generator = torch.Generator().manual_seed(3)
    batches: list[Batch] = []

    def record(batch: Batch, _: Cache) -> torch.Tensor:
        masks = torch.randint(-1, MAX_MASKS, (len(batch.token_ids),), generator=generator)
        batches.append(dataclasses.replace(batch, mask_rows=masks.int()))
        return torch.zeros(len(batch.logit_rows), 1)

    paged.model = type("Recorder", (), {"forward": staticmethod(record)})()  # type: ignore[assignment]
    for chunks, wanted in STEPS:
        ids = {row: torch.randint(0, 272, (count,), generator=generator) for row, count in chunks.items()}
        paged.forward(ids, last_only=wanted == "last")
        if wanted == "none":
            batches[-1] = dataclasses.replace(batches[-1], logit_rows=torch.zeros(0, dtype=torch.int64))
    return batches


def write_masks(model: Decoder) -> None:
    """Half of the experts or more in every row of the mask table."""
    generator = torch.Generator().manual_seed(4)
    for _, mixture in model.mixtures():
        num_experts = mixture.config.num_experts
        for row in mixture.masks:
            row.zero_()[torch.randperm(num_experts, generator=generator)[: num_experts // 2 + 1]] = 1


def new_cache(model: Decoder, in_python: bool = False, kv_dtype: str = "auto") -> Cache:
    cache = model.new_cache(3 * LENGTH // 8, 8, kv_dtype)
    assert cache.program is not None
    return dataclasses.replace(cache, program=None) if in_python else cache


def run(model: Decoder, batches: list[Batch], cache: Cache) -> list[torch.Tensor]:
    """Logits of each step, what its masks did, then the contents of the cache."""
    meters = [RouteMeter.zeros(len(batch.token_ids), model.device) for batch in batches]
    logits = [model.forward(batch, cache, meter) for batch, meter in zip(batches, meters, strict=True)]
    logits += [part for meter in meters for part in (meter.lost, meter.outside) if part is not None]
    parts = [part for layer in cache.layers for part in (layer.keys, layer.values) if part is not None]
    return logits + parts


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.usefixtures("isa", "threads")
@pytest.mark.parametrize("case", CASES)
def test_the_program_and_the_python_layers_agree_to_the_last_bit(tmp_path: Path, case: str) -> None:
    architecture, overrides = CASES[case]
    model = load(tiny_checkpoint(tmp_path, architecture, **overrides), "cpu")
    write_masks(model)
    batches = steps(model)
    expected = run(model, batches, new_cache(model, in_python=True))
    assert [len(logits) for logits in expected[: len(batches)]] == [2, 0, 3, 1, 61, 3]
    for count in (1, 2, 3):
        _C.set_num_threads(count)
        assert same(run(model, batches, new_cache(model)), expected), f"{count} threads"


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_they_agree_over_an_int8_cache(tmp_path: Path, isa: str, architecture: str) -> None:
    model = load(tiny_checkpoint(tmp_path, architecture), "cpu")
    batches = steps(model)
    in_python, program = (run(model, batches, new_cache(model, flag, "int8")) for flag in (True, False))
    assert same(in_python, program)


def test_an_overridden_operation_or_the_reference_backend_means_no_program(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    for kernels in (choose("reference"), choose("cpu", {"rope": "reference"})):
        assert load_model(folder, kernels).new_cache(2, 8).program is None


def changed(**values: Any) -> Callable[[Batch], Batch]:
    return lambda batch: dataclasses.replace(batch, **values)


def put(name: str, index: Any, value: int) -> Callable[[Batch], Batch]:
    def change(batch: Batch) -> Batch:
        tensor = getattr(batch, name).clone()
        tensor[index] = value
        return dataclasses.replace(batch, **{name: tensor})

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("token_ids", 3, 272), r"step: token_ids\[3\] = 272, expected 0 <= id < 272"),
        (put("token_ids", 0, -1), r"step: token_ids\[0\] = -1"),
        (put("positions", 5, 1 << 20), r"rope: positions\[5\] = 1048576"),
        (put("positions", 5, -1), r"rope: positions\[5\] = -1"),
        (put("slots", 96, 1 << 40), r"write_cache: slots\[96\]"),
        (put("sequence_rows", 96, 2), r"attention: sequence_rows\[96\] = 2"),
        (put("block_tables", (0, 0), -1), r"attention: block_tables\[0\]\[0\] = -1"),
        (put("mask_rows", 2, 64), r"route: mask_rows\[2\] = 64, expected -1 <= row < 64"),
        (put("logit_rows", 1, 97), r"step: logit_rows\[1\] = 97, expected ascending rows below 97"),
        (put("logit_rows", 1, 0), r"step: logit_rows\[1\] = 0"),
        (changed(logit_rows=torch.tensor([-1])), r"step: logit_rows\[0\] = -1"),
        (changed(token_ids=torch.zeros(0, dtype=torch.int64)), "step: positions is"),
        (changed(slots=torch.zeros(97, dtype=torch.int32)), "step: slots is torch.int32"),
        (changed(positions=torch.zeros(194, dtype=torch.int32)[::2]), "step: positions is on cpu with"),
    ],
)  # fmt: skip
def test_a_wrong_batch_is_refused_by_name_and_the_next_step_is_right(
    tmp_path: Path, change: Callable[[Batch], Batch], message: str
) -> None:
    model = load(tiny_checkpoint(tmp_path), "cpu")
    batches, cache = steps(model), new_cache(model)
    with pytest.raises(KernelError, match=message):
        model.forward(change(batches[0]), cache)
    assert same(run(model, batches, cache)[:6], run(model, batches, new_cache(model, in_python=True))[:6])


def test_a_batch_without_tokens_is_refused(tmp_path: Path) -> None:
    model = load(tiny_checkpoint(tmp_path), "cpu")
    batch = steps(model)[0]
    empty = Batch(*(getattr(batch, field.name)[:0] for field in dataclasses.fields(Batch)))
    with pytest.raises(KernelError, match="the batch has no tokens"):
        model.forward(empty, new_cache(model))


@pytest.mark.parametrize(
    ("architecture", "part", "value", "message"),
    [
        ("qwen3_moe", "mlp_norm.weight", lambda _: torch.ones(31), "layer 1: mlp_norm is 31, expected 32"),
        ("qwen3_moe", "attention.key_norm.weight", lambda _: torch.ones(8), "layer 1: key_norm is 8"),
        ("qwen3_moe", "attention.output", lambda block: block.mlp.router, "layer 1: inputs.n is 128"),
        ("qwen3_moe", "mlp.router", lambda block: block.attention.inputs, "layer 1: router.n is 128"),
        ("deepseek_v3", "attention.absorb", lambda block: block.attention.expand, "layer 1: absorb.n is 12"),
        ("deepseek_v3", "mlp.selection_bias", lambda _: torch.ones(7), "selection_bias is torch.float32"),
    ],
)
def test_parts_that_do_not_fit_are_refused_when_the_program_is_built(
    tmp_path: Path, architecture: str, part: str, value: Callable[[Any], Any], message: str
) -> None:
    model = load(tiny_checkpoint(tmp_path, architecture), "cpu")
    block = model.blocks[1]
    *path, name = part.split(".")
    object.__setattr__(reduce(getattr, path, block), name, value(block))
    with pytest.raises(KernelError, match=message):
        model.new_cache(2, 8)


def test_two_threads_on_one_cache_are_refused_or_right(tmp_path: Path) -> None:
    model = load(tiny_checkpoint(tmp_path), "cpu")
    batch, cache = steps(model)[0], new_cache(model)
    expected = model.forward(batch, cache)

    def work(_: int) -> int:
        answers = 0
        for _ in range(100):
            try:
                logits = model.forward(batch, cache)
            except KernelError as error:
                assert "another thread is running a step over the same cache" in str(error)
            else:
                assert torch.equal(logits, expected)
                answers += 1
        return answers

    with ThreadPoolExecutor(2) as executor:
        assert sum(executor.map(work, range(2))) > 0


def test_two_engines_of_one_model_on_two_threads(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "deepseek_v3")
    model, tokenizer = load_model(folder, choose("cpu")), Tokenizer.load(folder)
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(0, 256, (size,), generator=generator).tolist() for size in (60, 5, 33, 90)]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=2)

    def answer(_: int) -> list[Any]:
        engine = Engine(model, tokenizer, EngineConfig(max_context=128, max_batch_tokens=48))
        return [list(map(dataclasses.asdict, choices)) for choices in engine.generate(prompts, params)]

    expected = answer(0)
    with ThreadPoolExecutor(2) as executor:
        assert all(result == expected for result in executor.map(answer, range(4)))
