"""What stands in for experts on a GPU: the choices of the reference, and its sums with constants in them."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from kernels.oracle import EPS, SAFETY, assert_within  # noqa: E402
from kernels.test_recovery import PLAIN, random_recovery  # noqa: E402
from kernels.triton.device_weights import BF16, random_routing  # noqa: E402
from kernels.triton.test_decode_graphs import Replayed  # noqa: E402
from kernels.triton.test_residence import EXPERTS, HIDDEN, MIXED, inputs, layer  # noqa: E402
from kernels.triton.test_router import FAMILIES, random_masks, wild_logits  # noqa: E402
from model_oracle import Paged  # noqa: E402
from test_recovery import made  # noqa: E402
from world import tiny_checkpoint  # noqa: E402

from moe_runtime.batch import Batch  # noqa: E402
from moe_runtime.errors import KernelError  # noqa: E402
from moe_runtime.kernels import RouteMeter, RouterSpec, choose, reference  # noqa: E402
from moe_runtime.kernels.packed import NOBODY  # noqa: E402
from moe_runtime.kernels.residence import ABSENT, ELSEWHERE, Residence  # noqa: E402
from moe_runtime.kernels.route_recovery import RouteRecovery  # noqa: E402
from moe_runtime.kernels.triton import router  # noqa: E402
from moe_runtime.kernels.triton.residence import expert_slots  # noqa: E402
from moe_runtime.layers.decoder import Decoder  # noqa: E402
from moe_runtime.loader import load_model  # noqa: E402
from moe_runtime.masks import MaskTable  # noqa: E402
from moe_runtime.plan import ExpertMask, LayerMask  # noqa: E402

TOKENS = 96


@pytest.fixture
def wide(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The interpreter takes as long for 64 tokens in one program as for one."""
    if device.type == "cpu":
        monkeypatch.setattr(router, "rows_per_program", lambda padded: 64)
    return device


def moved(recovery: RouteRecovery, device: torch.device) -> RouteRecovery:
    return RouteRecovery(recovery.offsets.to(device), recovery.stand_ins.to(device))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_choices_and_the_meter_are_those_of_the_reference(
    wide: torch.device, family: str, with_bias: bool
) -> None:
    num_experts, spec = FAMILIES[family]
    logits = wild_logits(TOKENS, num_experts)
    generator = torch.Generator().manual_seed(1)
    bias = 0.05 * torch.randn(num_experts, generator=generator) if with_bias else None
    masks = random_masks(6, num_experts, spec.top_k)
    recovery = random_recovery(masks, 2)
    rows = (torch.arange(TOKENS) % 7 - 1).int()
    rows[5] = NOBODY  # pads a batch: neither offsets nor constants
    meters = RouteMeter.zeros(TOKENS, wide), RouteMeter.zeros(TOKENS, logits.device)
    on_device = None if bias is None else bias.to(wide)
    tables = masks.to(wide), rows.to(wide)
    ids, weights = router.route(logits.to(wide), spec, on_device, *tables, meters[0], moved(recovery, wide))
    known = rows != NOBODY
    expected_ids, expected_weights = reference.route(
        logits, spec, bias, masks, rows.clamp(min=-1), meters[1], recovery
    )
    assert torch.equal(ids.cpu()[known], expected_ids[known]) and bool((ids[5] == -1).all())
    torch.testing.assert_close(weights.cpu()[known], expected_weights[known], rtol=1e-6, atol=0)
    assert meters[0].lost is not None and meters[1].lost is not None and meters[0].outside.item() == 0
    torch.testing.assert_close(meters[0].lost.cpu()[known], meters[1].lost[known], rtol=0, atol=2e-6)

    plain_ids, plain_weights = router.route(logits.to(wide), spec, on_device, *tables)
    without = known & ((rows < 0) | (rows % 3 == PLAIN))
    assert torch.equal(ids.cpu()[without], plain_ids.cpu()[without])
    assert torch.equal(weights.cpu()[without], plain_weights.cpu()[without])


def test_from_hidden_states_a_token_chooses_the_same_alone_and_in_company(device: torch.device) -> None:
    num_experts, spec = FAMILIES["deepseek_v3"]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(18, 64, generator=generator).to(device)
    weight = torch.randn(num_experts, 64, generator=generator).to(device)
    masks = random_masks(3, num_experts, 20)
    recovery = moved(random_recovery(masks, 3), device)
    masks, rows = masks.to(device), (torch.arange(18) % 3).int().to(device)
    meter = RouteMeter.zeros(18, device)
    ids, weights, counts = router.route_tokens(
        x, weight, spec, None, masks, rows, True, meter=meter, recovery=recovery
    )
    expected, _ = reference.route((x @ weight.T).cpu(), spec, None, masks.cpu(), rows.cpu(), None, moved(
        recovery, torch.device("cpu")
    ))  # fmt: skip
    assert torch.equal(ids.cpu(), expected) and bool((ids >= num_experts).any()) and meter.outside.item() == 0
    chosen = ids.flatten()[ids.flatten() < num_experts].long()
    assert counts is not None and torch.equal(
        counts.cpu().long(), chosen.cpu().bincount(minlength=num_experts)
    )
    for token in (0, 1, 17):
        one = slice(token, token + 1)
        alone = router.route_tokens(x[one], weight, spec, None, masks, rows[one], recovery=recovery)
        assert torch.equal(alone[0], ids[one]) and torch.equal(alone[1], weights[one])


