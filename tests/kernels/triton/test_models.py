"""Whole tiny models on Triton's kernels against the reference backend, through the decoder and the engine."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from model_oracle import chunked_logits, greedy  # noqa: E402
from world import tiny_checkpoint  # noqa: E402

from moe_runtime.batch import Batch  # noqa: E402
from moe_runtime.config import EngineConfig  # noqa: E402
from moe_runtime.engine import Engine  # noqa: E402
from moe_runtime.kernels import OPS, Kernels, choose  # noqa: E402
from moe_runtime.loader import load_model  # noqa: E402
from moe_runtime.output import Completion  # noqa: E402
from moe_runtime.quant.recipe import Recipe  # noqa: E402
from moe_runtime.sampling import SamplingParams  # noqa: E402

# Of the largest logit, as in tests/models/test_parity.py: with float32 weights the only differences are the
# order of sums.
FLOAT_BOUND = 5e-6
# Integer weights are multiplied with activations rounded to bfloat16: 2 ** -9 each, in about ten products one
# after the other, which mostly cancel. In nats.
INTEGER_BOUND = 0.05
PROMPT_LENGTHS = (9, 5)
NUM_TOKENS = 3


def prompts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (length,), generator=generator) for length in PROMPT_LENGTHS]


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [("qwen3_moe", {"tie_word_embeddings": True, "attention_bias": True}), ("deepseek_v3", {})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_logits_equal_the_reference_over_chunks_and_mixed_batches(
    tmp_path: Path, device: torch.device, architecture: str, overrides: dict[str, bool]
) -> None:
    folder = tiny_checkpoint(tmp_path, architecture, **overrides)
    ours, reference = (
        load_model(folder, choose("triton", device=device)),
        load_model(folder, choose("reference")),
    )
    pairs = (chunked_logits(model, prompts(), chunk=8) for model in (ours, reference))
    for logits, expected in zip(*pairs, strict=True):
        error = float((logits.cpu() - expected).abs().max() / expected.abs().max())
        print(f"relative error {error:.1e}")
        assert error <= FLOAT_BOUND
    short = prompts()[1]
    assert greedy(ours, short, NUM_TOKENS) == greedy(reference, short, NUM_TOKENS)


def answers(folder: Path, backend: str, device: torch.device) -> list[Completion]:
    config = EngineConfig(
        device="cuda" if device.type == "cuda" else "cpu",
        backend="triton" if backend == "triton" else "reference",
        quantize="int4",
        quantize_group=32,
        num_blocks=8,
        packed_file=True,
    )
    engine = Engine.load(folder, config)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, logprobs=0, ignore_eos=True)
    return [completion for (completion,) in engine.generate([ids.tolist() for ids in prompts()], params)]


def test_the_engine_answers_from_int4_weights_as_the_reference_does(
    tmp_path: Path, device: torch.device
) -> None:
    folder = tiny_checkpoint(tmp_path, "qwen3_moe")
    ours = answers(folder, "triton", device)
    expected = answers(folder, "reference", torch.device("cpu"))
    assert [answer.token_ids for answer in ours] == [answer.token_ids for answer in expected]
    for answer, other in zip(ours, expected, strict=True):
        for mine, truth in zip(answer.logprobs or (), other.logprobs or (), strict=True):
            print(f"off by {abs(mine.logprob - truth.logprob):.1e} nats")
            assert abs(mine.logprob - truth.logprob) <= INTEGER_BOUND
    assert not (folder / ".moe_packed").exists(), "packed files are for the C++ kernels only"


# --- a device that is not the CPU, where there is none: torch's "meta" has shapes and no numbers ------------

ELSEWHERE = torch.device("meta")


def shaped(kernels: Kernels) -> Kernels:
    """The same packing; operations that give no more than the right shape, and refuse tensors of the CPU."""

    def attention(q: Any, keys: Any, values: Any, *_: Any, v_dim: int | None = None) -> Any:
        return q.new_empty(*q.shape[:2], v_dim or values.shape[-1])

    def route(logits: Any, spec: Any, _: Any) -> Any:
        ids = torch.empty(len(logits), spec.top_k, dtype=torch.int32, device=ELSEWHERE)
        return ids, logits.new_empty(ids.shape)

    results: dict[str, Callable[..., Any]] = {
        "linear": lambda x, packed, _: x.new_empty(len(x), packed.out_features),
        "linear_heads": lambda x, packed: x.new_empty(len(x), packed.heads, packed.out_features),
        "fused_moe": lambda x, ids, weights, experts: torch.empty_like(x),
        "rms_norm": lambda x, weight, eps: torch.empty_like(x),
        "add_rms_norm": lambda x, residual, weight, eps: (torch.empty_like(x), torch.empty_like(x)),
        "rope": lambda x, *_, **__: x,
        "write_cache": lambda *_: None,
        "attention": attention,
        "route": route,
    }

    def checked(operation: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            for argument in arguments:
                assert not isinstance(argument, torch.Tensor) or (
                    argument.is_meta and argument.is_contiguous()
                )
            return operation(*arguments, **named)

        return call

    return dataclasses.replace(kernels, **{name: checked(result) for name, result in results.items()})


def tensors_of(kept: Any) -> list[torch.Tensor]:
    if isinstance(kept, torch.Tensor):
        return [kept]
    fields = (getattr(kept, field.name) for field in dataclasses.fields(kept))
    return [
        tensor for part in fields if dataclasses.is_dataclass(part) for tensor in getattr(part, "parts", ())
    ]


@pytest.mark.parametrize(
    ("architecture", "overrides"),
    [
        ("qwen3_moe", {"tie_word_embeddings": True, "attention_bias": True}),
        ("qwen2_moe", {}),
        ("deepseek_v3", {}),
        ("glm4_moe", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("quantize", ["none", "int4", "int8"])
def test_all_that_a_model_keeps_or_makes_is_on_its_device(
    tmp_path: Path, architecture: str, overrides: dict[str, bool], quantize: str
) -> None:
    kernels = choose("triton", device=ELSEWHERE)
    assert all(getattr(kernels, name) is not row["cpu"] for name, row in OPS.items())
    recipe = Recipe.of(EngineConfig(quantize=quantize, quantize_group=32))
    model = load_model(tiny_checkpoint(tmp_path, architecture, **overrides), shaped(kernels), recipe)
    for slot in model.slots():
        for place in slot.places:
            kept = tensors_of(getattr(place.owner, place.attribute))
            assert kept and all(tensor.is_meta for tensor in kept), slot.name
    cache = model.new_cache(4, 8)
    assert cache.rotation.cos.is_meta and cache.program is None
    assert all(part is None or part.is_meta for layer in cache.layers for part in (layer.keys, layer.values))
    positions = torch.arange(5)
    rows, tables = torch.zeros(5, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    batch = Batch(positions, positions.int(), positions, rows, tables, positions[3:])
    logits = model.forward(batch, cache)
    assert logits.is_meta and logits.shape == (2, model.config.vocab_size)
