"""Whole tiny models on Triton's kernels against the reference backend, through the decoder and the engine."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from model_oracle import chunked_logits, greedy  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from world import tiny_checkpoint  # noqa: E402

from moe_runtime.batch import Batch, no_masks  # noqa: E402
from moe_runtime.config import EngineConfig  # noqa: E402
from moe_runtime.engine import Engine  # noqa: E402
from moe_runtime.kernels import OPS, RouteMeter, choose  # noqa: E402
from moe_runtime.kernels.triton.rope import _rope_kernel  # noqa: E402
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


def test_operations_are_fused_where_all_of_them_are_ours(device: torch.device) -> None:
    assert choose("triton", device=device).fused is not None
    assert choose("reference").fused is None
    if device.type == "cpu":
        assert choose("triton", {"attention": "reference"}).fused is None


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


@pytest.fixture
def no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' wrappers check and allocate, and nothing runs."""
    kind = type(_rope_kernel)
    monkeypatch.setattr(kind, "run", lambda *_, **__: None)


class OnOneDevice(TorchDispatchMode):
    """Refuses every operation that a tensor of the host takes part in. That a value is asked for, or sent to
    the host, a tensor of "meta" refuses by itself.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in tree_leaves((args, kwargs, result)):
            assert not isinstance(part, torch.Tensor) or part.is_meta, f"{func} with a tensor of the host"
        return result


@pytest.mark.parametrize(
    "ask", [torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy]
)
def test_a_tensor_without_numbers_refuses_to_be_asked(ask: str) -> None:
    number = torch.zeros(1, device=ELSEWHERE)
    with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
        getattr(number, ask)()
    with pytest.raises(AssertionError, match="host"), OnOneDevice():
        torch.zeros(1)


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
def test_all_that_a_model_keeps_or_makes_is_on_its_device_and_a_step_waits_for_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_launches: None,
    architecture: str,
    overrides: dict[str, bool],
    quantize: str,
) -> None:
    kernels = choose("triton", device=ELSEWHERE)
    assert all(getattr(kernels, name) is not row["cpu"] for name, row in OPS.items())
    recipe = Recipe.of(EngineConfig(quantize=quantize, quantize_group=32))
    model = load_model(tiny_checkpoint(tmp_path, architecture, **overrides), kernels, recipe)
    for slot in model.slots():
        for place in slot.places:
            kept = tensors_of(getattr(place.owner, place.attribute))
            assert kept and all(tensor.is_meta for tensor in kept), slot.name
    cache = model.new_cache(4, 8)
    assert cache.rotation.cos.is_meta and cache.program is None
    assert all(part is None or part.is_meta for layer in cache.layers for part in (layer.keys, layer.values))
    positions = torch.arange(5)
    rows, tables = torch.zeros(5, dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    batch = Batch(
        positions, positions.int(), positions, rows, tables, positions[3:], no_masks(len(positions))
    )
    assert model.forward(batch, cache).is_meta
    meter = RouteMeter.zeros(5, ELSEWHERE)
    monkeypatch.setattr(Batch, "to", lambda self, device: self)
    for each, metered in ((batch, meter), (batch, None), (Batch.of_nobody(3, 2), None)):
        there = each.on(each.staged(pinned=False).to(ELSEWHERE))
        with OnOneDevice():
            logits = model.forward(there, cache, metered)
        assert logits.shape == (len(each.logit_rows), model.config.vocab_size)
