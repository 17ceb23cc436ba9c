"""Drift: how often it cries wolf, how soon it finds foreign traffic, and what its log must look like."""

import argparse
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median, stdev

import pytest
from drift_traffic import SCENARIOS, Traffic

from moe_runtime.errors import PlanError
from moe_runtime.experts.commands_drift import DRIFT_FOUND, add_arguments, run
from moe_runtime.experts.drift import REQUESTS_PER_DAY, Detector, Observation, examine, read_log, run_length

REFERENCE = 2000


def alarms(detector: Detector, masses: list[float]) -> list[int]:
    """At which request, counted from 1."""
    found = (detector.add(Observation(0.0, "x", mass)) for mass in masses)
    return [alarm.index + 1 for alarm in found if alarm is not None]


def test_own_traffic_raises_less_than_one_alarm_a_day() -> None:
    days, false_alarms = 0, 0
    for seed, scenario in enumerate(SCENARIOS * 2):
        traffic = Traffic(scenario, seed)
        detector = Detector(traffic.own(REFERENCE))
        false_alarms += len(alarms(detector, traffic.own(REQUESTS_PER_DAY)))
        days += 1
    assert days == 6 and false_alarms <= 2, false_alarms


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_tenth_of_foreign_traffic_is_found_within_500_requests(scenario: str) -> None:
    delays = []
    for seed in range(60):
        traffic = Traffic(scenario, 1000 + seed)
        found = alarms(Detector(traffic.own(REFERENCE)), traffic.mixed(500, 0.1))
        delays.append(found[0] if found else 10_000)
    within = sum(delay <= 500 for delay in delays)
    assert within >= 58 and median(delays) < 200, (within, median(delays))


def test_the_time_between_alarms_is_that_of_the_chain() -> None:
    """Of a walk of 500 equally likely scores, simulated, to within 5 standard errors."""
    limit, draw = 3.0, random.Random(1)
    scores = [draw.gauss(-0.2, 0.7) for _ in range(500)]
    lengths = []
    for _ in range(4000):
        evidence, steps = 0.0, 0
        while evidence <= limit:
            evidence, steps = max(0.0, evidence + draw.choice(scores)), steps + 1
        lengths.append(steps)
    error = stdev(lengths) / math.sqrt(len(lengths))
    assert run_length(scores, limit) == pytest.approx(mean(lengths), abs=5 * error)


def test_an_alarm_says_when_it_began_and_the_next_one_starts_from_nothing() -> None:
    traffic = Traffic("credit", 5)
    reference = [Observation(0.0, "credit", mass) for mass in traffic.own(REFERENCE)]
    masses = traffic.own(1500) + traffic.draw("wealth", 200)
    log = [Observation(float(index), "credit", mass) for index, mass in enumerate(masses)]
    finding = examine(reference, log)[0]
    first = finding.alarms[0]
    assert 1400 <= first.since <= 1520 and first.index - 1500 < 30 and first.time == first.index
    assert len(finding.alarms) > 5 and finding.mean > finding.reference_mean
    assert finding.largest_evidence > finding.limit >= finding.evidence


def test_equal_masses_are_no_evidence() -> None:
    detector = Detector([0.0] * 500)
    assert not alarms(detector, [0.0] * 5000) and detector.largest == 0.0
    assert alarms(detector, [0.5] * 20)


def test_too_little_to_judge_by_is_refused() -> None:
    with pytest.raises(PlanError, match="499 reference prompts are too few"):
        Detector([0.1] * 499)
    with pytest.raises(PlanError, match="between 0 and 1, not 1"):
        Detector([0.1] * 500, share=1)
    reference = [Observation(0.0, "credit", 0.1)] * 500
    with pytest.raises(PlanError, match="nothing to examine"):
        examine(reference, [])
    with pytest.raises(PlanError, match="scenario 'wealth': 0 reference prompts"):
        examine(reference, [Observation(0.0, "wealth", 0.1)])


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[list[str]]:
    """The command's arguments for a reference and for a log that drifts."""
    traffic = Traffic("wealth", 6)
    rows = {"reference": traffic.own(REFERENCE), "log": traffic.own(600) + traffic.mixed(600, 0.3)}
    for name, masses in rows.items():
        lines = [
            json.dumps(
                {"time": 1e9 + index, "scenario": "wealth", "tokens": 9, "lost_mass": mass, "drift": None}
            )
            for index, mass in enumerate(masses)
        ]
        (tmp_path / name).write_text("\n".join(lines) + '\n{"time": 1, "scen')  # one is being written
    yield ["--log", str(tmp_path / "log"), "--reference", str(tmp_path / "reference")]


def command(arguments: list[str], *, as_json: bool = False) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return run(argparse.Namespace(**vars(parser.parse_args(arguments)), json=as_json))


def test_the_command_tells_people_and_machines(logs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(logs) == DRIFT_FOUND
    told = capsys.readouterr().out
    assert "wealth: 1200 requests" in told and "DRIFT at request" in told and "since about request" in told
    assert command(logs, as_json=True) == DRIFT_FOUND
    found = json.loads(capsys.readouterr().out)["scenarios"][0]
    assert found["alarms"][0]["index"] >= 600 and found["num_reference"] == REFERENCE
    same = ["--log", logs[3], "--reference", logs[3]]
    assert command(same) == 0 and "no drift" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("nonsense", "line 2: not a line of a drift log"),
        ('{"time": 1, "scenario": "a"}', "line 2: not a line of a drift log"),
        ('{"time": 1, "scenario": "a", "lost_mass": 1.5}', "line 2: a lost mass is from 0 to 1, not 1.5"),
        ("x" * 70_000, "line 2: too long"),
    ],
)
def test_what_is_no_log_is_refused_with_its_line(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "log"
    path.write_text(f'{{"time": 1, "scenario": "a", "lost_mass": 0.5}}\n{line}\n')
    with pytest.raises(PlanError, match=reason):
        list(read_log(path))
    with pytest.raises(PlanError, match="No such file"):
        list(read_log(tmp_path / "none"))
