"""The Triton router: bit for bit the choices of the reference and of the C++ router, never outside a mask."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from kernels.oracle import EPS, SAFETY, assert_within  # noqa: E402

from moe_runtime.errors import KernelError  # noqa: E402
from moe_runtime.kernels import RouteMeter, RouterSpec, cpu, reference  # noqa: E402
from moe_runtime.kernels.packed import NOBODY  # noqa: E402
from moe_runtime.kernels.triton import router  # noqa: E402

FAMILIES = {
    "qwen3": (64, RouterSpec(8, norm_topk_prob=True)),
    "olmoe": (64, RouterSpec(8)),
    "softmax_after": (24, RouterSpec(4, softmax_after_topk=True)),
    "deepseek_v2": (40, RouterSpec(6, num_groups=8, topk_groups=3, routed_scaling=16.0)),
    "deepseek_v3": (64, RouterSpec(8, "sigmoid", True, 8, 4, "top2_sum", 2.5, False, 1e-20)),
    "softmax_top2": (36, RouterSpec(5, num_groups=6, topk_groups=2, group_score="top2_sum")),
    "groups_of_one": (6, RouterSpec(3, "sigmoid", True, 6, 4, "top2_sum")),
    "all": (33, RouterSpec(33, "sigmoid", norm_topk_prob=True)),
    "one_of_one": (1, RouterSpec(1, "sigmoid")),
}
ROUTE = pytest.mark.parametrize("family", FAMILIES)
SPECIAL = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1e-45, 3.4e38, -3.4e38, 100.0, -709.79])


def wild_logits(tokens: int, num_experts: int, seed: int = 0) -> torch.Tensor:
    """Plain rows, rows full of ties, rows with special values, rows of nothing but NaN or one number."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, num_experts, generator=generator) * 4
    logits[1::4] = logits[1::4].round()
    special = SPECIAL[torch.randint(len(SPECIAL), logits.shape, generator=generator)]
    some = torch.rand(logits.shape, generator=generator) < 0.4
    logits[2::4] = torch.where(some, special, logits)[2::4]
    logits[3::16], logits[7::16], logits[11::16] = torch.nan, -torch.inf, 1.5
    return logits


def random_masks(count: int, num_experts: int, least: int, seed: int = 0) -> torch.Tensor:
    """Bytes [count, E]: from exactly ``least`` allowed experts to all of them."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(count, num_experts, generator=generator).argsort(-1)
    allowed = torch.linspace(least, num_experts, count).round().long()
    return (order < allowed[:, None]).byte()


@pytest.fixture
def wide(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The interpreter takes as long for 64 tokens in one program as for one."""
    if device.type == "cpu":
        monkeypatch.setattr(router, "rows_per_program", lambda padded: 64)
    return device


def assert_distinct(ids: torch.Tensor, num_experts: int) -> None:
    ordered = ids.sort(-1).values
    assert ids.min() >= 0 and ids.max() < num_experts
    assert torch.all(ordered[:, 1:] != ordered[:, :-1])


