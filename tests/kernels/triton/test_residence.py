"""Experts that are not all on the device: places instead of ids, and two memories that compute together."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from kernels.triton.device_weights import (
    BF16,
    PLAIN,
    assert_within,
    moe_truth_and_bound,
    random_routing,
    random_weight,
    use_exact_dot,
)

pytest.importorskip("triton", reason="triton is not installed")

from model_oracle import chunked_logits  # noqa: E402
from world import tiny_checkpoint  # noqa: E402

from moe_runtime.absent_experts import AbsentExperts  # noqa: E402
from moe_runtime.config import EngineConfig  # noqa: E402
from moe_runtime.engine import Engine  # noqa: E402
from moe_runtime.errors import ConfigError, KernelError  # noqa: E402
from moe_runtime.expert_room import ExpertRoom  # noqa: E402
from moe_runtime.kernels import WeightFormat, choose  # noqa: E402
from moe_runtime.kernels.residence import ABSENT, ELSEWHERE, Residence  # noqa: E402
from moe_runtime.kernels.triton.fused_moe import fused_moe  # noqa: E402
from moe_runtime.kernels.triton.residence import expert_slots  # noqa: E402
from moe_runtime.layers.decoder import Decoder  # noqa: E402
from moe_runtime.layers.experts import ExpertWeights, TieredExperts, placed_experts  # noqa: E402
from moe_runtime.layers.host_link import HostLink  # noqa: E402
from moe_runtime.layers.norm import RmsNorm  # noqa: E402
from moe_runtime.loader import load_model  # noqa: E402
from moe_runtime.placement import LayerPlacement, Placement, Tier  # noqa: E402
from moe_runtime.plan import ExpertMask, LayerMask  # noqa: E402
from moe_runtime.sampling import SamplingParams  # noqa: E402

HIDDEN, INTERMEDIATE, EXPERTS = 64, 40, 6
MIXED: tuple[Tier, ...] = ("host", "device", "device", "host", "device", "host")


# --- places -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 5, 150])
def test_ids_become_places_and_absent_choices_are_counted(tokens: int, device: torch.device) -> None:
    slot_of = torch.tensor([2, ABSENT, 0, ELSEWHERE, 1], dtype=torch.int32)
    missed = torch.tensor([7, 40, 9], device=device)
    here = Residence(slot_of.to(device), 3, 0, missed[1:2])
    # -1 is a row that pads a batch; 5 and beyond exist nowhere.
    ids = torch.randint(
        -1, 7, (tokens, 3), generator=torch.Generator().manual_seed(tokens), dtype=torch.int32
    )
    slots = expert_slots(ids.to(device), here).cpu()
    known = (ids >= 0) & (ids < 5)
    expected = torch.where(known, slot_of[torch.where(known, ids, 0).long()], ABSENT)
    expected = torch.where(ids < 0, ELSEWHERE, expected)
    assert slots.dtype is torch.int32 and torch.equal(slots, expected)
    absent = int(((ids == 1) | (ids >= 5)).sum())
    assert missed.tolist() == [7, 40 + absent, 9]


def test_wrong_arguments_are_refused(device: torch.device) -> None:
    here = Residence(torch.zeros(4, dtype=torch.int32, device=device), 1, 0, torch.zeros(2, device=device))
    with pytest.raises(KernelError, match="expert_slots: missed"):
        expert_slots(torch.zeros(2, 2, dtype=torch.int32, device=device), here)
    with pytest.raises(KernelError, match="expert_slots: expert_ids"):
        expert_slots(torch.zeros(2, 2, dtype=torch.int64, device=device), here)


# --- one layer ----------------------------------------------------------------------------------------------


def layer(tiers: Sequence[Tier], form: WeightFormat, device: torch.device) -> ExpertWeights | TieredExperts:
    """The same experts, wherever they are."""
    missed = torch.zeros(1, dtype=torch.int64, device=device)
    host = (choose("auto"), HostLink(device))
    placed = LayerPlacement(0, tuple(tiers))
    made = placed_experts(choose("triton", device=device), HIDDEN, INTERMEDIATE, placed, missed, host)
    for expert in range(EXPERTS):
        for number, slot in enumerate(made.slots(expert, "experts", ("gate", "up", "down"))):
            assert slot.absent == (tiers[expert] == "absent")
            if not slot.absent:
                n, k = slot.shape
                slot.write(random_weight(n, k, form, 3 * expert + number))
    return made


def inputs(tokens: int, device: torch.device) -> torch.Tensor:
    """Exact in bfloat16, so that it does not matter who rounds them."""
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(tokens))
    return x.bfloat16().float().to(device)


@pytest.mark.parametrize(
    ("tiers", "form", "tokens"),
    [
        (MIXED, BF16, 33),
        (MIXED, PLAIN[0], 2),
        (("host",) * 6, BF16, 2),
        (("device",) * 5 + ("host",), PLAIN[0], 33),
    ],
)
def test_two_memories_are_within_the_bound_of_one(
    tiers: tuple[Tier, ...], form: WeightFormat, tokens: int, device: torch.device
) -> None:
    tiered, whole = layer(tiers, form, device), layer(("device",) * 6, form, device)
    assert isinstance(tiered, TieredExperts) and isinstance(whole, ExpertWeights)
    x, (ids, weights) = inputs(tokens, device), random_routing(tokens, EXPERTS, 2, device)
    truth, bound = moe_truth_and_bound(x, ids, weights, whole.packed)  # type: ignore[arg-type]
    assert_within(tiered(x, ids, weights), truth, bound)


def test_what_follows_a_mixture_follows_two_memories_too(device: torch.device) -> None:
    norm = RmsNorm(choose("triton", device=device), "norm", HIDDEN, 1e-6)
    norm.weight = torch.linspace(0.5, 1.5, HIDDEN, device=device)
    x, (ids, weights) = inputs(3, device), random_routing(3, EXPERTS, 2, device)
    added, residual = inputs(4, device)[1:], inputs(5, device)[2:]
    for tiers, extra in ((MIXED, added), (("host",) * 6, None), (("device",) * 5 + ("absent",), added)):
        experts = layer(tiers, PLAIN[0], device)
        mixed = experts(x, ids, weights) + (0 if extra is None else extra)
        expected = norm.add(mixed, residual.clone())
        got = experts.add_norm(x, ids, weights, extra, residual.clone(), norm)
        for one, other in zip(got, expected, strict=True):
            assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_a_token_has_the_same_bits_in_any_company(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    use_exact_dot(monkeypatch, device)
    experts = layer(MIXED, BF16, device)
    x, (ids, weights) = inputs(33, device), random_routing(33, EXPERTS, 3, device)
    together = experts(x, ids, weights)
    generator = torch.Generator().manual_seed(1)
    for size in (1, 9):
        rows = torch.randperm(33, generator=generator)[:size].to(device)
        assert torch.equal(experts(x[rows], ids[rows], weights[rows]), together[rows])


def test_absent_experts_add_nothing_and_others_keep_their_place(device: torch.device) -> None:
    tiers: tuple[Tier, ...] = ("device", "absent", "device", "host", "absent", "device")
    some, whole = layer(tiers, PLAIN[0], device), layer(("device",) * 6, PLAIN[0], device)
    assert some.residence is not None
    x, (ids, weights) = inputs(20, device), random_routing(20, EXPERTS, 2, device)
    absent = (ids == 1) | (ids == 4)
    truth, bound = moe_truth_and_bound(
        x,
        ids.masked_fill(absent, -1),
        weights,
        whole.packed,  # type: ignore[union-attr, arg-type]
    )
    assert_within(some(x, ids, weights), truth, bound)
    assert int(some.residence.missed) == int(absent.sum()) > 0
    before = int(some.residence.missed)
    some(x, ids.masked_fill(absent, 0), weights)
    assert int(some.residence.missed) == before


# --- whole models -------------------------------------------------------------------------------------------

# Of the largest logit, as in test_models.py: with float32 weights only the order of sums differs.
FLOAT_BOUND = 5e-6
PROMPTS = [torch.arange(60, 66), torch.arange(90, 93)]


def logits(model: Decoder) -> torch.Tensor:
    return torch.cat(chunked_logits(model, PROMPTS, chunk=7)).cpu()


def test_a_tiered_model_gives_the_reference_s_logits(tmp_path: Path, device: torch.device) -> None:
    folder, kernels = tiny_checkpoint(tmp_path, "deepseek_v3"), choose("triton", device=device)
    one = kernels.new_experts(1, 32, 16, torch.float32).num_bytes
    room = ExpertRoom(
        EngineConfig(backend="triton", device_bytes=4 * one - 1), None, {1: [1, 9, 1, 1, 5, 1, 1, 8]}
    )
    model = load_model(folder, kernels, room=room)
    ((number, mixture),) = model.mixtures()
    assert number == 1 and mixture.placed is not None and isinstance(mixture.experts, TieredExperts)
    assert mixture.placed.experts("device") == (1, 4, 7) and mixture.placed.count("host") == 5
    expected = logits(load_model(folder, choose("reference")))
    error = float((logits(model) - expected).abs().max() / expected.abs().max())
    print(f"relative error {error:.1e}")
    assert error <= FLOAT_BOUND


def load(folder: Path, device: torch.device, placement: Placement | None = None, **options: object) -> Engine:
    config = EngineConfig(device="cuda" if device.type == "cuda" else "cpu", backend="triton", num_blocks=8)
    return Engine.load(folder, dataclasses.replace(config, **options), placement=placement)  # type: ignore[arg-type]


def test_the_engine_tells_its_tiers_and_may_be_forbidden_to_have_any(
    tmp_path: Path, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_checkpoint(tmp_path)
    with caplog.at_level(logging.INFO, logger="moe_runtime"):
        engine = load(folder, device, device_bytes=0)
    assert "16 of 16 experts" in caplog.text and "--require-placement refuses this" in caplog.text
    assert [line.split()[0] for line in caplog.text.splitlines()[-2:]] == ["layers", "0"]
    assert caplog.text.splitlines()[-1].split()[:3] == ["0", "to", "1"]
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    asked = [PROMPTS[1].tolist()]
    reference = Engine.load(folder, EngineConfig(backend="reference", num_blocks=8))
    assert engine.generate(asked, params)[0][0].token_ids == reference.generate(asked, params)[0][0].token_ids
    with pytest.raises(
        ConfigError, match=r"--require-placement: 16 of 16 experts \(.*\) do not fit the 0.0 KB"
    ):
        load(folder, device, device_bytes=0, require_placement=True)


def test_a_choice_of_an_absent_expert_ends_the_step(tmp_path: Path, device: torch.device) -> None:
    folder = tiny_checkpoint(tmp_path)
    mask = ExpertMask(tuple(LayerMask(number, 8, (0, 2, 5, 7)) for number in range(2)))
    engine = load(folder, device, Placement.of(mask))
    engine.masks.add("credit", mask)
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    engine.add("allowed", PROMPTS[0].tolist(), params, scenario="credit")
    while engine.has_work():
        engine.step()
    assert AbsentExperts(engine.model).check_step() is None  # type: ignore[func-returns-value]
    # A mask that grows behind the table's back: what no code does, and what the count is for.
    for _, mixture in engine.model.mixtures():
        mixture.masks.fill_(1)
    engine.add("stray", PROMPTS[1].tolist(), params, scenario="credit")
    with pytest.raises(KernelError, match=r"layer \d: \d+ choices of experts that are not in memory"):
        engine.step()


def test_a_slot_that_is_elsewhere_adds_nothing_to_a_mixture(device: torch.device) -> None:
    whole = layer(("device",) * 6, PLAIN[0], device)
    x, (ids, weights) = inputs(4, device), random_routing(4, EXPERTS, 2, device)
    for missing in (ABSENT, ELSEWHERE):
        nothing = torch.full_like(ids, missing)
        assert not fused_moe(x, nothing, weights, whole.packed).any()  # type: ignore[union-attr, arg-type]
