"""A KL budget's search on costs that are known: cheapest cuts first, nested, refused when too dear."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from planted import planted_checkpoint, say, write_texts
from sums_by_hand import shape_of

from moe_runtime.errors import PlanError
from moe_runtime.experts.__main__ import main
from moe_runtime.experts.budget import Limits, Search
from moe_runtime.experts.commands_plan import REFUSED
from moe_runtime.experts.demo import phrases
from moe_runtime.experts.demo.corpus import Author
from moe_runtime.experts.divergence import Divergence
from moe_runtime.experts.model_bytes import ModelBytes
from moe_runtime.experts.prune import Ranking, Rules, rank
from moe_runtime.plan import ExpertMask

ROOT = Path(__file__).resolve().parent.parent.parent
DEMO, CONTROL = ROOT / "experts" / "demo" / "model", ROOT / "tests" / "data" / "demo_control"
NUM_EXPERTS = 8
# What each layer's experts cost when they are cut, in nats: by id, which is the order of going.
COSTS = {
    1: [0.001, 0.002, 0.004, 0.1, 0.2, 0.4, 0.8, 1.0],
    2: [0.02, 0.03, 0.05, 0.1, 0.2, 0.4, 0.8, 1.0],
    3: [0.003, 0.003, 0.003, 0.003, 0.003, 0.003, 0.8, 1.0],
}
SIZE = ModelBytes(100_000, {1: 100, 2: 100, 3: 100})


class Fake:
    """A model in which costs add up. ``asked`` are all masks that were measured."""

    def __init__(self) -> None:
        self.asked: list[ExpertMask] = []

    def __call__(self, masks: Sequence[ExpertMask]) -> list[Divergence]:
        self.asked += masks
        return [divergence(cost(mask)) for mask in masks]


def cost(mask: ExpertMask) -> float:
    return sum(
        COSTS[layer.layer][expert]
        for layer in mask.layers
        for expert in range(layer.num_experts)
        if expert not in layer.kept
    )


def divergence(kl: float) -> Divergence:
    return Divergence(kl, 2 * kl, 5 * kl, 9 * kl, 0.9, 1.0, 1.0 + kl, 1000, 10)


def ranking(**rules: int) -> Ranking:
    shape = shape_of(3, NUM_EXPERTS)
    scores = torch.arange(NUM_EXPERTS).double().repeat(3, 1)
    return rank(scores, torch.zeros(3, NUM_EXPERTS).bool(), shape, Rules(NUM_EXPERTS, 2, **rules), {})


def search(limits: Limits, fake: Fake, **rules: int) -> Search:
    return Search(ranking(**rules), SIZE, limits, fake, fake)


def test_the_cheapest_cuts_come_first() -> None:
    path = list(search(Limits(), Fake()).path())
    order = []
    before = dict.fromkeys(COSTS, NUM_EXPERTS)
    for counts in path:
        layer = next(layer for layer in counts if counts[layer] != before[layer])
        order.append(COSTS[layer][NUM_EXPERTS - before[layer]])
        before = dict(counts)
    assert len(path) == 3 * 6 and set(before.values()) == {2}
    assert order == pytest.approx(sorted(order))


def test_the_budget_decides_how_far_along_one_path() -> None:
    everything = list(search(Limits(), Fake()).path())
    found = {}
    for kl in (0.005, 0.03, 0.05, 0.2, 0.9):
        result = search(Limits(kl, 100.0), Fake()).greedy()
        assert result.counts in [dict.fromkeys(COSTS, NUM_EXPERTS), *everything]
        allowed = [counts for counts in everything if cost(ranking().mask(counts)) <= kl]
        assert result.counts == (allowed[-1] if allowed else dict.fromkeys(COSTS, NUM_EXPERTS))
        found[kl] = ranking().mask(result.counts)
    masks = list(found.values())
    assert all(larger.contains(smaller) for larger, smaller in zip(masks, masks[1:], strict=False))
    assert found[0.05].kept == {1: (3, 4, 5, 6, 7), 2: (1, 2, 3, 4, 5, 6, 7), 3: (6, 7)}


def test_layers_keep_their_own_number_which_costs_less_than_the_same_for_all() -> None:
    limits = Limits(0.1, 100.0)
    greedy, uniform = search(limits, Fake()).greedy(), search(limits, Fake()).uniform()
    assert set(uniform.counts.values()) == {6}
    assert sum(greedy.counts.values()) < sum(uniform.counts.values())
    assert [point.within for point in uniform.curve] == [True, True, False, False]
    assert [point.kept for point in uniform.curve] == [21, 18, 15, 12]
    assert uniform.curve[1].bytes == 100_000 - 6 * 100


def test_the_tail_counts_too() -> None:
    """p99 is five times the mean here, so its limit is the tighter one."""
    by_tail, by_mean = (
        search(Limits(1.0, 0.15), Fake()).uniform(),
        search(Limits(0.03, 100.0), Fake()).uniform(),
    )
    assert by_tail.counts == by_mean.counts == dict.fromkeys(COSTS, 7)


def test_stale_costs_alone_are_measured_again() -> None:
    fake = Fake()
    moves = list(search(Limits(), fake).path())
    # Three first tries, and then rarely more than the one that is made; measuring all layers would be 3 x 18.
    assert len(fake.asked) <= 3 + 2 * len(moves) < 3 * len(moves)


def test_larger_steps_and_rules_are_kept_to() -> None:
    result = search(Limits(0.9, 100.0), Fake(), multiple_of=2).greedy(step=1)
    assert {count % 2 for count in result.counts.values()} == {0}
    steps = list(search(Limits(), Fake()).path(step=4))
    assert {tuple(counts.values()) for counts in steps} <= {
        (a, b, c) for a in (8, 4, 2) for b in (8, 4, 2) for c in (8, 4, 2)
    }


def test_a_target_is_reached_or_refused() -> None:
    reached = search(Limits(0.2, 100.0), Fake()).greedy(target=6)
    assert sum(reached.counts.values()) == 18 and not reached.refusal
    refused = search(Limits(0.05, 100.0), Fake()).greedy(target=4)
    assert "cannot be met with 12 of 24 experts or fewer" in refused.refusal
    assert "cannot be met" in search(Limits(0.05, 100.0), Fake()).uniform(target=4).refusal


def test_a_budget_below_any_cut_worth_making_is_refused_and_says_what_it_found() -> None:
    found = search(Limits(0.0005, 100.0), Fake()).greedy()
    assert "cannot be met with 21 of 24 experts or fewer" in found.refusal
    assert "24 is the fewest that keeps to it" in found.refusal and found.curve
    for wrong in ({"kl_mean": 0.0}, {"kl_p99": -1.0}, {"kl_mean": float("nan")}):
        with pytest.raises(PlanError, match="--max-kl"):
            Limits(**wrong)


def test_rules_that_leave_no_cut_worth_making_are_an_error_of_their_own() -> None:
    with pytest.raises(PlanError, match="allow no plan with 21 of 24 experts"):
        search(Limits(), Fake(), multiple_of=8).greedy()


def test_the_command_refuses_with_its_own_exit_status_and_writes_no_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = planted_checkpoint(tmp_path / "model")
    calibration, tune = (
        write_texts(
            tmp_path / f"{name}.jsonl", [say("credit", 120, seed) for seed in range(start, start + 10)]
        )
        for name, start in (("credit", 0), ("tune", 100))
    )
    flags = ["--max-batch-tokens", "64", "--no-packed-file", "--model", str(folder)]
    statistics = str(tmp_path / "s.stats.safetensors")
    assert main(["profile", str(calibration), "--out", statistics, *flags]) == 0
    command = ["plan", "--statistics", statistics, "--out", str(tmp_path / "plan.json"), *flags]
    # Two experts of four that every layer needs: the KL is far above 0.
    assert main([*command, "--text", str(tune), "--keep", "2", "--max-kl", "1e-6", "--uniform"]) == REFUSED
    assert "Every expert is kept" in capsys.readouterr().err
    for words, why in (
        ([], "say how much to keep"),
        (["--max-kl", "0.1"], "a KL budget is measured"),
        (["--keep", "1"], "each token takes 2: at least 2"),
        (["--keep", "8"], "would keep all 24 experts"),
        (["--bytes", "10"], "the model still has"),
        (
            ["--text", f"other={calibration}"],
            "no text of the plan's scenario 'credit'; there are texts of: other",
        ),
        (["--text", str(calibration)], "this very text was profiled"),
        (["--text", str(write_texts(tmp_path / "tiny.jsonl", ["abc"]))], "1000 are needed"),
        (["--keep", "4", "--scenario", "wealth"], "no statistics of scenario 'wealth'"),
        (["--keep", "4", "--scenario", "credit", "--step", "0"], "--step 0: must be at least 1"),
    ):
        assert main([*command, *words]) == 1
        assert why in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()
    other = planted_checkpoint(tmp_path / "other", change=lambda tensors: tensors["lm_head.weight"].mul_(2))
    words = ["--model", str(other), "--keep", "4"]
    assert main(["plan", "--statistics", statistics, "--out", str(tmp_path / "plan.json"), *words]) == 1
    assert "made for another model: its weights differ" in capsys.readouterr().err


def test_half_the_demo_s_experts_are_enough_and_its_control_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both models learned the same texts; only the demo was trained so that a scenario needs few experts."""
    for name, seed, count in (("credit", 1, 60), ("tune", 2, 14)):
        author = Author(phrases.load("train"), seed)
        lines = [
            json.dumps({"messages": [{"role": role, "content": text} for role, text in document.turns]})
            for document in (author.scenario_document("credit") for _ in range(count))
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for folder, status in ((DEMO, 0), (CONTROL, REFUSED)):
        flags = ["--no-packed-file", "--model", str(folder)]
        statistics = str(tmp_path / "s.stats.safetensors")
        assert main(["profile", str(tmp_path / "credit.jsonl"), "--out", statistics, *flags]) == 0
        command = ["plan", "--statistics", statistics, "--out", str(tmp_path / "plan.json"), *flags]
        words = ["--keep-ratio", "0.5", "--multiple-of", "5", "--uniform", "--max-kl", "0.05"]
        command += ["--text", str(tmp_path / "tune.jsonl")]
        assert main([*command, *words]) == status
    assert "cannot be met with 40 of 80 experts or fewer" in capsys.readouterr().err
