"""From scores to masks: nested, deterministic, and never breaking what routing needs."""

import json
import random
from pathlib import Path

import pytest
import torch
from sums_by_hand import by_hand, shape_of, statistics_of

from moe_runtime.errors import PlanError
from moe_runtime.experts.model_bytes import ModelBytes
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.planning import Wish, plan_by_count
from moe_runtime.experts.protect import read_protected
from moe_runtime.experts.prune import Ranking, Rules, count_of_bytes, count_of_ratio, rank
from moe_runtime.experts.score import SCORES

SIZE = ModelBytes(10_000, {1: 100, 2: 100})
DIGESTS = {  # of one plan by every score
    "frequency": "474e3ee4a929", "gate_weight": "f66844ec9e2b", "ean": "87a496fe3500",
    "reap": "384d2e3019c6", "reap_sum": "5e66d9201f89", "easy_ep": "a728769317a4",
    "mone": "111d750fc2a5", "random": "46da53f68f6a",
}  # fmt: skip


def ranked(scores: list[list[float]], *, groups: int = 1, topk_groups: int = 1, **options: object) -> Ranking:
    values = torch.tensor(scores, dtype=torch.float64)
    shape = shape_of(len(scores), len(scores[0]), 2, groups, topk_groups)
    unseen = torch.tensor(options.get("unseen", [[False] * len(scores[0])] * len(scores)))
    rules = Rules.of(shape, options.get("multiple_of", 1))  # type: ignore[arg-type]
    return rank(values, unseen, shape, rules, options.get("protected", {}), options.get("outliers"))  # type: ignore[arg-type]


