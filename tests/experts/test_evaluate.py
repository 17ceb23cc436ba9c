"""The evaluation: intervals with known answers, loops, cuts of equal bytes, and who gets a certificate."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from world import tiny_checkpoint

from moe_runtime.errors import PlanError
from moe_runtime.experts import documents
from moe_runtime.experts.__main__ import main
from moe_runtime.experts.certificate import Certificate
from moe_runtime.experts.divergence import TokenDivergences
from moe_runtime.experts.evaluation import Limits, baselines, objections, same_counts
from moe_runtime.experts.generations import Pair, loops, summarise
from moe_runtime.experts.intervals import Bootstrap, divergence_intervals
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.statistics_file import load_statistics
from moe_runtime.output import Completion
from moe_runtime.plan import ExpertMask, LayerMask

SMALL = ["--max-batch-tokens", "64", "--block-size", "8", "--no-packed-file"]


# --- numbers ------------------------------------------------------------------------------------------------


def test_an_interval_of_a_constant_is_that_constant() -> None:
    found = Bootstrap(5, seed=0).mean(np.full(5, 6.0), np.full(5, 3.0))
    assert (found.value, found.low, found.high) == (2.0, 2.0, 2.0)


def test_the_bootstrap_of_a_mean_has_the_width_that_theory_says() -> None:
    values = np.random.Generator(np.random.PCG64(1)).normal(size=400)
    found = Bootstrap(400, seed=2).mean(values, np.ones(400))
    expected = 2 * 1.96 * values.std() / np.sqrt(400)
    assert abs((found.high - found.low) / expected - 1) < 0.15
    assert found.low < found.value < found.high
    again = Bootstrap(400, seed=2).mean(values, np.ones(400))
    assert again == found and Bootstrap(400, seed=3).mean(values, np.ones(400)) != found


def test_documents_are_drawn_whole() -> None:
    """100 equal tokens of each of two documents say no more than one token of each."""
    owners = np.repeat([0, 1], 100)
    values = owners.astype(float)
    found = Bootstrap(2, seed=0).mean(np.bincount(owners, values), np.bincount(owners).astype(float))
    assert (found.low, found.high) == (0.0, 1.0)
    assert Bootstrap(2, seed=0).quantile(values, owners, 0.95).low == 0.0


def test_quantiles_are_values_that_occur() -> None:
    owners = np.arange(200, dtype=np.int64)
    found = Bootstrap(200, seed=0).quantile(np.arange(200.0), owners, 0.95)
    assert found.value == np.quantile(np.arange(200.0), 0.95, method="higher")
    assert found.low <= found.value <= found.high and found.low == int(found.low)


def test_intervals_of_a_divergence_hold_its_plain_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    kl = torch.rand(90, generator=generator, dtype=torch.float64)
    found = TokenDivergences(
        torch.arange(90) // 9,
        torch.arange(90) % 9,
        kl,
        kl < 0.5,
        torch.ones(90).double(),
        torch.ones(90).double() + kl,
    )
    told, plain = divergence_intervals(found, 0), found.summary()
    assert told["kl_mean"]["value"] == pytest.approx(plain.kl_mean, rel=1e-12)
    assert told["kl_p99"]["value"] == plain.kl_p99 and told["documents"] == 10 and told["tokens"] == 90
    assert told["top1"]["value"] == pytest.approx(plain.top1)
    assert told["nll_change"]["value"] == pytest.approx(plain.kl_mean)
    assert all(
        told[name]["low"] <= told[name]["value"] <= told[name]["high"] for name in ("kl_mean", "kl_p95")
    )


# --- answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3], False),
        ([7] * 11, False),
        ([5, 6, 7] + [7] * 12, True),
        ([1, 2, 3] * 4, True),
        ([9, 1, 2, 3] + [1, 2, 3] * 3, True),
        ([1, 2, 3] * 4 + [4], False),
        (list(range(40)) * 4, True),
        (list(range(40)) * 3, False),
        ([1, 2, 3, 4] * 2 + [1, 2, 3, 5], False),
    ],
)
def test_a_loop_is_a_stretch_said_four_times(tokens: list[int], expected: bool) -> None:
    assert loops(tokens) is expected


def completion(text: str, tokens: int = 3, reason: str = "stop") -> Completion:
    return Completion(0, text, tuple(range(tokens)), None, reason)  # type: ignore[arg-type]


def test_answers_are_counted_as_right_wrong_and_flipped() -> None:
    pairs = [
        Pair(completion("yes"), completion("yes "), "yes"),
        Pair(completion("yes"), completion("no", 6), "yes"),
        Pair(completion("no"), completion("yes", 3, "length"), "yes"),
        Pair(completion("a"), completion("a"), None),
    ]
    found = summarise(pairs)
    assert found["exact_match"] == {
        "questions": 3, "full": 2 / 3, "masked": 2 / 3, "right_to_wrong": 1, "wrong_to_right": 1,
    }  # fmt: skip
    assert found["natural_end"] == {"full": 1.0, "masked": 0.75} and found["length_ratio"] == 15 / 12
    assert found["same_text"] == 0.25 and found["loop_rate"] == {"full": 0.0, "masked": 0.0}


def a_set(high: float = 0.01, p99: float = 0.1, masked: float = 1.0, loop: float = 0.0) -> dict[str, object]:
    return {
        "name": "credit",
        "divergence": {"kl_mean": {"value": high / 2, "high": high}, "kl_p99": {"value": p99}},
        "answers": {
            "loop_rate": {"full": 0.0, "masked": loop},
            "exact_match": {"full": 1.0, "masked": masked},
        },
    }


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (a_set(), None),
        (a_set(high=0.051), "mean KL is 0.0255 nats, up to 0.0510"),
        (a_set(p99=1.1), "p99 KL is 1.100"),
        (a_set(masked=0.98), "98.0% of the answers are right"),
        (a_set(loop=0.02), "2.0% of the answers loop"),
    ],
)
def test_each_limit_objects_by_itself(found: dict[str, object], message: str | None) -> None:
    told = objections([found], Limits())
    assert told == [] if message is None else (len(told) == 1 and message in told[0])


# --- baselines ----------------------------------------------------------------------------------------------


def test_other_cuts_keep_as_many_per_layer_and_group() -> None:
    mask = ExpertMask((LayerMask(0, 8, (0, 1, 2, 7)), LayerMask(2, 8, (4, 5))))
    scores = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8], [0, 0, 0, 0, 1, 1, 1, 1]]).double()
    assert same_counts(scores, mask, 1).kept == {0: (4, 5, 6, 7), 2: (4, 5)}
    assert same_counts(scores, mask, 2).kept == {0: (1, 2, 3, 7), 2: (4, 5)}


# --- the command --------------------------------------------------------------------------------------------


def write_texts(folder: Path, name: str, seed: int, count: int) -> Path:
    generator = random.Random(seed)
    words = ["rate", "loan", "fund", "card", "fee", "term", "risk", "limit", "day", "bank"]
    lines = [json.dumps({"text": " ".join(generator.choices(words, k=30))}) for _ in range(count)]
    path = folder / name
    path.mkdir(parents=True)
    (path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, its profile and a plan of 7 of 8 experts for credit."""
    folder = tmp_path_factory.mktemp("evaluate")
    model = tiny_checkpoint(folder)
    calibration = write_texts(folder, "calibration", 1, 30)
    write_texts(folder, "test/credit", 2, 12)
    write_texts(folder, "test/wealth", 3, 8)
    common = ["--model", str(model), *SMALL]
    statistics, plan = str(folder / "s.safetensors"), str(folder / "plan.json")
    assert main(["profile", f"credit={calibration}", "--out", statistics, *common]) == 0
    assert main(["plan", "--statistics", statistics, "--keep", "7", "--out", plan, *common]) == 0
    (folder / "model_dir").write_text(str(model), encoding="utf-8")
    return folder


