"""A scenario's recovery.safetensors: applied when the certificate's numbers hold with it, and never else."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from scenario_files import (
    some_mask,
    write_certificate,
    write_plan,
    write_recovery,
    write_scenario,
)
from world import tiny_checkpoint

from moe_runtime.errors import PlanError
from moe_runtime.experts import documents
from moe_runtime.experts.__main__ import main
from moe_runtime.experts.certificate import Certificate
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.registry import Registry, Scenario
from moe_runtime.experts.rehearsal import Rehearsal

FILE = "recovery.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """With one scenario, credit."""
    model = tiny_checkpoint(tmp_path / "model")
    write_scenario(model / "scenarios", model, "credit", some_mask(model, 4, 0))
    return model


def opened(model: Path, *, allow_uncertified: bool = False) -> Scenario:
    return Registry(model / "scenarios", model, allow_uncertified=allow_uncertified).open("credit")


def refused(model: Path) -> str:
    with pytest.raises(PlanError) as caught:
        opened(model)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["constants", "router"])
def test_what_helps_is_applied_and_told(model: Path, kind: str) -> None:
    saved = write_recovery(model / "scenarios", model, "credit", kind)  # type: ignore[arg-type]
    found = opened(model)
    assert found.recovery is not None and found.recovery.digest == saved.recovery.digest
    size = {"constants": 2 * 4 * 32 * 4, "router": 2 * 8 * 4}[kind]
    assert found.summary()["recovery"] == {
        "applied": True, "kind": kind, "bytes": size, "digest": saved.digest,
    }  # fmt: skip
    json.dumps(found.summary())


def test_a_rehearsal_checks_a_recovery_and_writes_none(model: Path, tmp_path: Path) -> None:
    write_recovery(model / "scenarios", model, "credit", "constants")
    rehearsal, scenario = Rehearsal(model), opened(model)
    rehearsal.add(scenario)
    outlined = rehearsal._recoveries._model
    assert all(mixture.recovery.constants is None for _, mixture in outlined.mixtures())
    wider = tiny_checkpoint(tmp_path / "wider", hidden_size=64)
    other = Rehearsal(wider)
    for _ in range(2):  # what was refused is not there
        with pytest.raises(PlanError, match="'credit': its recovery of layer .* made for another model"):
            other.add(scenario)
    other.add(replace(scenario, recovery_file=None))


def test_without_a_file_there_is_nothing_to_tell(model: Path) -> None:
    found = opened(model)
    assert found.recovery is None and found.unused == "" and found.summary()["recovery"] is None


def test_what_does_not_help_is_left_out_and_the_plan_is_served(model: Path) -> None:
    write_recovery(model / "scenarios", model, "credit", "constants", applied=False)
    found = opened(model)
    assert found.recovery is None and found.objections == ()
    assert found.summary()["recovery"] == {
        "applied": False,
        "reason": f"{FILE}: its evaluation found that it does not help, or another one more",
    }


def test_what_nobody_evaluated_is_left_out(model: Path) -> None:
    folder = model / "scenarios"
    write_recovery(folder, model, "credit", "constants")
    plan = PlanFile.load(folder / "credit" / "plan.json")
    write_certificate(folder, model, "credit", plan)
    found = opened(model)
    assert found.recovery is None and found.objections == ()
    assert "is not what was evaluated; run `moe-experts evaluate --recovery`" in found.unused
    (folder / "credit" / FILE).write_bytes(b"nothing")
    assert "not a recovery file" in opened(model).unused
    (folder / "credit" / "certificate.json").unlink()
    found = opened(model, allow_uncertified=True)
    assert found.recovery is None and "not a recovery file" in found.unused


def test_a_certificate_that_holds_with_a_recovery_alone_needs_that_very_file(model: Path) -> None:
    folder = model / "scenarios" / "credit"
    write_recovery(model / "scenarios", model, "credit", "constants", seed=1)
    certificate = (folder / "certificate.json").read_bytes()
    changed = bytearray((folder / FILE).read_bytes())
    changed[-1] ^= 1
    (folder / FILE).write_bytes(bytes(changed))
    only = "its certificate holds with a recovery alone, and recovery.safetensors"
    assert f"{only}: it was changed since it was written" in refused(model)
    (folder / FILE).unlink()
    assert f"{only}: no such file" in refused(model)
    write_recovery(model / "scenarios", model, "credit", "constants", seed=2)
    (folder / "certificate.json").write_bytes(certificate)
    assert f"{only} is not what was evaluated" in refused(model)
    found = opened(model, allow_uncertified=True)
    assert (
        found.recovery is None and len(found.objections) == 1 and not found.summary()["recovery"]["applied"]
    )
    write_plan(model / "scenarios", model, "credit", some_mask(model, 5, 9))
    assert f"{only} was made for another plan" in refused(model)


def test_an_export_does_not_take_a_certificate_that_needs_a_recovery(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = model / "scenarios" / "credit", tmp_path / "out"
    write_recovery(model / "scenarios", model, "credit", "constants")
    command = ["export", "--model", str(model), "--plan", str(folder / "plan.json"), "--out", str(out)]
    assert main([*command, "--certificate", str(folder / "certificate.json")]) == 1
    assert "holds with a recovery alone, which no export carries" in capsys.readouterr().err
    assert not out.exists()


def test_certificates_of_earlier_versions_say_nothing_of_recoveries_and_hold(model: Path) -> None:
    path = model / "scenarios" / "credit" / "certificate.json"
    document = documents.load(path, "certificate")
    old = {name: value for name, value in document.body.items() if name != "recovery"}
    assert len(old) == len(document.body) - 1
    documents.save(path, "certificate", old, document.inputs)
    assert Certificate.load(path).recovery is None and opened(model).objections == ()


@pytest.mark.parametrize(
    "told",
    [{"applied": "constants", "tried": []}, {"tried": []}, {"applied": None, "tried": [{"kind": "router"}]}],
)
def test_a_certificate_must_say_what_it_applies(model: Path, told: dict[str, object]) -> None:
    plan = PlanFile.load(model / "scenarios" / "credit" / "plan.json")
    with pytest.raises(PlanError, match="a certificate's 'recovery'"):
        write_certificate(model / "scenarios", model, "credit", plan, recovery=told)
