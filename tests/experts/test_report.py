"""The report: its numbers are the files', its page is whole and alone, and what is missing is said."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from report_files import (
    HOSTILE,
    KEPT,
    SPEED,
    answers,
    divergence,
    evaluation_file,
    plan_file,
    report,
    statistics_file,
    whole,
)

from moe_runtime.errors import ConfigError, PlanError
from moe_runtime.experts import documents
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.report import Inputs, gather
from moe_runtime.experts.report_importance import gini
from moe_runtime.experts.report_tables import recovery_table

VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


class Page(HTMLParser):
    """Fails on a tag that is closed out of order; keeps what a reader would see."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    report(whole(folder, ["credit", HOSTILE]), folder / "out")
    return folder


def test_the_page_is_well_formed_and_needs_nothing_else(made: Path) -> None:
    page = Page(made / "out" / "report.html")
    tags = [tag for tag, _ in page.seen]
    assert tags.count("svg") == 7 and "script" not in tags and "link" not in tags
    names = [attributes["id"] for _, attributes in page.seen if "id" in attributes]
    assert len(names) == len(set(names)), "two parts of one name would take each other's clip paths"
    for _, attributes in page.seen:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"href", "xlink:href", "src"}:
                assert value is not None and value.startswith("#") and value[1:] in names
    raw = (made / "out" / "report.html").read_text()
    assert not re.search(r"https?:|//\w|@import|<!--", raw)
    for reference in re.findall(r"url\(#([^)]*)\)", raw):
        assert reference in names


def test_every_text_of_a_file_is_escaped(made: Path) -> None:
    raw = (made / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script" not in raw and "some <cpu>" not in raw
    text = "".join(Page(made / "out" / "report.html").text)
    assert HOSTILE in text and "some <cpu>" in text
    lines = (made / "out" / "report.md").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if "<script" in line]
    for row in (line for line in lines if line.startswith("|")):
        assert re.sub(r"\\.", "", row).count("|") >= 4 and row.endswith("|")


def test_numbers_are_the_files(made: Path) -> None:
    body = documents.load(made / "out" / "report.json", "report").body
    plan, evaluation = body["plans"][0], body["evaluations"][0]
    written = documents.load(made / "p0" / "evaluation.json", "evaluation")
    for mine, theirs in zip(evaluation["sets"], written.body["sets"], strict=True):
        assert mine["answers"] == theirs["answers"]
        assert mine["divergence"].items() <= theirs["divergence"].items()
    assert evaluation["baselines"]["credit"]["frequency"]["kl_mean"]["value"] == 0.0271828
    assert plan["kept"] == {"1": [0, 1, 2], "2": [0, 2, 4]} and plan["bytes"] == {"full": 1000, "kept": 600}
    assert [plan["verdict"] for plan in body["plans"]] == ["passed", "refused"]
    assert body["overlap"]["jaccard"][0][1] == 3 / 9 and body["overlap"]["common"][0][1] == 3
    assert body["scenarios"]["credit"]["tokens"] == 321 and body["scenarios"]["credit"]["unseen"] == [1, 0]
    speeds = {row["way"]: row["tokens_per_s"] for row in body["serving"]["rows"]}
    assert speeds == {"full": {"1": 40.0, "8": 100.0}, "physical": {"1": 50.0, "8": 150.0}}
    text = "".join(Page(made / "out" / "report.html").text)
    for number in ("0.031 (0.027–0.035)", "93.8% → 87.5%", "96.9%", "4,321", "0.777 (0.680–0.874)"):
        assert number in text and number in (made / "out" / "report.md").read_text()


def test_every_number_says_where_it_came_from(made: Path) -> None:
    document = documents.load(made / "out" / "report.json", "report")
    sources = {source["file"]: source for source in document.body["sources"]}
    assert document.inputs == {file: source["digest"] for file, source in sources.items()}
    assert list(sources) == [
        "all.stats.safetensors", "p0/plan.json", "p1/plan.json", "p0/evaluation.json", "p1/evaluation.json",
        "speed.json",
    ]  # fmt: skip
    plan = documents.load(made / "p0" / "plan.json", "plan")
    assert sources["p0/plan.json"]["command"] == plan.command
    text = "".join(Page(made / "out" / "report.html").text)
    for source in sources.values():
        assert source["digest"] in text and source["command"] in text
    assert document.digest in text and document.digest in (made / "out" / "report.md").read_text()


def test_the_same_files_make_the_same_bytes(made: Path, tmp_path: Path) -> None:
    report(whole(tmp_path, ["credit", HOSTILE]), tmp_path / "out")
    for name in ("report.html", "report.json", "report.md"):
        assert (tmp_path / "out" / name).read_bytes() == (made / "out" / name).read_bytes(), name


