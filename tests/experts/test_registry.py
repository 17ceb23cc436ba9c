"""The scenarios folder: what may be served, and what each wrong file gets."""

import json
from pathlib import Path

import pytest
from scenario_files import some_mask, write_certificate, write_plan, write_scenario
from world import edit_config, tiny_checkpoint

from moe_runtime.drift_policy import DriftPolicy
from moe_runtime.errors import ConfigError, PlanError
from moe_runtime.experts.certificate import Certificate
from moe_runtime.experts.registry import Registry, placement_of, scenario_folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "model")


@pytest.fixture
def folder(model: Path) -> Path:
    """Two good scenarios."""
    for seed, name in enumerate(("credit", "wealth")):
        write_scenario(model / "scenarios", model, name, some_mask(model, 4, seed))
    return model / "scenarios"


def opened(folder: Path, model: Path, name: str, **options: bool) -> str:
    """Why it is refused."""
    with pytest.raises(PlanError) as caught:
        Registry(folder, model, **options).open(name)
    return str(caught.value)


def test_a_good_scenario_is_opened_with_its_mask_and_certificate(model: Path, folder: Path) -> None:
    assert scenario_folder(model, None) == folder
    registry = Registry(folder, model)
    assert registry.names() == ["credit", "wealth"]
    found = registry.open("credit")
    assert found.mask == some_mask(model, 4, 0) and found.policy is None and found.objections == ()
    summary = found.summary()
    assert (summary["experts_kept"], summary["experts"], summary["bytes"]) == (8, 16, 600)
    assert summary["certificate"] == {
        "valid": True,
        "objections": [],
        "measured": {"kl_mean": 0.02, "kl_p99": 0.3},
        "budget": {"kl_mean": 0.05, "kl_p99": 0.5},
    }
    json.dumps(summary)


def test_a_model_without_scenarios_has_no_folder_and_a_wrong_one_is_told(tmp_path: Path) -> None:
    assert scenario_folder(tmp_path, None) is None
    with pytest.raises(ConfigError, match="no such folder"):
        Registry(tmp_path / "none", tmp_path)


def test_the_union_of_masks_is_resident_and_the_rest_absent(model: Path, folder: Path) -> None:
    registry = Registry(folder, model)
    scenarios = [registry.open(name) for name in registry.names()]
    union = scenarios[0].mask.union(scenarios[1].mask)
    assert placement_of(scenarios).resident == union
    assert placement_of(scenarios[:1]).count("absent") == 8


def test_a_missing_certificate_is_refused_unless_that_is_allowed(model: Path, folder: Path) -> None:
    (folder / "credit" / "certificate.json").unlink()
    message = opened(folder, model, "credit")
    assert "its certificate is missing" in message and "--allow-uncertified" in message
    found = Registry(folder, model, allow_uncertified=True).open("credit")
    assert found.objections == ("its certificate is missing (certificate.json)",)
    assert found.summary()["certificate"]["valid"] is False


def test_a_certificate_of_another_plan_is_stale(model: Path, folder: Path) -> None:
    write_plan(folder, model, "credit", some_mask(model, 5, 9))
    assert "stale: it was made for another plan" in opened(folder, model, "credit")


def test_plan_and_certificate_of_another_model_are_stale(model: Path, folder: Path) -> None:
    tokenizer = model / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    message = opened(folder, model, "credit")
    assert "its plan was made for another model, with other tokenizer" in message
    assert "stale: it was measured with other tokenizer" in message
    edit_config(model, rope_theta=5000.0)
    assert "other config and tokenizer" in opened(folder, model, "credit")


def test_a_plan_over_budget_is_refused(model: Path, folder: Path) -> None:
    plan = write_plan(folder, model, "credit", some_mask(model, 4, 0))
    changes = {"measured": {"kl_mean": 0.2, "kl_p99": 0.3}, "passed": False, "reasons": ("loops",)}
    write_certificate(folder, model, "credit", plan, **changes)
    message = opened(folder, model, "credit")
    assert "over budget: kl_mean is 0.2 nats, the limit 0.05" in message
    assert "evaluation failed: loops" in message


def test_a_changed_byte_is_found(model: Path, folder: Path) -> None:
    for name in ("plan.json", "certificate.json"):
        path = folder / "credit" / name
        before = path.read_bytes()
        path.write_bytes(before.replace(b'"passed": true', b'"passed": true ').replace(b"600", b"601"))
        assert "was changed" in opened(folder, model, "credit", allow_uncertified=True)
        path.write_bytes(before)
    assert Registry(folder, model).open("credit").name == "credit"


def test_names_are_checked(model: Path, folder: Path) -> None:
    for name in ("../wealth", "cre dit", "", "a:b", "x" * 65):
        assert "a name has letters" in opened(folder, model, name)
    assert "no plan.json in its folder" in opened(folder, model, "nothing")
    (folder / "Credit").mkdir()
    with pytest.raises(
        PlanError, match="two scenarios of one name in scenarios: Credit and credit|credit and"
    ):
        Registry(folder, model).names()


def test_a_plan_in_the_wrong_folder_is_refused(model: Path, folder: Path) -> None:
    (folder / "credit").rename(folder / "mortgage")
    assert "made for scenario 'credit'" in opened(folder, model, "mortgage")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"threshold": 1.5, "action": "flag"}', "0 to 1, not 1.5"),
        ('{"threshold": 1, "action": "flag"}', "a threshold of 1 never acts"),
        ('{"threshold": true, "action": "flag"}', "0 to 1, not True"),
        ('{"threshold": 0.3, "action": "drop"}', "not 'drop'"),
        ('{"threshold": 0.3}', "policy.json must be"),
        ("{", "policy.json is no JSON"),
    ],
)
def test_a_wrong_policy_is_refused(model: Path, folder: Path, text: str, reason: str) -> None:
    (folder / "credit" / "policy.json").write_text(text)
    assert reason in opened(folder, model, "credit")


def test_a_policy_is_read(model: Path, folder: Path) -> None:
    (folder / "credit" / "policy.json").write_text('{"threshold": 0.3, "action": "reject"}')
    assert Registry(folder, model).open("credit").policy == DriftPolicy(0.3, "reject")


def test_a_certificate_must_say_what_it_certifies(model: Path, folder: Path, tmp_path: Path) -> None:
    plan = write_plan(folder, model, "credit", some_mask(model, 4, 0))
    with pytest.raises(PlanError, match="'measured' must say kl_p99"):
        write_certificate(folder, model, "credit", plan, measured={"kl_mean": 0.1})
    with pytest.raises(PlanError, match="budget.kl_mean must be a finite number"):
        write_certificate(folder, model, "credit", plan, budget={"kl_mean": float("nan"), "kl_p99": 1.0})
    made = write_certificate(folder, model, "credit", plan, scenario=("credit", "wealth"))
    assert Certificate.load(folder / "credit" / "certificate.json") == made