def test_the_best_are_kept_and_equals_by_their_ids() -> None:
    ranking = ranked([[1, 5, 3, 5, 2, 3]])
    assert ranking.order[1] == (1, 3, 2, 5, 4, 0)
    assert ranking.mask(3).kept == {1: (1, 2, 3)}


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_smaller_plans_are_subsets_of_larger_ones_and_groups_are_cut_alike(groups: int) -> None:
    generator = random.Random(groups)
    for _ in range(20):
        scores = [[generator.choice((0.0, 1.0, generator.random())) for _ in range(16)] for _ in range(3)]
        ranking = ranked(scores, groups=groups, topk_groups=max(1, groups // 2))
        masks = [ranking.mask(count) for count in ranking.rules.counts]
        assert all(larger.contains(smaller) for smaller, larger in zip(masks, masks[1:], strict=False))
        for mask, count in zip(masks, ranking.rules.counts, strict=True):
            for kept in mask.kept.values():
                size = 16 // groups
                sizes = {sum(expert // size == group for expert in kept) for group in range(groups)}
                assert sizes == {count // groups}


def test_the_fewest_leave_every_token_its_experts() -> None:
    assert Rules(16, 2).counts == tuple(range(2, 17))
    assert Rules(16, 6, 4, 2).fewest == 12  # 6 from 2 of 4 groups: 3 of each
    assert Rules(16, 2, 4, 2).counts == (4, 8, 12, 16)
    assert Rules(20, 2, multiple_of=8).counts == (8, 16, 20)
    assert Rules(24, 2, 4, 2, multiple_of=6).counts == (12, 24)
    with pytest.raises(PlanError, match="keeps 1 of 16 experts, and each token takes 2: at least 2"):
        Rules(16, 2).at_least(1, "--keep 1")
    with pytest.raises(PlanError, match="takes 6 from 2 of 4 groups that keep equally many: at least 12"):
        Rules(16, 6, 4, 2).at_least(8, "--keep 8")
    with pytest.raises(PlanError, match="a layer has 16 experts"):
        Rules(16, 2).at_least(17, "--keep 17")
    with pytest.raises(PlanError, match="--multiple-of 17: must be from 1 to the 16"):
        Rules(16, 2, multiple_of=17)


def test_budgets_become_counts_exactly() -> None:
    assert count_of_ratio("0.6", Rules(20, 2)) == 12  # in floats 0.6 * 20 is above 12 for some ratios
    assert count_of_ratio("1/3", Rules(20, 2)) == 7
    assert count_of_ratio("0.3", Rules(16, 2, 4, 2)) == 8  # 4.8, up to a multiple of the groups
    for wrong in ("0", "1", "-0.5", "half", "1/0"):
        with pytest.raises(PlanError, match=rf"--keep-ratio {wrong}"):
            count_of_ratio(wrong, Rules(20, 2))
    # 10,000 bytes with 2 layers of 20 experts of 100: each count less takes 200 away.
    assert count_of_bytes(9_000, 10_000, {1: 100, 2: 100}, Rules(20, 2)) == 15
    assert count_of_bytes(8_999, 10_000, {1: 100, 2: 100}, Rules(20, 2)) == 14
    with pytest.raises(PlanError, match="with the fewest experts that routing allows"):
        count_of_bytes(6_000, 10_000, {1: 100, 2: 100}, Rules(20, 2))


def test_unseen_experts_are_listed_and_go_first_unless_protected() -> None:
    """Their score says nothing: here it is the highest of all."""
    unseen = [[True, False, False, True, False, False]]
    ranking = ranked([[9, 1, 2, 9, 3, 4]], unseen=unseen, protected={1: {3}})
    assert ranking.order[1] == (3, 5, 4, 2, 1, 0)
    assert ranking.unseen == {1: (0, 3)}
    assert "layer 1: no token chose 0, 3; not ranked, the first to be cut" in ranking.log
    assert "layer 1: protected 3" in ranking.log


def test_protected_experts_and_outliers_are_kept_or_the_plan_is_refused() -> None:
    outliers = torch.tensor([[False, True, False, False]])
    ranking = ranked([[4, 0, 3, 0]], protected={1: {3}}, outliers=outliers)
    assert ranking.mask(2).kept == {1: (1, 3)} and ranking.lowest(1) == 2
    assert "layer 1: super-experts 1 are kept" in ranking.log
    crowded = ranked([[4, 3, 2, 1]], groups=2, protected={1: {2, 3}})
    assert crowded.lowest(1) == 4
    with pytest.raises(PlanError, match="keeping 2 experts would cut 3, which are protected"):
        ranked([[4, 3, 2, 1]], groups=2, topk_groups=2, protected={1: {2, 3}}).mask(2)
    with pytest.raises(PlanError, match="layer 7 has no router; those that have: 1"):
        ranked([[4, 3, 2, 1]], protected={7: {0}})
    with pytest.raises(PlanError, match="layer 1 has no expert 9, there are 4"):
        ranked([[4, 3, 2, 1]], protected={1: {9}})
    with pytest.raises(PlanError, match="scores must be finite"):
        ranked([[4, float("nan"), 2, 1]])


def test_what_to_protect_is_said_in_ids_files_or_plans(tmp_path: Path) -> None:
    file = tmp_path / "protect.json"
    file.write_text(json.dumps({"2": [1, 5]}), encoding="utf-8")
    plan = plan_by_count(statistics(), Wish(("credit",)), 3, SIZE)
    plan.save(tmp_path / "plan.json")
    words = ["2:0,1", "3:4", str(file), str(tmp_path / "plan.json")]
    assert read_protected(words) == {1: {4, 5, 6}, 2: {0, 1, 2, 5}, 3: {4}}
    file.write_text('{"2": "all"}', encoding="utf-8")
    for wrong in ("2:", "absent.json", str(file)):
        with pytest.raises(PlanError, match="--protect"):
            read_protected([wrong])


def statistics(tokens: int = 10_000):  # type: ignore[no-untyped-def]
    counts = [[10, 20, 30, 40, 50, 60, 70], [70, 60, 50, 40, 30, 20, 10]]
    return statistics_of(shape_of(2, 7), credit=by_hand(counts, tokens), wealth=by_hand(counts[::-1], tokens))


def test_a_plan_survives_the_disk_and_a_changed_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = plan_by_count(statistics(), Wish(("credit", "wealth"), "union", asked={"keep": 3}), 3, SIZE)
    document = plan.save(path)
    loaded = PlanFile.load(path)
    assert loaded.digest == document.digest and loaded.to_json() == plan.to_json()
    assert loaded.mask.kept == {1: (0, 1, 2, 4, 5, 6), 2: (0, 1, 2, 4, 5, 6)}
    assert loaded.num_bytes == {"full": 10_000, "kept": 9_800}
    assert any("the union of a plan for each scenario" in line for line in loaded.constraints)
    path.write_bytes(path.read_bytes().replace(b'"credit"', b'"gredit"', 1))
    with pytest.raises(PlanError, match="changed since it was written"):
        PlanFile.load(path)
    with pytest.raises(PlanError, match="missing or unknown in a plan: score"):
        PlanFile.from_json({name: value for name, value in plan.to_json().items() if name != "score"})
    with pytest.raises(PlanError, match="not the one that its digest says"):
        PlanFile.from_json({**plan.to_json(), "mask_digest": "0" * 64})


def test_tiny_calibrations_and_empty_plans_are_refused() -> None:
    with pytest.raises(PlanError, match="profiled on 111 tokens; 112 are needed: 32 for each of 7 experts"):
        plan_by_count(statistics(111), Wish(("credit",)), 3, SIZE)
    plan_by_count(statistics(112), Wish(("credit",)), 3, SIZE)
    with pytest.raises(PlanError, match="would keep all 14 experts"):
        plan_by_count(statistics(), Wish(("credit",)), 7, SIZE)
    with pytest.raises(PlanError, match="several scenarios need --combine"):
        Wish(("credit", "wealth"))
    with pytest.raises(PlanError, match="each once; got credit, credit"):
        Wish(("credit", "credit"), "mix")


@pytest.mark.parametrize("score", SCORES)
def test_plans_are_the_same_under_every_instruction_set(score: str, isa: str) -> None:
    """Digests written down: no sum, sort or random number may depend on the machine."""
    generator = random.Random(1)
    values = [[[generator.random() * 100 for _ in range(24)] for _ in range(3)] for _ in range(6)]
    names = ("gate", "norm", "norm_squared", "gate_norm", "gate_norm_turn", "peak")
    counts = [[generator.randrange(0, 50) for _ in range(24)] for _ in range(3)]
    sums = by_hand(counts, **dict(zip(names, values, strict=True)))
    sums.outputs.copy_(torch.tensor([generator.random() for _ in range(3 * 24 * 4)]).view(3, 24, 4))
    made = statistics_of(shape_of(3, 24), one=sums, two=by_hand(counts[::-1]))
    size = ModelBytes(10_000, {1: 100, 2: 100, 3: 100})
    plan = plan_by_count(made, Wish(("one", "two"), "mix", score, seed=3), 9, size)
    assert plan.mask.digest[:12] == DIGESTS[score]
    assert plan.model == ModelIdentity("w", "c", "t")
