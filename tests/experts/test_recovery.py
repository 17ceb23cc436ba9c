"""Recoveries: planted models in which they must help, their files, what an evaluation says of them."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import NUM_AXES, planted_checkpoint, say, write_texts
from safetensors import safe_open
from safetensors.torch import save_file

from moe_runtime.config import EngineConfig
from moe_runtime.errors import PlanError
from moe_runtime.experts import documents, recovery_file
from moe_runtime.experts.__main__ import main
from moe_runtime.experts.certificate import Certificate
from moe_runtime.experts.demo import MODEL, texts
from moe_runtime.experts.divergence import TokenDivergences
from moe_runtime.experts.forward import Runner
from moe_runtime.experts.intervals import MIN_DOCUMENTS, paired_change
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.recovery_constants import constants
from moe_runtime.experts.recovery_file import RecoveryFile
from moe_runtime.experts.recovery_search import fit, num_trials, search, solve
from moe_runtime.experts.recovery_trial import ALONE, choose, told_in_certificate
from moe_runtime.experts.statistics_file import load_statistics
from moe_runtime.plan import ExpertMask, LayerMask
from moe_runtime.recovery import Recovery

SMALL = EngineConfig(max_batch_tokens=64, block_size=8, packed_file=False)
FLAGS = ["--max-batch-tokens", "512", "--no-packed-file"]
MISSING = 2  # the expert of layer 0 that plans here cut
KEPT = (0, 1, 4, 6)
Tensors = dict[str, torch.Tensor]


def mask_without(layers: int = 3, kept: tuple[int, ...] = KEPT) -> ExpertMask:
    """Layer 0 keeps some, the others all."""
    return ExpertMask(
        tuple(LayerMask(layer, 8, tuple(range(8)) if layer else kept) for layer in range(layers))
    )


def _first_layer_alone(tensors: Tensors) -> None:
    """Nothing but layer 0's experts adds to the embedding, which is equally long for all letters: its first
    axis is the same number for every letter of credit where router and experts of layer 0 read it.
    """
    rest = tensors["model.embed_tokens.weight"][:, NUM_AXES:]
    rest.mul_(2.0 / rest.norm(dim=1, keepdim=True))
    for name, tensor in tensors.items():
        later = ".experts." in name and not name.startswith("model.layers.0.")
        if name.endswith("o_proj.weight") or (later and name.endswith("down_proj.weight")):
            tensor.zero_()


def _constant_expert(tensors: Tensors) -> None:
    """The missing expert says one thing to all letters of credit."""
    _first_layer_alone(tensors)
    for part in ("gate_proj", "up_proj"):
        tensors[f"model.layers.0.mlp.experts.{MISSING}.{part}.weight"][:, 1:] = 0


SHIFT = 0.04  # of a router row's first number, the letters' first axis being STRENGTH / rms


def _twin_expert(tensors: Tensors) -> None:
    """Expert 4 does what the missing one does, and its logit is lower by a constant."""
    _first_layer_alone(tensors)
    experts = "model.layers.0.mlp.experts"
    for part in ("gate_proj", "up_proj", "down_proj"):
        tensors[f"{experts}.4.{part}.weight"].copy_(tensors[f"{experts}.{MISSING}.{part}.weight"])
    router = tensors["model.layers.0.mlp.gate.weight"]
    router[4] = router[MISSING]
    router[4, 0] -= SHIFT


def sayings(seeds: range, letters: str = "") -> list[list[int]]:
    return [list(say("credit", 30, seed, letters).encode()) for seed in seeds]


def profiled(folder: Path, tmp_path: Path) -> Path:
    path = write_texts(tmp_path / "credit.jsonl", [say("credit", 30, seed) for seed in range(10)])
    out = tmp_path / "s.stats.safetensors"
    assert main(["profile", str(path), "--model", str(folder), "--out", str(out), *FLAGS]) == 0
    return out


def plan_of(tmp_path: Path, folder: Path, statistics: Path, mask: ExpertMask) -> Path:
    """A plan of that very mask."""
    out = tmp_path / "plan.json"
    command = ["plan", "--model", str(folder), "--statistics", str(statistics), "--keep", "4"]
    assert main([*command, "--out", str(out), *FLAGS]) == 0
    replace(PlanFile.load(out), mask=mask).save(out)
    return out


# --- planted ------------------------------------------------------------------------------------------------


def test_a_constant_in_the_place_of_a_constant_expert_costs_nothing(tmp_path: Path) -> None:
    folder = planted_checkpoint(tmp_path / "model", change=_constant_expert)
    statistics = load_statistics(profiled(folder, tmp_path))
    plan = PlanFile.load(plan_of(tmp_path, folder, tmp_path / "s.stats.safetensors", mask_without()))
    recovery, unseen = constants(statistics, plan)
    assert [tuple(recovery.layers[layer].shape) for layer in range(3)] == [(4, 64), (0, 64), (0, 64)]
    assert unseen == {0: (3, 5, 7)} and not recovery.layers[0][1:].any()
    assert recovery.layers[0][0].abs().max() > 0.01
    alone, with_it = Runner.load(folder, SMALL).compare(
        sayings(range(50, 54)), [plan.mask] * 2, recoveries=[None, recovery]
    )
    # Beside the constant there is rounding: 1e-7 of logits around 1, of which KL is the square.
    assert alone.summary().kl_mean > 1e-4 and with_it.summary().kl_max < 1e-11


def test_the_constants_are_the_means_of_what_was_profiled(tmp_path: Path) -> None:
    folder = planted_checkpoint(tmp_path / "model")
    statistics = load_statistics(profiled(folder, tmp_path))
    plan = PlanFile.load(plan_of(tmp_path, folder, tmp_path / "s.stats.safetensors", mask_without()))
    recovery, _ = constants(statistics, plan)
    sums = statistics.of("credit")
    assert sums.counts[0, MISSING] > 0
    assert torch.equal(
        recovery.layers[0][0], (sums.outputs[0, MISSING] / float(sums.counts[0, MISSING])).float()
    )
    with pytest.raises(PlanError, match="made from other statistics"):
        constants(replace(statistics, digest="0" * 64), plan)
    with pytest.raises(PlanError, match="nothing to put in its place"):
        constants(statistics, replace(plan, mask=mask_without(kept=(0, 2, 4, 6))))


def test_the_router_correction_finds_the_planted_shift(tmp_path: Path) -> None:
    """With letters of one kind every token's choice is experts 0 and 2, masked 0 and 4: lifting 4 by the
    shift is all that is missing. One Gauss-Newton step from the logistic curve's z to z + shift is
    (sigmoid(z + shift) - sigmoid(z)) / sigmoid'(z).
    """
    folder = planted_checkpoint(tmp_path / "model", change=_twin_expert)
    runner, mask, letters = Runner.load(folder, SMALL), mask_without(), "dhl"
    told: list[int] = []
    equations = fit(runner, SMALL, mask, sayings(range(10), letters), told.append)
    assert sum(told) == 300
    offsets = solve(equations, mask, 1e-6)
    scale = 4.0 / math.sqrt((2 * 4.0**2 + 2.0**2) / 64 + 1e-6)  # of an axis behind the norm
    shift, apart = SHIFT * scale, 0.2 * scale  # experts 0 and 2 are 0.2 of a kind's axis apart
    slope = 1 / (1 + math.exp(apart + shift)) * (1 - 1 / (1 + math.exp(apart + shift)))
    step = (1 / (1 + math.exp(apart)) - 1 / (1 + math.exp(apart + shift))) / slope
    assert float(offsets[0][4] - offsets[0][0]) == pytest.approx(step, rel=1e-3)
    assert not offsets[1].any() and not offsets[2].any() and not offsets[0][[1, 2, 3, 5, 6, 7]].any()
    documents, told = sayings(range(50, 54), letters), []
    found = search(runner, mask, equations, documents, told.append)
    assert sum(told) == num_trials() * 120
    assert found.helps and found.kl_alone > 1e-6 and found.kl_with < 0.05 * found.kl_alone
    assert found.kl_with == min(found.tried.values()) and found.explained > 0.9
    again = runner.compare(documents, [mask], recoveries=[found.recovery])[0]
    assert float(again.kl.mean()) == found.kl_with


def test_fitting_twice_finds_the_same_bits_and_batches_do_not_matter(tmp_path: Path) -> None:
    folder = planted_checkpoint(tmp_path / "model")
    runner, mask = Runner.load(folder, SMALL), mask_without()
    first, second = (fit(runner, SMALL, mask, sayings(range(4))) for _ in range(2))
    other = fit(runner, replace(SMALL, max_batch_tokens=120), mask, sayings(range(4)))
    for layer, equations in first.items():
        assert torch.equal(equations.gram, second[layer].gram) and equations.error == second[layer].error
        assert torch.allclose(equations.gram, other[layer].gram, rtol=1e-12, atol=1e-15)
    assert first[0].error > 0 and not first[1].error > 1e-10  # layer 1 keeps all: rounding is left


# --- on disk ------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, PlanFile]:
    """A file of constants and its plan."""
    folder = planted_checkpoint(tmp_path / "model")
    statistics = profiled(folder, tmp_path)
    plan = plan_of(tmp_path, folder, statistics, mask_without())
    out = tmp_path / "recovery.safetensors"
    command = ["recover", "--kind", "constants", "--model", str(folder), "--plan", str(plan)]
    assert main([*command, "--statistics", str(statistics), "--out", str(out), *FLAGS]) == 0
    return out, PlanFile.load(plan)


def test_what_is_written_is_read_and_the_same_bytes_again(
    saved: tuple[Path, PlanFile], tmp_path: Path
) -> None:
    path, plan = saved
    found = RecoveryFile.load(path, plan)
    assert found.kind == "constants" and found.num_bytes == 4 * 4 * 64 and len(found.digest) == 64
    assert found.plan == plan.digest and found.made["unseen"] == {"0": [3, 5, 7]}
    before = path.read_bytes()
    assert found.save(path).digest == found.digest and path.read_bytes() == before
    offsets = {layer.layer: torch.zeros(8) for layer in plan.mask.layers}
    other = replace(
        found, recovery=Recovery("router", offsets), fingerprints=np.array([-5, 7]), made={"step": 0.5}
    )
    assert other.save(tmp_path / "router.safetensors").digest != found.digest
    again = RecoveryFile.load(tmp_path / "router.safetensors", plan)
    assert again.fingerprints.tolist() == [-5, 7] and again.made == {"step": 0.5}


def test_what_was_changed_or_belongs_elsewhere_is_refused(
    saved: tuple[Path, PlanFile], tmp_path: Path
) -> None:
    path, plan = saved
    whole = path.read_bytes()

    def refused(what: str, of: PlanFile = plan) -> None:
        with pytest.raises(PlanError, match=f"^recovery.safetensors.*{what}"):
            RecoveryFile.load(path, of)

    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused("it was changed since it was written")
    path.write_bytes(whole.replace(b"constants", b"constant5"))
    refused("it was changed since it was written")
    path.write_bytes(whole[:-40])
    refused("not a recovery file")
    path.write_bytes(b"nothing")
    refused("not a recovery file")
    with safe_open(tmp_path / "s.stats.safetensors", "pt") as file:
        save_file({"layer.0": torch.zeros(1)}, path, file.metadata())
    refused("not a file of `moe-experts recover`: KeyError")
    path.unlink()
    refused("no such file")
    path.write_bytes(whole)
    refused("was made for another plan", replace(plan, digest="0" * 64))
    refused("was made for another plan", replace(plan, mask=mask_without(kept=(0, 1, 2, 3))))
    refused(
        "was made for another model: its weights differ",
        replace(plan, model=replace(plan.model, weights="0")),
    )
    found = RecoveryFile.load(path, plan)
    replace(found, recovery=Recovery("constants", {0: torch.zeros(4, 64)})).save(path)
    refused("different layers")
    layers = {**found.recovery.layers, 0: torch.full((4, 64), math.nan)}
    replace(found, recovery=Recovery("constants", layers)).save(path)
    refused("not finite")


def test_what_was_read_stays_whatever_becomes_of_the_file(saved: tuple[Path, PlanFile]) -> None:
    path, plan = saved
    found = RecoveryFile.load(path, plan).recovery
    before = {layer: numbers.clone() for layer, numbers in found.layers.items()}
    assert before[0].any()
    with path.open("r+b") as file:  # in place: a mapping would see it
        file.write(bytes(path.stat().st_size))
    assert all(torch.equal(numbers, before[layer]) for layer, numbers in found.layers.items())
    with path.open("r+b") as file:  # and reading this would end the process
        file.truncate(0)
    assert all(torch.equal(numbers, before[layer]) for layer, numbers in found.layers.items())


def test_a_file_of_more_than_the_limit_is_refused(
    saved: tuple[Path, PlanFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plan = saved
    monkeypatch.setattr(recovery_file, "MAX_FILE_BYTES", path.stat().st_size)
    RecoveryFile.load(path, plan)
    monkeypatch.setattr(recovery_file, "MAX_FILE_BYTES", path.stat().st_size - 1)
    with pytest.raises(PlanError, match="^recovery.safetensors: larger than"):
        RecoveryFile.load(path, plan)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kind", "constants", "x.txt"], "leave TEXT and --text out"),
        (["--kind", "router"], "needs TEXT to fit on"),
        (["--kind", "router", "x.txt"], "and --text, other texts"),
        (["--kind", "constants", "--max-tokens", "0"], "--max-tokens 0: must be at least 1"),
        (["--kind", "constants", "--out", "no/such/file"], "there is no folder"),
    ],
)
def test_the_command_says_what_it_lacks(
    tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--model", str(tmp_path), "--plan", "p", "--statistics", "s", "--out", str(tmp_path / "out")]
    assert main(["recover", *given, *words]) == 1
    assert message in capsys.readouterr().err


# --- with and without ---------------------------------------------------------------------------------------


def test_a_change_is_told_by_pairs_of_the_same_documents() -> None:
    """Documents differ by nats, the change of each is 0.01: only the pairs show it."""
    owners = torch.arange(40) // 4
    kl = owners.double()
    other = torch.zeros(40).double()

    def tokens(values: torch.Tensor) -> TokenDivergences:
        return TokenDivergences(owners, torch.arange(40), values, values < 1, other, other)

    found = paired_change(tokens(kl), tokens(kl - 0.01), 0)
    assert found.value == pytest.approx(-0.01) and found.low == pytest.approx(found.high)
    assert paired_change(tokens(kl), tokens(kl), 0).high == 0.0
    mixed = paired_change(tokens(kl), tokens(kl + 0.1 * (-1.0) ** owners), 0)
    assert mixed.low < 0 < mixed.high


def a_set(*changes: tuple[float, float], documents: int = MIN_DOCUMENTS) -> dict[str, Any]:
    """By kind, the upper ends of the change and of the mean KL; of as many documents as are needed."""
    kinds = zip(("constants", "router"), changes, strict=False)
    return {ALONE: {}} | {
        kind: {"change": {"high": high}, "divergence": {"kl_mean": {"high": upper}, "documents": documents}}
        for kind, (high, upper) in kinds
    }


@pytest.mark.parametrize(
    ("sets", "applied"),
    [
        ([a_set((-0.01, 0.02), (-0.02, 0.03))], "constants"),
        ([a_set((-0.01, 0.04), (-0.02, 0.03))], "router"),
        ([a_set((0.0, 0.02), (-0.02, 0.03))], "router"),
        ([a_set((0.0, 0.02), (0.001, 0.03))], ALONE),
        ([a_set((-0.01, 0.02)), a_set((0.01, 0.02))], ALONE),
        ([a_set((-0.01, 0.02), documents=9)], ALONE),
        ([a_set((-0.01, 0.02)), a_set((-0.01, 0.02), documents=9)], ALONE),
        ([a_set((-0.01, 0.02), (-0.01, 0.05)), a_set((-0.01, 0.07), (-0.01, 0.06))], "router"),
    ],
)
def test_the_best_that_helps_everywhere_is_applied(sets: list[dict[str, Any]], applied: str) -> None:
    by_name = {f"set {number}": found for number, found in enumerate(sets)}
    assert choose([kind for kind in ("constants", "router") if kind in sets[0]], by_name) == applied


def test_without_a_recovery_none_is_told() -> None:
    assert told_in_certificate({}, {"credit": {ALONE: {}}}, ALONE) is None


# --- the whole way, on the demo -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few texts of the demo's credit, their profile and a plan of 7 of 20 experts per layer."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(texts, "DIALOGUES", 40)
        patch.setattr(texts, "QUESTIONS", 30)
        texts.write_texts(folder)
    common = ["--model", str(MODEL), *FLAGS]
    statistics, plan = str(folder / "s.stats.safetensors"), str(folder / "plan.json")
    assert main(["profile", str(folder / "calibration/credit"), "--out", statistics, *common]) == 0
    assert main(["plan", "--statistics", statistics, "--keep", "7", "--out", plan, *common]) == 0
    return folder


def given(demo: Path) -> list[str]:
    files = ["--plan", str(demo / "plan.json"), "--statistics", str(demo / "s.stats.safetensors")]
    return ["--model", str(MODEL), *files, *FLAGS]


def test_constants_help_the_demo_and_the_certificate_holds_with_them(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "constants.safetensors", tmp_path / "router.safetensors"
    assert main(["recover", "--kind", "constants", "--out", str(first), *given(demo)]) == 0
    words = [str(demo / "calibration/credit"), "--text", str(demo / "tune/credit"), "--max-tokens", "1500"]
    assert main(["recover", "--kind", "router", "--out", str(second), *words, *given(demo), "--json"]) == 0
    made = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert made["kl_with"] < made["kl_alone"] and len(made["tried"]) == num_trials() - 1
    out, certificate = tmp_path / "evaluation.json", tmp_path / "certificate.json"
    words = [f"credit={demo / 'test/credit'}", f"wealth={demo / 'test/wealth'}", "--max-answers", "4"]
    limits = ["--max-kl", "9", "--max-kl-p99", "99", "--max-match-loss", "1", "--max-loop-rise", "1"]
    files = ["--recovery", str(first), str(second), "--out", str(out), "--certificate", str(certificate)]
    command = ["evaluate", *words, *limits, *files, "--max-tokens", "600", "--no-baselines"]
    assert main([*command, *given(demo)]) == 0
    told = capsys.readouterr().out
    assert "constants changes the mean KL by -0.0" in told and "in all numbers above: constants" in told
    body = documents.load(out, "evaluation").body
    variants = body["recovery"]["sets"]["credit"]
    assert list(variants) == [ALONE, "constants", "router"] and body["recovery"]["applied"] == "constants"
    values = {name: found["divergence"]["kl_mean"]["value"] for name, found in variants.items()}
    change = variants["constants"]["change"]
    assert change["value"] == pytest.approx(values["constants"] - values[ALONE]) and change["high"] < 0
    assert body["sets"][0]["divergence"] == variants["constants"]["divergence"]
    assert set(body["recovery"]["sets"]) == {"credit"} and body["sets"][1]["answers"]["answers"] == 4
    held = Certificate.load(certificate)
    assert held.applied_recovery == RecoveryFile.load(first, PlanFile.load(demo / "plan.json")).digest
    assert held.measured["kl_mean"] == variants["constants"]["divergence"]["kl_mean"]["high"]


def test_few_documents_cannot_tell_whether_a_recovery_helps(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "constants.safetensors"
    assert main(["recover", "--kind", "constants", "--out", str(path), *given(demo)]) == 0
    words = [f"credit={demo / 'test/credit'}", "--recovery", str(path), "--max-tokens", "300"]
    command = ["evaluate", *words, "--max-answers", "1", "--no-baselines"]
    assert main([*command, *given(demo)]) in (0, 2)
    told = capsys.readouterr().out
    assert ": 7 documents are too few to tell, 10 are needed" in told and "no recovery is applied" in told
    assert "changes the mean KL by -0.0" in told


def test_what_does_not_help_is_not_applied(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Constants a hundred times too large."""
    path, certificate = tmp_path / "constants.safetensors", tmp_path / "certificate.json"
    assert main(["recover", "--kind", "constants", "--out", str(path), *given(demo)]) == 0
    found = RecoveryFile.load(path, PlanFile.load(demo / "plan.json"))
    layers = {layer: 100 * rows for layer, rows in found.recovery.layers.items()}
    harmful = replace(found, recovery=Recovery("constants", layers)).save(path)
    words = [f"credit={demo / 'test/credit'}", "--recovery", str(path), "--certificate", str(certificate)]
    command = ["evaluate", *words, "--max-tokens", "600", "--max-answers", "1", "--no-baselines", "--json"]
    assert main([*command, *given(demo)]) in (0, 2)
    body = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert body["recovery"]["applied"] is None and not body["recovery"]["tried"][0]["helps"]
    assert body["sets"][0]["divergence"] == body["recovery"]["sets"]["credit"][ALONE]["divergence"]
    held = Certificate.load(certificate)
    assert held.applied_recovery is None and held.tried_in_vain(harmful.digest)