def evaluate(world: Path, *arguments: str) -> int:
    model = (world / "model_dir").read_text(encoding="utf-8")
    given = [
        "--model",
        model,
        "--plan",
        str(world / "plan.json"),
        "--statistics",
        str(world / "s.safetensors"),
    ]
    return main(["evaluate", *given, *SMALL, *arguments])


def test_a_plan_within_its_limits_gets_a_certificate_that_holds(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, certificate = tmp_path / "evaluation.json", tmp_path / "certificate.json"
    limits = ["--max-kl", "9", "--max-kl-p99", "9", "--out", str(out), "--certificate", str(certificate)]
    assert evaluate(world, str(world / "test"), *limits, "--json") == 0
    body = json.loads(capsys.readouterr().out)
    assert documents.load(out, "evaluation").body == body and body["passed"]
    assert {found["name"]: found["in_scenario"] for found in body["sets"]} == {
        "credit": True,
        "wealth": False,
    }
    assert set(body["baselines"]) == {"credit"} and len(body["baselines"]["credit"]) == 10
    plan = PlanFile.load(world / "plan.json")
    identity = ModelIdentity.of(Path((world / "model_dir").read_text(encoding="utf-8")))
    held = Certificate.load(certificate)
    assert held.check(plan.digest, plan.mask.digest, identity.to_json()) == []
    assert held.measured["kl_mean"] == body["sets"][0]["divergence"]["kl_mean"]["high"]


def test_a_plan_over_its_limits_is_refused_with_the_number(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certificate = tmp_path / "certificate.json"
    texts = [str(world / "test"), "--no-baselines", "--certificate", str(certificate)]
    assert evaluate(world, *texts, "--max-kl", "1e-9") == 2
    assert "REFUSED: credit: mean KL is" in capsys.readouterr().out
    assert not Certificate.load(certificate).passed


def test_few_test_documents_get_no_certificate(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, enough = write_texts(tmp_path, "few", 4, 9), write_texts(tmp_path, "enough", 5, 10)
    limits = ["--max-kl", "9", "--max-kl-p99", "9", "--no-baselines"]
    certificate = ["--certificate", str(tmp_path / "certificate.json")]
    assert evaluate(world, f"credit={few}", *limits, *certificate) == 1
    told = capsys.readouterr().err
    assert "'credit': 9 test documents are too few for a certificate, at least 10" in told
    assert "--max-tokens" in told and not (tmp_path / "certificate.json").exists()
    assert evaluate(world, f"credit={few}", *limits) == 0  # what was found is told all the same
    others = [f"credit={enough}", f"wealth={few}"]  # those of other scenarios are told, not certified
    assert evaluate(world, *others, *limits, *certificate) == 0
    assert (tmp_path / "certificate.json").exists()


def test_the_baselines_of_the_plan_have_its_bytes(world: Path) -> None:
    plan, statistics = PlanFile.load(world / "plan.json"), load_statistics(world / "s.safetensors")
    others = baselines(statistics, ["credit"], plan.mask)
    assert len(others) == 10 and all(mask.num_kept == plan.mask.num_kept for mask in others.values())
    assert others["easy_ep"] == plan.mask and len({others[f"random {seed}"] for seed in (1, 2, 3)}) > 1


def test_the_texts_that_made_the_plan_are_no_test(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(world, f"credit={world / 'calibration'}") == 1
    assert "30 of 30 documents are among the texts that the plan was made from" in capsys.readouterr().err


def test_a_test_without_the_scenario_is_refused(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(world, f"wealth={world / 'test' / 'wealth'}") == 1
    assert "no test text of the plan's scenario 'credit'" in capsys.readouterr().err


def test_limits_must_be_positive(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(world, str(world / "test"), "--max-kl", "0") == 1
    assert "--max-kl 0.0: must be above 0" in capsys.readouterr().err


def test_a_changed_plan_is_refused(world: Path, tmp_path: Path) -> None:
    changed = tmp_path / "plan.json"
    changed.write_text((world / "plan.json").read_text(encoding="utf-8").replace('"seed": 0', '"seed": 1'))
    with pytest.raises(PlanError, match="it was changed since it was written"):
        PlanFile.load(changed)


def test_simulate_tells_the_same_divergence(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(world, str(world / "test"), "--no-baselines", "--json") in (0, 2)
    evaluated = json.loads(capsys.readouterr().out)
    model, plan = (world / "model_dir").read_text(encoding="utf-8"), str(world / "plan.json")
    given = ["--model", model, "--plan", plan, *SMALL, "--json"]
    assert main(["simulate", str(world / "test"), *given]) == 0
    sets = json.loads(capsys.readouterr().out)[plan]["sets"]
    assert sets == {found["name"]: found["divergence"] for found in evaluated["sets"]}
