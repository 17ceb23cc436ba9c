"""Expert masks as data: what is refused, what is equal, and that they survive the disk."""

import json

import pytest

from moe_runtime.errors import PlanError
from moe_runtime.plan import ExpertMask, LayerMask


def mask(*kept: tuple[int, ...], num_experts: int = 8) -> ExpertMask:
    return ExpertMask(tuple(LayerMask(2 * layer + 1, num_experts, ids) for layer, ids in enumerate(kept)))


def test_a_mask_comes_back_from_json_with_the_same_digest() -> None:
    given = mask((0, 3, 7), (1, 2, 3))
    again = ExpertMask.from_json(json.loads(json.dumps(given.to_json())))
    assert again == given and again.digest == given.digest
    assert given.digest != mask((0, 3, 7), (1, 2, 4)).digest


def test_union_and_intersection_are_those_of_the_sets() -> None:
    left, right = mask((0, 3, 7), (1, 2, 3)), mask((3, 4), (0, 1, 2))
    assert left.union(right) == mask((0, 3, 4, 7), (0, 1, 2, 3)) == right.union(left)
    assert left.intersection(right) == mask((3,), (1, 2))
    assert left.union(right).contains(left) and not left.contains(right)
    full = ExpertMask.full({1: 8, 3: 8})
    assert full.contains(left) and full.num_kept == 16 and full.is_uniform
    assert not left.intersection(right).is_uniform


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerMask(0, 8, (1, 1)), "ascending and distinct"),
        (lambda: LayerMask(0, 8, (2, 1)), "ascending and distinct"),
        (lambda: LayerMask(0, 8, (7, 8)), "kept ids 7 to 8, there are 8 experts"),
        (lambda: LayerMask(0, 8, (-1,)), "kept ids -1 to -1"),
        (lambda: LayerMask(-1, 8, ()), "layer -1"),
        (lambda: ExpertMask(()), "at least one"),
        (lambda: ExpertMask((LayerMask(1, 8, ()), LayerMask(1, 8, ()))), "distinct"),
        (lambda: mask((0,)).union(mask((0,), num_experts=9)), "different models"),
        (lambda: ExpertMask.from_json({}), "needs layers"),
        (lambda: ExpertMask.from_json({"layers": [{"layer": 0, "num_experts": 8}]}), "kept"),
        (lambda: ExpertMask.from_json({"layers": [{"layer": 0, "num_experts": 8, "kept": ["a"]}]}), "whole"),
        (lambda: ExpertMask.from_json({"layers": [{"layer": True, "num_experts": 8, "kept": []}]}), "whole"),
    ],
)
def test_what_is_no_mask_is_refused(make: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()  # type: ignore[operator]
