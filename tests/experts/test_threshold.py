"""Thresholds of drift policies: what they promise, counted; and the command that proposes them."""

import json
import math
import random
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from drift_traffic import SCENARIOS, Traffic
from scenario_files import some_mask, write_recovery
from world import tiny_checkpoint

from moe_runtime.config import EngineConfig
from moe_runtime.drift_policy import DriftPolicy
from moe_runtime.engine import Engine
from moe_runtime.errors import PlanError
from moe_runtime.experts.__main__ import main
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.prompt_masses import prompt_masses
from moe_runtime.experts.registry import read_policy
from moe_runtime.experts.threshold import detect, propose
from moe_runtime.recovery import Recovery

SMALL = ["--max-batch-tokens", "64", "--block-size", "8", "--no-packed-file"]


def test_the_promise_holds_as_often_as_it_says() -> None:
    """Masses uniform to 0.5: the share above t is 1 - 2t. Of 2000 sets of prompts the promise may be
    broken by 5 %, and by chance (four standard deviations) by 1.95 % more.
    """
    rng = random.Random(1)
    for count, rate in ((299, 0.01), (500, 0.02), (150, 0.1)):
        broken = sum(
            1 - 2 * propose([rng.random() / 2 for _ in range(count)], rate).threshold > rate
            for _ in range(2000)
        )
        assert broken / 2000 <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 2000), (count, rate, broken)
        assert broken > 20, "it promises far less than it could"


def test_equal_masses_keep_the_promise_all_the_more() -> None:
    found = propose([0.25] * 299)
    assert (found.threshold, found.num_above) == (0.25, 0)
    rng = random.Random(2)
    for _ in range(200):
        threshold = propose([rng.choice([0.1, 0.2, 0.3]) for _ in range(400)]).threshold
        assert threshold == 0.3


@pytest.mark.parametrize(
    ("count", "rate", "confidence"), [(299, 0.01, 0.95), (700, 0.01, 0.9), (90, 0.05, 0.9)]
)
def test_as_many_prompts_are_left_above_as_the_binomial_allows(
    count: int, rate: float, confidence: float
) -> None:
    exact, total, allowed = Fraction(str(rate)), Fraction(0), -1
    for number in range(count):
        total += math.comb(count, number) * exact**number * (1 - exact) ** (count - number)
        if total > 1 - Fraction(str(confidence)):
            break
        allowed = number
    found = propose([index / 1000 for index in range(count)], rate, confidence)
    assert found.num_above == allowed >= 0
    assert found.expected_rate == (allowed + 1) / (count + 1) <= rate


def test_too_few_prompts_are_told_how_many_are_needed() -> None:
    with pytest.raises(PlanError, match=r"298 own prompts are too few .* 299 are needed"):
        propose([0.1] * 298)
    with pytest.raises(PlanError, match=r"2000 own prompts are too few .* 2995 are needed"):
        propose([0.1] * 2000, 0.001)
    with pytest.raises(PlanError, match="0 own prompts are too few"):
        propose([])
    with pytest.raises(PlanError, match="a confidence is between 0 and 1, not 1"):
        propose([0.1] * 300, 0.01, 1)
    with pytest.raises(PlanError, match="no threshold tells foreign ones"):
        propose([1.0] * 300)


def test_a_threshold_of_rounded_masses_lets_the_prompt_itself_pass() -> None:
    found = propose([0.123456] * 299)  # a log's six digits of 0.1234564, say
    assert found.threshold == 0.1235 > 0.1234564


def test_detection_has_wilsons_interval() -> None:
    found = detect([0.6] * 10 + [0.5] * 90, 0.5)
    assert (found.num_above, found.share) == (10, 0.1)
    assert (found.low, found.high) == (pytest.approx(0.05523, abs=1e-5), pytest.approx(0.17437, abs=1e-5))
    assert detect([0.6] * 5, 0.5).high == 1.0 and detect([0.4] * 5, 0.5).low < 1e-15
    with pytest.raises(PlanError, match="no foreign prompt"):
        detect([], 0.5)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_on_the_demo_the_rate_is_kept_and_foreign_prompts_are_found(scenario: str) -> None:
    traffic = Traffic(scenario, 3)
    threshold = propose(traffic.own(1000)).threshold
    alarms = detect(traffic.own(20_000), threshold)
    assert alarms.share <= 0.01 + 4 * math.sqrt(0.01 / 20_000)
    for other in SCENARIOS:
        if other != scenario:
            assert detect(traffic.draw(other, 2000), threshold).low > alarms.high


