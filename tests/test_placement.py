"""Placements are plain data: they round-trip, are checked, and are planned alike on every machine."""

import itertools
import json
import random

import pytest

from moe_runtime.errors import PlanError
from moe_runtime.placement import LayerPlacement, Placement, plan_placement
from moe_runtime.plan import ExpertMask, LayerMask

MIXED = Placement(
    (
        LayerPlacement(1, ("device", "host", "absent", "device")),
        LayerPlacement(3, ("absent", "device", "device", "device")),
    )
)


def everything(num_layers: int, num_experts: int) -> Placement:
    return Placement.of(ExpertMask.full(dict.fromkeys(range(num_layers), num_experts)))


def test_a_placement_comes_back_from_json_and_has_one_digest() -> None:
    again = Placement.from_json(json.loads(json.dumps(MIXED.to_json())))
    assert again == MIXED and hash(again) == hash(MIXED) and again.digest == MIXED.digest
    assert everything(2, 4).digest != everything(2, 5).digest != MIXED.digest
    assert [MIXED.count(tier) for tier in ("device", "host", "absent")] == [5, 1, 2]
    assert MIXED.resident.kept == {1: (0, 1, 3), 3: (1, 2, 3)}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"device": [0, 1]}, "needs layers of layer, num_experts, device and host"),
        ({"device": [0], "host": [0], "layer": 0, "num_experts": 2}, "must be distinct and below 2"),
        ({"device": [2], "host": [], "layer": 0, "num_experts": 2}, "must be distinct and below 2"),
        ({"device": [-1], "host": [], "layer": 0, "num_experts": 2}, "must be distinct and below 2"),
        ({"device": [True], "host": [], "layer": 0, "num_experts": 2}, "numbers must be whole"),
        ({"device": [], "host": [], "layer": 0, "num_experts": 0}, "layer 0 with 0 experts"),
        ({"device": [], "host": [], "layer": -1, "num_experts": 2}, "layer -1"),
    ],
)
def test_json_that_is_no_placement_is_refused(row: dict[str, object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Placement.from_json({"layers": [row]})


@pytest.mark.parametrize("value", [{}, {"layers": []}, {"layers": [1]}, [], None])
def test_json_of_another_shape_is_refused(value: object) -> None:
    with pytest.raises(PlanError):
        Placement.from_json(value)


def test_a_placement_must_fit_its_model() -> None:
    MIXED.check({1: 4, 3: 4}, top_k=3)
    with pytest.raises(PlanError, match="leaves 3 experts in layer 1, each token takes 4"):
        MIXED.check({1: 4, 3: 4}, top_k=4)
    with pytest.raises(PlanError, match="it has 0 experts in layer 2, the model 4"):
        MIXED.check({1: 4, 2: 4, 3: 4}, top_k=2)
    with pytest.raises(PlanError, match="it has 4 experts in layer 3, the model 8"):
        MIXED.check({1: 4, 3: 8}, top_k=2)


def test_what_fits_stays_and_what_does_not_goes_to_the_host() -> None:
    wanted, sizes = everything(3, 4), dict.fromkeys(range(3), 10)
    assert plan_placement(wanted, sizes, 120) == wanted
    assert plan_placement(wanted, sizes, 119).count("host") == 1
    assert plan_placement(wanted, sizes, 0).count("host") == 12
    # Without statistics every layer gives up as many, and the first experts stay.
    assert [layer.experts("device") for layer in plan_placement(wanted, sizes, 60).layers] == [(0, 1)] * 3
    # What was absent or on the host stays so.
    moved = plan_placement(MIXED, {1: 10, 3: 10}, 20)
    assert [layer.tiers[2] for layer in moved.layers] == ["absent", "host"]
    assert moved.resident == MIXED.resident and moved.layers[0].tiers[1] == "host"


def test_the_hottest_stay_as_an_exhaustive_search_would_choose() -> None:
    generator = random.Random(3)
    for _ in range(20):
        hotness = {layer: [generator.randrange(9) for _ in range(4)] for layer in range(2)}
        room = generator.randrange(9)
        planned = plan_placement(everything(2, 4), {0: 10, 1: 10}, 10 * room + 3, hotness)
        kept = sum(
            hotness[layer.layer][expert] for layer in planned.layers for expert in layer.experts("device")
        )
        counts = [count for layer in hotness.values() for count in layer]
        assert kept == max(map(sum, itertools.combinations(counts, min(room, 8))))
        assert planned == plan_placement(everything(2, 4), {0: 10, 1: 10}, 10 * room + 3, hotness)


def test_choices_per_byte_decide_between_layers_of_different_sizes() -> None:
    hotness = {0: [5.0, 5.0], 1: [7.0, 1.0]}
    planned = plan_placement(everything(2, 2), {0: 10, 1: 20}, 25, hotness)
    assert [layer.experts("device") for layer in planned.layers] == [(0, 1), ()]


@pytest.mark.parametrize(
    ("hotness", "message"),
    [
        ({0: [1, 2]}, "count 0 experts in layer 1, the model has 2"),
        ({0: [1, 2], 1: [1]}, "count 1 experts in layer 1"),
        ({0: [1, 2], 1: [1, float("nan")]}, "statistics of layer 1: counts must be finite"),
        ({0: [1, -2], 1: [1, 1]}, "statistics of layer 0: counts must be finite and not negative"),
    ],
)
def test_statistics_of_another_model_are_refused(hotness: dict[int, list[float]], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_placement(everything(2, 2), {0: 1, 1: 1}, 1, hotness)


def test_the_table_joins_layers_that_are_alike_and_adds_them_up() -> None:
    some = Placement.of(
        ExpertMask((LayerMask(0, 4, (0, 1)), LayerMask(1, 4, (2, 3)), LayerMask(2, 4, (0, 1, 2))))
    )
    sizes = {(0, "device"): 2_000_000, (1, "device"): 2_000_000, (2, "device"): 1_500_000_000}
    assert some.table(sizes).splitlines() == [
        "layers  device       host  absent",
        "0 to 1  4 (4.0 MB)   0     4",
        "2       3 (1.50 GB)  0     1",
        "all     7 (1.50 GB)  0     5",
    ]