def test_constants_follow_the_places_of_the_experts_that_are_here(device: torch.device) -> None:
    slot_of = torch.tensor([2, ABSENT, 0, ELSEWHERE, 1], dtype=torch.int32, device=device)
    here = Residence(slot_of, 3, 0, torch.zeros(1, dtype=torch.int64, device=device))
    ids = torch.tensor([[0, 5, 3], [8, -1, 9]], dtype=torch.int32, device=device)
    assert expert_slots(ids, here, 4).tolist() == [[2, 3, ELSEWHERE], [6, ELSEWHERE, ABSENT]]
    assert here.missed.item() == 1


@pytest.mark.parametrize("tiers", [MIXED, ("host",) * 6], ids=["mixed", "host"])
def test_two_memories_add_a_constant_once(tiers: tuple[str, ...], device: torch.device) -> None:
    tokens, constants = 9, torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(5)).to(device)
    x = inputs(tokens, device)
    ids, weights = random_routing(tokens, EXPERTS + len(constants), 3, device)
    is_expert = ids < EXPERTS
    split = layer(tiers, BF16, device)  # type: ignore[arg-type]
    got = split(x, ids, weights, constants)
    experts = split(x, torch.where(is_expert, ids, 0), torch.where(is_expert, weights, 0.0))
    numbers = torch.where(is_expert, 0, ids - EXPERTS).long()
    added = torch.where(is_expert, 0.0, weights)[..., None].double() * constants[numbers].double()
    magnitude = added.abs().sum(1) + experts.abs().double()
    bound = SAFETY * (ids.shape[1] + 1) * EPS * magnitude
    assert_within(got.cpu(), (experts.double() + added.sum(1)).cpu(), bound.cpu())
    assert bool((~is_expert).any())


MASK = ExpertMask((LayerMask(0, 8, (0, 2, 5)), LayerMask(1, 8, (1, 2, 7))))


def add_both(model: Decoder) -> None:
    """Constants in the first row of its masks, offsets in the second."""
    table = MaskTable(model)
    table.add("constants", MASK, recovery=made(MASK, "constants"))
    table.add("router", MASK, recovery=made(MASK, "router"))


def test_captured_steps_are_made_anew_when_tables_move(tmp_path: Path, device: torch.device) -> None:
    """And before as after they are bit for bit the steps that are launched kernel by kernel (Replayed)."""
    model = load_model(tiny_checkpoint(tmp_path, num_key_value_heads=1), choose("triton", device=device))
    replayed = Replayed(model, metered=True)
    paged = Paged(replayed, 3, 12)  # type: ignore[arg-type]
    replays, logits = [], []
    for change in (lambda: None, lambda: add_both(model)):
        change()
        torch.manual_seed(7)
        paged.lengths = [1, 2, 3]
        logits += paged.forward({row: torch.randint(0, 256, (1,)) for row in range(3)}).values()
        replays += replayed.graphs._replays.values()
    assert len(replays) == 2 and replays[0] is not replays[1]
    assert [torch.equal(*pair) for pair in zip(logits[:3], logits[3:], strict=True)] == [False, False, True]


def test_a_model_makes_up_as_the_reference_does(tmp_path: Path, device: torch.device) -> None:
    folder, tokens, logits = tiny_checkpoint(tmp_path), 7, []
    for backend, where in (("triton", device), ("reference", torch.device("cpu"))):
        model = load_model(folder, choose(backend, device=where))
        add_both(model)
        rows = torch.zeros(tokens, dtype=torch.int32)
        batch = Batch(
            torch.arange(tokens) + 40, torch.arange(tokens).int(), torch.arange(tokens), rows,
            torch.zeros(1, 1, dtype=torch.int32), torch.arange(tokens), torch.arange(tokens).int() % 3 - 1,
        )  # fmt: skip
        logits.append(model.forward(batch, model.new_cache(1, 16)).cpu())
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_wrong_tables_are_refused(device: torch.device) -> None:
    logits, rows = torch.zeros(2, 8, device=device), torch.zeros(2, dtype=torch.int32, device=device)
    masks = torch.ones(2, 8, dtype=torch.uint8, device=device)
    good = moved(random_recovery(torch.zeros(2, 8, dtype=torch.uint8), 0), device)
    with pytest.raises(KernelError, match="route: recovery"):
        router.route(logits, RouterSpec(1), recovery=good)
    wrong = RouteRecovery(good.offsets, good.stand_ins[:1])
    with pytest.raises(KernelError, match="route: stand_ins"):
        router.route(logits, RouterSpec(1), None, masks, rows, recovery=wrong)