def test_sentences_follow_from_the_numbers(tmp_path: Path) -> None:
    whole(tmp_path, list(KEPT))
    folders = [tmp_path / "p0", tmp_path / "p1"]
    found = gather(
        Inputs(
            tmp_path / "all.stats.safetensors",
            [folder / "plan.json" for folder in folders],
            [folder / "evaluation.json" for folder in folders],
            tmp_path / "speed.json",
        )
    )["findings"]
    assert found["keep_map"] == [
        "Of 12 experts 6 are kept by one plan alone, 3 by all 2, and 3 by none: a server of all 2 needs 9."
    ]
    assert found["overlap"] == ["credit and wealth share the most: 33% of the experts that either keeps."]
    assert "credit: 0.031 nats in its scenario; outside it 1.23 or more" in found["blast"][0]
    assert "fall by 87.5 points on average; wealth keeps most: 93.8% → 6.2%" in found["blast"][0]
    assert "0.777 for random cuts of the same bytes; lower still: frequency (0.027)" in found["baselines"][0]
    assert found["serving"] == [
        "physical credit against the full model: tokens per second 1.25x at 1, 1.50x at 8."
    ]


def test_a_recovery_is_told_beside_the_plan_alone(tmp_path: Path) -> None:
    statistics = statistics_file(tmp_path, list(KEPT))
    plan = plan_file(tmp_path / "plan.json", statistics, "credit", KEPT["credit"])
    change = {"value": -0.0123, "low": -0.02, "high": -0.005}
    told = {
        "applied": "constants",
        "tried": [
            {"kind": "constants", "digest": "1" * 64, "bytes": 2048, "helps": True, "change": {}},
            {"kind": "router", "digest": "2" * 64, "bytes": 96, "helps": False, "change": {}},
        ],
        "sets": {
            "credit": {
                "alone": {"divergence": divergence(0.0437159), "answers": answers(0.9375, 0.75)},
                "constants": {
                    "divergence": divergence(0.0314159), "change": change, "answers": answers(0.9375, 0.875),
                },
                "router": {
                    "divergence": divergence(0.0441), "change": {**change, "value": 0.0004, "high": 0.001},
                    "answers": None,
                },
            }
        },
    }  # fmt: skip
    evaluation_file(tmp_path / "evaluation.json", plan, recovery=told)
    files = ["--plan", str(tmp_path / "plan.json"), "--evaluation", str(tmp_path / "evaluation.json")]
    body = report(["--statistics", str(tmp_path / "all.stats.safetensors"), *files], tmp_path / "out")
    assert body["findings"]["recovery"] == [
        "credit: mean KL changes by constants -28%, router +1%; constants is applied."
    ]
    assert "credit: 0.044 nats against 0.777 for random cuts" in body["findings"]["baselines"][0]
    rows = {row[2]: row for row in recovery_table(body).rows}
    assert rows["the plan alone"][3:] == [
        "0.044 (0.038–0.049)", "–", "0.350", "93.8% → 75.0%", "–", "no",
    ]  # fmt: skip
    assert rows["with constants"][4:] == [
        "-0.0123 (-0.0200 to -0.0050)", "0.251", "93.8% → 87.5%", "2.0 KB", "applied",
    ]  # fmt: skip
    assert rows["with router correction"][-3:] == ["–", "0.1 KB", "does not help"]
    text = "".join(Page(tmp_path / "out" / "report.html").text)
    for found in ("Does it help to make up for missing experts?", "constants, 2.0 KB", "with router"):
        assert found in text
    assert "| with constants |" in (tmp_path / "out" / "report.md").read_text()


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    statistics = statistics_file(tmp_path, list(KEPT))
    alone = ["--statistics", str(tmp_path / "all.stats.safetensors")]
    body = report(alone, tmp_path / "out")
    assert body["plans"] == [] and "No plan was given" in body["missing"][0]
    plan_file(tmp_path / "p0" / "plan.json", statistics, "credit", KEPT["credit"], curve=())
    body = report([*alone, "--plan", str(tmp_path / "p0" / "plan.json")], tmp_path / "out")
    text = "".join(Page(tmp_path / "out" / "report.html").text)
    assert body["plans"][0]["verdict"] == "not evaluated" and "✓ passed" not in text
    for told in (
        "Scenario wealth was profiled, but no plan",
        "Plan credit has no evaluation, so nothing is known of what it costs",
        "Plan credit was sized by number, without measuring",
        "No speed or memory",
    ):
        assert told in text and told in (tmp_path / "out" / "report.md").read_text()


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    statistics = statistics_file(tmp_path, list(KEPT))
    inputs = Inputs(tmp_path / "all.stats.safetensors")
    path = tmp_path / "p0" / "plan.json"
    plan = plan_file(path, statistics, "credit", KEPT["credit"])
    other = replace(statistics, model=ModelIdentity("d" * 64, "b" * 64, "c" * 64))
    plan_file(tmp_path / "other.json", other, "credit", KEPT["credit"])
    with pytest.raises(PlanError, match="other.json was made for another model: its weights differ"):
        gather(replace(inputs, plans=[tmp_path / "other.json"]))
    plan_file(tmp_path / "old.json", replace(statistics, digest="e" * 64), "credit", KEPT["credit"])
    with pytest.raises(PlanError, match="old.json: made from other statistics"):
        gather(replace(inputs, plans=[tmp_path / "old.json"]))
    evaluation_file(tmp_path / "evaluation.json", plan)
    with pytest.raises(PlanError, match="evaluation.json: evaluates the plan .* not among --plan"):
        gather(replace(inputs, evaluations=[tmp_path / "evaluation.json"]))
    with pytest.raises(PlanError, match="plan.json: given twice"):
        gather(replace(inputs, plans=[path, path]))
    evaluation_file(tmp_path / "odd.json", plan, sets=[{"name": "credit"}])
    with pytest.raises(PlanError, match=r"odd.json: not an evaluation of this version: KeyError\('in_sc"):
        gather(replace(inputs, plans=[path], evaluations=[tmp_path / "odd.json"]))
    evaluation_file(tmp_path / "mask.json", plan, mask_digest="f" * 64)
    with pytest.raises(PlanError, match="its mask is not the one of plan.json"):
        gather(replace(inputs, plans=[path], evaluations=[tmp_path / "mask.json"]))