def test_a_text_of_another_scenario_or_other_statistics_are_refused(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["recover", "--kind", "router", "--out", str(tmp_path / "x"), *given(demo)]
    wealth = f"wealth={demo / 'calibration/wealth'}"
    assert main([*words, wealth, "--text", str(demo / "tune/credit")]) == 1
    assert "no text of the plan's scenario 'credit'; there are texts of: wealth" in capsys.readouterr().err
    text, other = str(demo / "calibration/credit"), str(tmp_path / "other.stats.safetensors")
    small = write_texts(tmp_path / "credit.jsonl", [say("credit", 600, 1)])
    assert main(["profile", str(small), "--model", str(MODEL), "--out", other, *FLAGS]) == 0
    words[words.index(str(demo / "s.stats.safetensors"))] = other
    assert main([*words, text, "--text", str(demo / "tune/credit")]) == 1
    assert "other.stats.safetensors: plan.json was made from other statistics" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_texts_that_a_recovery_was_made_from_are_no_test(demo: Path, tmp_path: Path) -> None:
    path = tmp_path / "router.safetensors"
    words = [str(demo / "calibration/credit"), "--text", str(demo / "tune/credit"), "--max-tokens", "600"]
    command = ["recover", "--kind", "router", "--out", str(path), *words, *given(demo)]
    assert main(command) == 0
    assert main(["evaluate", f"credit={demo / 'tune/credit'}", "--recovery", str(path), *given(demo)]) == 1
    twice = ["--recovery", str(path), str(path)]
    assert main(["evaluate", f"credit={demo / 'test/credit'}", *twice, *given(demo)]) == 1
    same = [str(demo / "tune/credit"), "--text", str(demo / "tune/credit")]
    assert main(["recover", "--kind", "router", "--out", str(path), *same, *given(demo)]) == 1
