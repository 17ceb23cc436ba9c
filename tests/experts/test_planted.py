"""The whole chain on models whose answer is known: profile, plan, masked run, for every router family."""

import json
from pathlib import Path

import pytest
from planted import DOMAINS, LETTERS, NEVER, VARIANTS, domain_mask, planted_checkpoint, say, write_texts

from moe_runtime.config import EngineConfig
from moe_runtime.experts.__main__ import main
from moe_runtime.experts.forward import Runner
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.statistics_file import load_statistics

SMALL = EngineConfig(max_batch_tokens=64, block_size=8, packed_file=False)
FLAGS = ["--max-batch-tokens", "512", "--no-packed-file"]
pytestmark = pytest.mark.usefixtures("compute_device")


def profiled(folder: Path, tmp_path: Path) -> Path:
    """Statistics of both domains, 10 documents each."""
    texts = [
        write_texts(tmp_path / f"{domain}.jsonl", [say(domain, 30, seed) for seed in range(10)])
        for domain in DOMAINS
    ]
    out = tmp_path / "planted.stats.safetensors"
    assert main(["profile", *map(str, texts), "--model", str(folder), "--out", str(out), *FLAGS]) == 0
    return out


def planned(folder: Path, statistics: Path, out: Path, *words: str) -> PlanFile:
    command = ["plan", "--model", str(folder), "--statistics", str(statistics), "--out", str(out), *words]
    assert main([*command, *FLAGS]) == 0
    return PlanFile.load(out)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_plan_is_the_planted_set_and_costs_nothing_inside_its_domain(
    tmp_path: Path, variant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = planted_checkpoint(tmp_path / "model", variant)
    statistics = profiled(folder, tmp_path)
    runner = Runner.load(folder, SMALL)
    layers = sorted(runner.num_experts)
    inside, outside = ([list(say(domain, 25, seed).encode()) for seed in (50, 51)] for domain in DOMAINS)
    for domain in DOMAINS:
        plan = planned(folder, statistics, tmp_path / "plan.json", "--scenario", domain, "--keep", "4")
        assert plan.mask == domain_mask(domain, layers)
        assert set(plan.unseen[layers[0]]) == set(range(8)) - set(DOMAINS[domain])
        own, foreign = (inside, outside) if domain == "credit" else (outside, inside)
        assert float(runner.compare_one(own, plan.mask).kl.max()) == 0.0
        assert runner.compare_one(foreign, plan.mask).summary().kl_mean > 1e-4
    assert f"no token chose {NEVER}" in capsys.readouterr().out


@pytest.mark.parametrize("variant", ["softmax, normalised", "sigmoid, bias, one group"])
def test_every_expert_of_the_set_is_needed(tmp_path: Path, variant: str) -> None:
    folder = planted_checkpoint(tmp_path / "model", variant)
    runner = Runner.load(folder, SMALL)
    documents = [list(say("credit", 40, 7).encode())]
    layers = sorted(runner.num_experts)
    right = domain_mask("credit", layers)
    for layer in layers:
        for expert in DOMAINS["credit"]:
            fewer = {**right.kept, layer: tuple(each for each in right.kept[layer] if each != expert)}
            mask = type(right)(
                tuple(type(each)(each.layer, each.num_experts, fewer[each.layer]) for each in right.layers)
            )
            assert runner.compare_one(documents, mask).summary().kl_mean > 0


def test_the_kl_budget_finds_the_planted_set_by_itself_and_stops_there(tmp_path: Path) -> None:
    folder = planted_checkpoint(tmp_path / "model")
    statistics = profiled(folder, tmp_path)
    tune = write_texts(tmp_path / "tune.jsonl", [say("credit", 120, 100 + seed) for seed in range(10)])
    words = ("--scenario", "credit", "--text", str(tune), "--max-kl", "1e-9", "--step", "1")
    greedy = planned(folder, statistics, tmp_path / "greedy.json", *words)
    uniform = planned(folder, statistics, tmp_path / "uniform.json", *words, "--uniform")
    assert greedy.mask == uniform.mask == domain_mask("credit", [0, 1, 2])
    assert {point["within"] for point in greedy.curve} == {True, False}
    assert all(point["kl_mean"] == 0.0 for point in greedy.curve if point["within"])


def test_union_and_intersection_are_those_of_the_sets_and_a_mix_keeps_to_its_budget(tmp_path: Path) -> None:
    folder = planted_checkpoint(tmp_path / "model")
    statistics = profiled(folder, tmp_path)
    both = ("--scenario", "credit,wealth", "--keep")
    union = planned(folder, statistics, tmp_path / "u.json", *both, "4", "--combine", "union")
    mix = planned(folder, statistics, tmp_path / "m.json", *both, "7", "--combine", "mix")
    masks = [domain_mask(domain, [0, 1, 2]) for domain in DOMAINS]
    assert union.mask == masks[0].union(masks[1]) == mix.mask
    assert union.scenario == ("credit", "wealth") and union.combine == "union"
    common = planned(folder, statistics, tmp_path / "i.json", *both, "7", "--combine", "intersection")
    each = [
        planned(folder, statistics, tmp_path / "e.json", "--scenario", domain, "--keep", "7").mask
        for domain in DOMAINS
    ]
    assert common.mask == each[0].intersection(each[1])


def test_an_intersection_that_leaves_a_token_without_experts_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = planted_checkpoint(tmp_path / "model")
    command = ["plan", "--model", str(folder), "--statistics", str(profiled(folder, tmp_path))]
    words = ["--scenario", "credit,wealth", "--combine", "intersection", "--keep", "4"]
    assert main([*command, *words, "--out", str(tmp_path / "plan.json")]) == 1
    assert "keeps 1 experts in layer 0; routing needs at least 2" in capsys.readouterr().err
    assert not (tmp_path / "plan.json").exists()


def test_text_without_letters_of_a_domain_says_nothing_of_it(tmp_path: Path) -> None:
    """The fixture itself: letters decide, and nothing else."""
    folder = planted_checkpoint(tmp_path / "model")
    found = load_statistics(profiled(folder, tmp_path))
    assert {*LETTERS["credit"]}.isdisjoint(LETTERS["wealth"])
    for domain, experts in DOMAINS.items():
        counts = found.of(domain).counts
        assert counts[:, list(experts)].min() > 0
        assert counts.sum() == counts[:, list(experts)].sum() == 3 * 2 * 300


@pytest.mark.parametrize("out_of", ["json", "table"])
def test_plans_can_be_compared(tmp_path: Path, out_of: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = planted_checkpoint(tmp_path / "model")
    statistics = profiled(folder, tmp_path)
    for domain in DOMAINS:
        planned(folder, statistics, tmp_path / f"{domain}.json", "--scenario", domain, "--keep", "4")
    capsys.readouterr()
    files = [str(tmp_path / f"{domain}.json") for domain in DOMAINS]
    assert main(["diff", files[0], files[0]]) == 0
    capsys.readouterr()
    assert main(["diff", *files, *(["--json"] if out_of == "json" else [])]) == 3
    told = capsys.readouterr().out
    if out_of == "json":
        found = json.loads(told)
        assert found["kept"] == [12, 12] and found["jaccard"] == pytest.approx(1 / 7)
        assert found["layers"][0]["both"] == [0] and found["layers"][0]["first_only"] == [2, 4, 6]
    else:
        assert "layer 0: 1 in common; the first alone 2, 4, 6; the second alone 3, 5, 7" in told