def test_plans_of_one_scenario_are_told_apart(tmp_path: Path) -> None:
    statistics = statistics_file(tmp_path, list(KEPT))
    for name, kept in (("small", KEPT["credit"]), ("large", ((0, 1, 2, 3), (0, 2, 4, 5)))):
        plan_file(tmp_path / f"{name}.json", statistics, "credit", kept)
    body = gather(
        Inputs(tmp_path / "all.stats.safetensors", [tmp_path / "small.json", tmp_path / "large.json"])
    )
    assert [plan["label"] for plan in body["plans"]] == ["credit (small.json)", "credit (large.json)"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.pop("rows"), "KeyError"),
        (lambda value: value["rows"].clear(), "no row"),
        (lambda value: value["rows"][0].update(way="magic"), "way 'magic'"),
        (lambda value: value["rows"][0].update(start_s=-1), "above 0"),
        (lambda value: value["rows"][0].update(tokens_per_s={"many": 1.0}), "many"),
    ],
)
def test_measurements_that_make_no_sense_are_refused(
    tmp_path: Path, change: Callable[[Any], object], message: str
) -> None:
    statistics_file(tmp_path, list(KEPT))
    value = json.loads(json.dumps(SPEED))
    change(value)
    (tmp_path / "speed.json").write_text(json.dumps(value))
    with pytest.raises(PlanError, match=f"^speed.json: .*{message}"):
        gather(Inputs(tmp_path / "all.stats.safetensors", serving=tmp_path / "speed.json"))


def test_the_bench_s_own_file_is_read(tmp_path: Path) -> None:
    def median(value: float) -> dict[str, float]:
        return {"median": value, "q1": 0.0, "q3": 9e9, "n": 3}

    value = {
        "machine": "m", "command": "c", "scenario": "credit",
        "starts": {
            "all experts": {"ready_s": median(3.0), "rss_bytes": median(9e8)},
            "kept experts": {"ready_s": median(2.0), "rss_bytes": median(5e8)},
        },
        "concurrency": {"1": {way: {"tokens_per_s": median(10.0)} for way in ("full", "mixed", "physical")}},
    }  # fmt: skip
    statistics_file(tmp_path, list(KEPT))
    (tmp_path / "speed.json").write_text(json.dumps(value))
    body = gather(Inputs(tmp_path / "all.stats.safetensors", serving=tmp_path / "speed.json"))
    full, mixed, physical = body["serving"]["rows"]
    assert (full["way"], full["start_s"], full["scenario"]) == ("full", 3.0, "")
    assert (mixed["way"], mixed["rss_bytes"], mixed["tokens_per_s"]) == ("mixed", None, {"1": 10.0})
    assert (physical["scenario"], physical["rss_bytes"]) == ("credit", 5e8)


def test_gini_by_its_definition() -> None:
    """Half the mean absolute difference over the mean, of all pairs."""
    shares = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.25] * 4, [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    literal = (shares.unsqueeze(-1) - shares.unsqueeze(-2)).abs().mean((-1, -2)) / (2 * shares.mean(-1))
    assert torch.allclose(gini(shares), literal, rtol=0, atol=1e-15)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    statistics_file(tmp_path, list(KEPT))
    with pytest.raises(ConfigError, match="--out .*No such file"):
        report(["--statistics", str(tmp_path / "all.stats.safetensors")], tmp_path / "no" / "such")