def write_log(path: Path, masses: list[float], scenario: str = "wealth") -> Path:
    rows = (
        {"time": 1.0, "scenario": scenario, "tokens": 9, "lost_mass": mass, "drift": None} for mass in masses
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_turns_logs_into_a_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    traffic = Traffic("wealth", 4)
    own = write_log(tmp_path / "own.jsonl", traffic.own(800))
    other = write_log(tmp_path / "credit.jsonl", traffic.draw("credit", 300))
    words = ["policy", "--log", str(own), "--foreign-log", str(other)]
    assert main([*words, "--out", str(tmp_path / "policy.json"), "--action", "reject"]) == 0
    told = capsys.readouterr().out
    assert "of own prompts to come" in told and "credit: " in told and " of 300 prompts are above it" in told
    policy = read_policy(tmp_path / "policy.json")
    expected = propose(Traffic("wealth", 4).own(800)).threshold
    assert policy == DriftPolicy(expected, "reject")
    assert main([*words, "--json", "--false-alarms", "0.1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["policy"]["action"] == "flag" and found["threshold"] < expected
    assert found["detected"]["credit"]["num_prompts"] == 300


def test_no_foreign_log_gets_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = write_log(tmp_path / "own.jsonl", Traffic("wealth", 4).own(400))
    (tmp_path / "b").mkdir()
    first = write_log(tmp_path / "foreign.jsonl", [0.5] * 3)
    second = write_log(tmp_path / "b" / "foreign.log", [0.6] * 3)
    words = ["policy", "--log", str(own), "--foreign-log", str(first), "--foreign-log"]
    assert main([*words, str(second)]) == 1
    told = capsys.readouterr().err
    assert f"--foreign-log {second}: {first} is called 'foreign' as well" in told
    empty = write_log(tmp_path / "empty.jsonl", [0.5], "credit")
    assert main([*words, str(empty)]) == 1
    assert f"{empty}: there is no foreign prompt to detect: none of 'wealth'" in capsys.readouterr().err


def test_what_cannot_be_proposed_from_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = write_log(tmp_path / "own.jsonl", [0.1] * 10)
    both = write_log(tmp_path / "both.jsonl", [0.1])
    both.write_text(both.read_text() + own.read_text().replace("wealth", "credit"))
    folder = str(tmp_path)
    for words, reason in (
        (["--log", str(own)], "scenario 'wealth': 10 own prompts are too few"),
        (["--log", str(own), "--scenario", "credit"], "has no prompt of such a scenario"),
        (["--log", str(both)], "has credit, wealth; --scenario chooses one"),
        (["--log", str(own), "--model", folder], "leave out --model"),
        (["--log", str(own), folder], "leave out the texts"),
        ([folder, "--model", folder], "or --model, --plan, --statistics and texts"),
        (["--foreign-log", str(own)], "belong to --log"),
    ):
        assert main(["policy", *words]) == 1
        assert reason in capsys.readouterr().err
    assert not (tmp_path / "policy.json").exists()


def write_texts(folder: Path, name: str, letters: str, count: int, seed: int) -> Path:
    rng = random.Random(seed)
    lines = ("".join(rng.choices(letters, k=rng.randint(10, 30))) for _ in range(count))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return folder / f"{name}.jsonl"


def test_the_command_measures_texts_that_the_plan_has_not_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_checkpoint(tmp_path / "model"))
    seen = write_texts(tmp_path, "seen", "abcdef", 40, 1)
    statistics, plan = str(tmp_path / "x.stats.safetensors"), str(tmp_path / "plan.json")
    assert main(["profile", "--model", model, "--out", statistics, f"credit={seen}", *SMALL]) == 0
    words = ["--model", model, "--statistics", statistics]
    assert main(["plan", *words, "--out", plan, "--keep", "4", *SMALL]) == 0
    words = ["policy", *words, "--plan", plan, *SMALL]
    own = write_texts(tmp_path, "own", "abcdef", 60, 2)
    other = write_texts(tmp_path, "other", "UVWXYZ", 30, 3)
    rate = ["--false-alarms", "0.1", "--json"]
    capsys.readouterr()
    assert main([*words, f"credit={own}", f"other={other}", *rate]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["scenario"], found["num_prompts"]) == ("credit", 60)
    assert found["detected"]["other"]["share"] > 0.5 and 0 < found["threshold"] < 1
    assert PlanFile.load(Path(plan)).name == "credit"
    assert main([*words, f"credit={seen}", *rate]) == 1
    assert "are among the texts that the plan was made from" in capsys.readouterr().err
    assert main([*words, f"other={other}", *rate]) == 1
    assert "no text of the plan's scenario 'credit'" in capsys.readouterr().err


@pytest.mark.parametrize("applied", [True, False])
def test_a_recovery_that_the_certificate_applies_must_be_named(
    tmp_path: Path, applied: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    seen = write_texts(tmp_path, "seen", "abcdef", 40, 1)
    statistics, folder = str(tmp_path / "x.stats.safetensors"), tmp_path / "credit"
    folder.mkdir()
    words = ["--model", str(model), "--statistics", statistics]
    profile = ["profile", "--model", str(model), "--out", statistics]
    assert main([*profile, f"credit={seen}", *SMALL]) == 0
    plan = str(folder / "plan.json")
    assert main(["plan", *words, "--out", plan, "--keep", "4", *SMALL]) == 0
    write_recovery(tmp_path, model, "credit", "router", applied=applied)
    own = write_texts(tmp_path, "own", "abcdef", 60, 2)
    command = ["policy", *words, "--plan", plan, f"credit={own}", "--false-alarms", "0.1", *SMALL]
    assert main(command) == (1 if applied else 0)
    named = ["--recovery", str(folder / "recovery.safetensors")]
    assert (f"add {' '.join(named)}" in capsys.readouterr().err) is applied
    assert main([*command, *named]) == 0


def test_a_recovery_is_applied_while_the_masses_are_measured(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model", num_hidden_layers=3)
    engine = Engine.load(model, EngineConfig(max_context=64, cache_bytes=1 << 22, packed_file=False))
    mask = some_mask(model, 4, 0)
    constants = {layer.layer: torch.ones(8 - len(layer.kept), 32) for layer in mask.layers}
    prompts = [list(range(start, start + 12)) for start in (40, 90)]
    plain = prompt_masses(engine, mask, prompts)
    assert prompt_masses(engine, mask, prompts) == plain
    assert prompt_masses(engine, mask, prompts, recovery=Recovery("constants", constants)) != plain