@ROUTE
@pytest.mark.parametrize("with_bias", [False, True])
def test_choices_are_those_of_the_reference_and_of_the_cpu(
    wide: torch.device, family: str, with_bias: bool
) -> None:
    num_experts, spec = FAMILIES[family]
    logits = wild_logits(256, num_experts)
    bias = torch.randn(num_experts, generator=torch.Generator().manual_seed(1)) if with_bias else None
    ids, weights = router.route(logits.to(wide), spec, None if bias is None else bias.to(wide))
    expected_ids, expected_weights = reference.route(logits, spec, bias)
    assert ids.dtype is torch.int32 and weights.dtype is torch.float32
    assert torch.equal(ids.cpu(), expected_ids)
    assert torch.equal(ids.cpu(), cpu.route(logits, spec, bias)[0])
    assert_distinct(ids, num_experts)
    torch.testing.assert_close(weights.cpu(), expected_weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize("special", [torch.nan, torch.inf, 3.4e38, -3.4e38])
def test_a_wild_bias_chooses_as_the_reference_does(wide: torch.device, special: float) -> None:
    num_experts, spec = FAMILIES["deepseek_v3"]
    logits, bias = wild_logits(64, num_experts), torch.randn(num_experts)
    bias[::5] = special
    ids, weights = router.route(logits.to(wide), spec, bias.to(wide))
    expected_ids, expected_weights = reference.route(logits, spec, bias)
    assert torch.equal(ids.cpu(), expected_ids)
    torch.testing.assert_close(weights.cpu(), expected_weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tokens", [0, 1, 5])
@pytest.mark.parametrize("num_experts", [8, 40, 128])
def test_any_number_of_tokens_and_a_row_is_the_same_alone(
    device: torch.device, tokens: int, num_experts: int
) -> None:
    logits, spec = wild_logits(tokens, num_experts), RouterSpec(4, norm_topk_prob=True)
    ids, weights = router.route(logits.to(device), spec)
    assert ids.shape == weights.shape == (tokens, 4)
    assert torch.equal(ids.cpu(), reference.route(logits, spec)[0])
    if tokens:
        alone = router.route(logits[-1:].to(device), spec)
        assert torch.equal(alone[0], ids[-1:]) and torch.equal(alone[1], weights[-1:])


# --- masks --------------------------------------------------------------------------------------------------


@ROUTE
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_a_mask_is_never_left_whatever_the_logits(
    wide: torch.device, family: str, dtype: torch.dtype
) -> None:
    num_experts, spec = FAMILIES[family]
    logits = wild_logits(256, num_experts)
    bias = torch.randn(num_experts) if spec.scoring == "sigmoid" else None
    masks = random_masks(9, num_experts, spec.top_k).to(dtype)
    mask_rows = torch.randint(-1, 9, (256,), dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    given = (None if bias is None else bias.to(wide), masks.to(wide), mask_rows.to(wide))
    ids, weights = (result.cpu() for result in router.route(logits.to(wide), spec, *given))
    expected_ids, expected_weights = reference.route(logits, spec, bias, masks, mask_rows)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=0)
    fenced = mask_rows >= 0
    assert torch.all(masks[mask_rows[fenced].long()].gather(1, ids[fenced].long()) != 0)
    assert_distinct(ids, num_experts)
    plain_ids, plain_weights = reference.route(logits, spec, bias)
    assert torch.equal(ids[~fenced], plain_ids[~fenced])
    torch.testing.assert_close(weights[~fenced], plain_weights[~fenced], rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "spec", [RouterSpec(3, norm_topk_prob=True), RouterSpec(3), RouterSpec(3, "sigmoid")]
)
def test_a_masked_router_is_the_router_of_the_kept_experts(wide: torch.device, spec: RouterSpec) -> None:
    logits, kept = wild_logits(64, 16), torch.tensor([0, 2, 3, 7, 11, 15])
    mask = torch.zeros(1, 16, dtype=torch.uint8)
    mask[0, kept] = 1
    rows = torch.zeros(64, dtype=torch.int32)
    ids, weights = router.route(logits.to(wide), spec, None, mask.to(wide), rows.to(wide))
    expected_ids, expected_weights = reference.route(logits[:, kept], spec)
    assert torch.equal(ids.cpu(), kept.int()[expected_ids.long()])
    torch.testing.assert_close(weights.cpu(), expected_weights, rtol=1e-6, atol=0)


@ROUTE
def test_a_mask_with_too_few_experts_gives_the_others_no_weight(wide: torch.device, family: str) -> None:
    num_experts, spec = FAMILIES[family]
    logits = wild_logits(64, num_experts)
    masks = torch.zeros(2, num_experts, dtype=torch.uint8)
    masks[1, : spec.top_k // 2] = 1
    mask_rows = torch.arange(64, dtype=torch.int32) % 2
    ids, weights = (
        r.cpu() for r in router.route(logits.to(wide), spec, None, masks.to(wide), mask_rows.to(wide))
    )
    expected_ids, expected_weights = reference.route(logits, spec, None, masks, mask_rows)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=0)
    forbidden = masks[mask_rows.long()].gather(1, ids.long()) == 0
    assert torch.all(weights[forbidden] == 0) and weights.isfinite().all()


def test_groups_without_an_allowed_expert_come_last_and_a_short_group_is_helped_out(
    device: torch.device,
) -> None:
    spec = RouterSpec(3, num_groups=4, topk_groups=1)
    logits = torch.tensor([[9.0, 9, 9, 9, 1, 2, 3, 4, 8, 8, 8, 8, 5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0]], dtype=torch.uint8)
    rows = torch.zeros(1, dtype=torch.int32)
    ids, _ = router.route(logits.to(device), spec, None, mask.to(device), rows.to(device))
    assert ids.tolist() == [[11, 14, 5]]  # group 2 wins with one expert; then the best allowed elsewhere
    assert reference.route(logits, spec, None, mask, rows)[0].tolist() == [[11, 14, 5]]


def test_a_mask_row_that_does_not_exist_forbids_everything(device: torch.device) -> None:
    masks, rows = torch.ones(2, 8, dtype=torch.uint8), torch.tensor([2, -3, 1], dtype=torch.int32)
    logits = torch.arange(8.0).expand(3, 8).contiguous()
    ids, weights = router.route(logits.to(device), RouterSpec(2), None, masks.to(device), rows.to(device))
    assert ids.tolist() == [[0, 1], [0, 1], [7, 6]]
    assert weights[:2].tolist() == [[0, 0], [0, 0]] and torch.all(weights[2] > 0)
    with pytest.raises(KernelError, match="mask_rows out of range"):
        reference.route(logits, RouterSpec(2), None, masks, rows)


def meters(tokens: int, device: torch.device) -> tuple[RouteMeter, RouteMeter]:
    """One for the device, one for the reference; both have seen a layer before."""
    pair = [
        RouteMeter(torch.full((tokens,), 0.25, device=place), torch.tensor([3], device=place))
        for place in (device, torch.device("cpu"))
    ]
    return pair[0], pair[1]


def assert_measured(got: RouteMeter, expected: RouteMeter) -> None:
    assert got.lost is not None and expected.lost is not None
    torch.testing.assert_close(got.lost.cpu(), expected.lost, rtol=0, atol=1e-6)
    assert got.outside.tolist() == expected.outside.tolist()


@ROUTE
def test_a_meter_is_told_what_masks_take_away(wide: torch.device, family: str) -> None:
    num_experts, spec = FAMILIES[family]
    logits = wild_logits(64, num_experts)
    bias = torch.randn(num_experts) if spec.scoring == "sigmoid" else None
    masks = random_masks(4, num_experts, spec.top_k)
    masks[3] = 0  # as if nobody had refused it: all that is chosen is outside
    rows = torch.arange(64, dtype=torch.int32) % 5 - 1
    got, expected = meters(64, wide)
    given = (None if bias is None else bias.to(wide), masks.to(wide), rows.to(wide))
    plain = router.route(logits.to(wide), spec, *given)
    metered = router.route(logits.to(wide), spec, *given, got)
    assert all(torch.equal(one, other) for one, other in zip(plain, metered, strict=True))
    reference.route(logits, spec, bias, masks, rows, expected)
    assert_measured(got, expected)
    without = RouteMeter(None, torch.zeros(1, dtype=torch.int64, device=wide))
    router.route(logits.to(wide), spec, *given, without)
    assert without.outside.tolist() == [int(expected.outside) - 3]


def test_a_row_of_nobody_gets_no_expert_and_is_not_measured(device: torch.device) -> None:
    num_experts, spec = FAMILIES["qwen3"]
    x, weight = exact((5, 64), 1), exact((num_experts, 96), 2)[:, :64]  # rows of 96, of which 64 count
    masks, rows = random_masks(2, num_experts, 8), torch.tensor([0, NOBODY, -1, 1, NOBODY], dtype=torch.int32)
    here = rows != NOBODY
    got, expected = meters(5, device)
    storage = torch.zeros(num_experts, 96, device=device)
    storage[:, :64] = weight.to(device)
    storage[:, 64:] = torch.nan
    ids, weights, counts = router.route_tokens(
        x.to(device), storage[:, :64], spec, None, masks.to(device), rows.to(device), True, meter=got
    )
    wanted, wanted_weights = reference.route(x[here] @ weight.T, spec, None, masks, rows[here])
    assert torch.equal(ids[here.to(device)].cpu(), wanted)
    torch.testing.assert_close(weights[here.to(device)].cpu(), wanted_weights, rtol=1e-6, atol=0)
    assert ids[~here.to(device)].eq(-1).all() and weights[~here.to(device)].eq(0).all()
    assert counts is not None and counts.sum() == 3 * spec.top_k
    lost = RouteMeter(torch.full((3,), 0.25), expected.outside)
    reference.route(x[here] @ weight.T, spec, None, masks, rows[here], lost)
    assert got.lost is not None and got.lost[~here.to(device)].eq(0.25).all()
    assert_measured(RouteMeter(got.lost[here.to(device)], got.outside), lost)
    again, _ = router.route((x @ weight.T).to(device), spec, None, masks.to(device), rows.to(device))
    assert torch.equal(again, ids)


# --- from hidden states -------------------------------------------------------------------------------------


def exact(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Small integers: products and sums are exact in any order, so ties are ties."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("family", "tokens", "hidden"),
    [
        ("qwen3", 1, 64),
        ("qwen3", 17, 700),
        ("deepseek_v2", 16, 512),
        ("deepseek_v3", 47, 33),
        ("all", 3, 1025),
        ("one_of_one", 3, 40),
    ],
)
def test_routing_from_hidden_states_is_routing_from_their_logits(
    device: torch.device, family: str, tokens: int, hidden: int, dtype: torch.dtype
) -> None:
    num_experts, spec = FAMILIES[family]
    x, weight = exact((tokens, hidden), 1), exact((num_experts, hidden), 2)
    bias = torch.randn(num_experts, generator=torch.Generator().manual_seed(3))
    masks = random_masks(3, num_experts, spec.top_k)
    rows = torch.arange(tokens, dtype=torch.int32) % 4 - 1
    arrivals = torch.zeros(router.NUM_ARRIVALS, dtype=torch.int32, device=device)
    ids, weights, counts = router.route_tokens(
        x.to(device), weight.to(device, dtype), spec, bias.to(device), masks.to(device), rows.to(device),
        histogram=True, arrivals=arrivals,
    )  # fmt: skip
    expected_ids, expected_weights = reference.route(x @ weight.T, spec, bias, masks, rows)
    assert torch.equal(ids.cpu(), expected_ids)
    torch.testing.assert_close(weights.cpu(), expected_weights, rtol=1e-6, atol=0)
    assert (
        counts is not None
        and counts.tolist() == expected_ids.flatten().bincount(minlength=num_experts).tolist()
    )
    assert not arrivals.any()


ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


@pytest.mark.parametrize("dtype", ROUNDING)
def test_logits_from_hidden_states_are_within_the_error_bound(
    device: torch.device, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 600, generator=generator)
    weight = (torch.randn(20, 600, generator=generator) / 600**0.5).to(dtype)
    ids, weights, _ = router.route_tokens(x.to(device), weight.to(device), RouterSpec(20, "sigmoid"))
    got = torch.zeros(9, 20).scatter_(1, ids.cpu().long(), weights.cpu())
    magnitude = x.double().abs() @ weight.double().abs().T
    # A sigmoid's slope is at most 1/4, and it is rounded once.
    bound = (ROUNDING[dtype] + SAFETY * 600**0.5 * EPS) * magnitude / 4 + EPS
    assert_within(got, (x.double() @ weight.double().T).sigmoid(), bound)


def test_a_token_is_routed_the_same_alone_and_in_any_company(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "TOKENS_PER_LAUNCH", 32)  # so that 41 tokens are two launches
    monkeypatch.setattr(router, "NUM_ARRIVALS", 2)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(41, 520, generator=generator).to(device)
    x[4], x[20, 7] = torch.nan, torch.inf
    weight = torch.randn(12, 520, generator=generator).bfloat16().to(device)
    ids, weights, _ = router.route_tokens(x, weight, RouterSpec(3))
    assert_distinct(ids, 12)
    assert ids[4].tolist() == [0, 1, 2]
    for token in (0, 5, 19, 31, 40):
        # At its place in the block of 16, as the matrix product that stands in for a GPU's minds the place.
        others = torch.zeros_like(x[: token + 1])
        others[token] = x[token]
        again = router.route_tokens(others, weight, RouterSpec(3))
        assert torch.equal(again[0][token], ids[token]) and torch.equal(again[1][token], weights[token])


def test_what_cannot_be_routed_is_refused(device: torch.device) -> None:
    logits = torch.zeros(1, 8, device=device)
    for spec in (RouterSpec(9), RouterSpec(0), RouterSpec(2, num_groups=3), RouterSpec(3, num_groups=4)):
        with pytest.raises(KernelError, match="route: "):
            router.route(logits, spec)
    with pytest.raises(KernelError, match="route: logits is a row of 1025, expected at most 1024 experts"):
        router.route(torch.zeros(1, 1025, device=device), RouterSpec(1))
    with pytest.raises(KernelError, match="route: bias"):
        router.route(logits, RouterSpec(1), torch.zeros(7, device=device))
    masks, rows = torch.ones(2, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int32)
    with pytest.raises(KernelError, match="route: masks and mask_rows, expected both or neither"):
        router.route(logits, RouterSpec(1), None, masks.to(device))
    with pytest.raises(KernelError, match="route: mask_rows is torch.int64"):
        router.route(logits, RouterSpec(1), None, masks.to(device), rows.to(device).long())
    with pytest.raises(KernelError, match=r"route_tokens: router_weight is torch.float64"):
        router.route_tokens(logits, torch.zeros(8, 8, device=device).double(), RouterSpec(1))
