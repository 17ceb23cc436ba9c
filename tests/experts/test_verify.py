"""verify: an export is the masked model bit for bit, and whatever is not is told; the two commands."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from exporting import CASES, case_checkpoint, exported, mask_of
from safetensors.torch import load_file, save_file
from world import tiny_checkpoint

from moe_runtime.config import EngineConfig
from moe_runtime.errors import PlanError
from moe_runtime.experts import documents
from moe_runtime.experts.__main__ import main
from moe_runtime.experts.certificate import Certificate
from moe_runtime.experts.export import MANIFEST, MANIFEST_KIND
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.plan_file import PlanFile
from moe_runtime.experts.statistics_file import load_statistics
from moe_runtime.experts.verify import Verification, generate_prompts, verify
from moe_runtime.plan import ExpertMask

CONFIG = EngineConfig(max_batch_tokens=256, block_size=8)
DEMO = Path(__file__).parents[2] / "experts" / "demo" / "model"


def verified(folder: Path, mask: ExpertMask, target: Path, count: int = 40, **options: Any) -> Verification:
    prompts = generate_prompts(count, 272, seed=1)
    return verify(folder, mask, target, prompts, replace(CONFIG, **options), max_tokens=6)


@pytest.mark.parametrize("architecture", CASES)
def test_an_export_is_the_masked_model_bit_for_bit(tmp_path: Path, architecture: str, isa: str) -> None:
    folder, mask = case_checkpoint(tmp_path / "full", architecture)
    exported(folder, mask, tmp_path / "cut")
    found = verified(folder, mask, tmp_path / "cut")
    assert found.passed, found.to_json()
    assert (found.prompts, found.generated, found.files) == (40, 240, 5)
    assert found.positions == sum(map(len, generate_prompts(40, 272, seed=1)))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in (tmp_path / "cut").iterdir() if path.name != MANIFEST
    )  # no packed weights are left


def test_layers_of_unequal_size_are_equal_too(tmp_path: Path, isa: str) -> None:
    folder = tiny_checkpoint(tmp_path / "full", "deepseek_v3", num_hidden_layers=4, n_routed_experts=16)
    mask = mask_of(folder, (0, 1, 6, 7, 8, 11, 12, 14), range(16), (0, 1, 2, 5, 6, 7, 8, 9, 11, 12, 13, 14))
    exported(folder, mask, tmp_path / "cut", allow_non_uniform=True)
    assert verified(folder, mask, tmp_path / "cut").passed


@pytest.mark.parametrize("quantize", ["none", "int8", "int4"])
def test_the_demo_is_equal_in_bfloat16_and_in_integers(tmp_path: Path, quantize: str) -> None:
    mask = mask_of(DEMO, (0, 3, 4, 9, 11, 12, 17), (1, 2, 5, 8, 13, 16, 19))
    exported(DEMO, mask, tmp_path / "cut")
    assert verified(DEMO, mask, tmp_path / "cut", 10, quantize=quantize).passed


def test_a_change_of_one_expert_is_found_in_files_logits_and_answers(tmp_path: Path) -> None:
    folder, mask = case_checkpoint(tmp_path / "full", "qwen3_moe")
    exported(folder, mask, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.experts.2.down_proj.weight"
    tensors[name][3, 5] *= 1 + 2**-23  # the last bit of one weight
    save_file(tensors, file, metadata={"format": "pt"})
    found = verified(folder, mask, tmp_path / "cut")
    assert not found.passed and found.files_different == ("model.safetensors",)
    assert 0 < len(found.logits_different) < found.positions and not found.answers_different
    tensors[name] *= -3
    save_file(tensors, file, metadata={"format": "pt"})
    found = verified(folder, mask, tmp_path / "cut")
    assert found.answers_different and found.to_json()["answers_different"] == len(found.answers_different)
    (tmp_path / "cut" / "tokenizer_config.json").unlink()
    found = verified(folder, mask, tmp_path / "cut", 1)
    assert found.files_different == ("tokenizer_config.json", "model.safetensors")[::-1]


def test_an_export_of_another_plan_and_no_prompts_are_refused(tmp_path: Path) -> None:
    folder, mask = case_checkpoint(tmp_path / "full", "qwen3_moe")
    exported(folder, mask, tmp_path / "cut")
    with pytest.raises(PlanError, match="cut was exported from another plan"):
        verified(folder, mask_of(folder, (0, 1, 2, 3)), tmp_path / "cut")
    with pytest.raises(PlanError, match="there must be prompts, each of one token or more"):
        verify(folder, mask, tmp_path / "cut", [[1], []], CONFIG, max_tokens=1)
    with pytest.raises(PlanError, match="pruning_manifest.json: No such file"):
        verified(folder, mask, folder)


def save_plan(folder: Path, mask: ExpertMask, path: Path, statistics: str = "5" * 64) -> PlanFile:
    PlanFile(
        scenario="credit",
        mask=mask,
        model=ModelIdentity.of(folder),
        statistics=statistics,
        score="easy_ep",
        seed=7,
        budget={"keep": 4},
        combine="one",
        constraints=(),
        unseen={},
        protected={},
        order={},
        curve=({"kept": 8, "kl_mean": 0.02},),
        num_bytes={"full": 2, "kept": 1},
        text={},
    ).save(path)
    return PlanFile.load(path)


def certificate(plan: PlanFile, measured: float) -> Certificate:
    return Certificate(
        scenario="credit",
        plan=plan.digest,
        mask_digest=plan.mask.digest,
        model=plan.model.to_json(),
        budget={"kl_mean": 0.05, "kl_p99": 1.0},
        passed=True,
        reasons=(),
        measured={"kl_mean": measured, "kl_p99": 0.5},
        test={"credit": "7" * 64},
    )


def test_the_commands_export_and_verify_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, mask = case_checkpoint(tmp_path / "full", "qwen3_moe")
    plan = save_plan(folder, mask, tmp_path / "plan.json")
    certificate(plan, 0.02).save(tmp_path / "certificate.json", {})
    words = ["--model", str(folder), "--plan", str(tmp_path / "plan.json")]
    out = ["--out", str(tmp_path / "cut"), "--certificate", str(tmp_path / "certificate.json")]
    assert main(["export", *words, *out]) == 0
    told = capsys.readouterr().out
    assert "8 of 16 experts" in told and "every engine that loads the full model" in told
    manifest = documents.load(tmp_path / "cut" / MANIFEST, MANIFEST_KIND)
    assert manifest.inputs["plan"] == plan.digest == manifest.body["plan"]
    assert manifest.inputs["statistics"] == "5" * 64
    assert manifest.body["curve"] == [{"kept": 8, "kl_mean": 0.02}]
    assert (manifest.body["score"], manifest.body["seed"]) == ("easy_ep", 7)
    assert manifest.body["certificate"]["measured"]["kl_mean"] == 0.02
    # A thousand prompts, as the command does by default.
    words += ["--exported", str(tmp_path / "cut"), "--max-tokens", "2"]
    assert main(["verify", *words, "--json", "--out", str(tmp_path / "verification.json")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] and (found["prompts"], found["generated_tokens"]) == (1000, 2000)
    kept = documents.load(tmp_path / "verification.json", "verification")
    assert kept.body == found and kept.inputs["manifest"] == manifest.digest
    texts = tmp_path / "credit.jsonl"
    texts.write_text('{"messages": [{"role": "user", "content": "Is it due?"}]}\n{"text": "Rates rise."}\n')
    assert main(["verify", *words, str(texts)]) == 0
    assert "greedy answers: 2 of 2 prompts equal, 4 tokens" in capsys.readouterr().out
    # Any difference is told by the exit status.
    shutil.copy(folder / "config.json", tmp_path / "cut" / "generation_config.json")
    assert main(["verify", *words, str(texts)]) == 1
    assert "different files: generation_config.json" in capsys.readouterr().out


def test_export_refuses_what_does_not_belong_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, mask = case_checkpoint(tmp_path / "full", "qwen3_moe")
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    plan = save_plan(folder, mask, tmp_path / "plan.json")
    certificate(plan, 0.2).save(tmp_path / "over.json", {})
    words = ["--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "cut")]
    text = tmp_path / "text.txt"
    assert main(["export", "--model", str(other), *words]) == 1
    assert "made for another model: its weights differ" in capsys.readouterr().err
    refused = ["--certificate", str(tmp_path / "over.json")]
    assert main(["export", "--model", str(folder), *words, *refused]) == 1
    assert "over.json does not hold: it is over budget" in capsys.readouterr().err
    profiled = ["profile", str(text), "--model", str(folder), "--out", str(tmp_path / "x.stats.safetensors")]
    text.write_text("\n\n".join(f"Payment {number} is due in May." for number in range(20)))
    assert main(profiled) == 0
    refused = ["--statistics", str(tmp_path / "x.stats.safetensors")]
    assert main(["export", "--model", str(folder), *words, *refused]) == 1
    assert "made from other statistics than x.stats.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "cut").exists()
    statistics = load_statistics(tmp_path / "x.stats.safetensors")
    save_plan(folder, mask, tmp_path / "plan.json", statistics.digest)
    assert main(["export", "--model", str(folder), *words, *refused]) == 0
    manifest = documents.load(tmp_path / "cut" / MANIFEST, MANIFEST_KIND).body
    assert manifest["calibration"] == {"text": list(statistics.scenarios["text"].corpora)}


def test_verify_refuses_another_model_and_nothing_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, mask = case_checkpoint(tmp_path / "full", "qwen3_moe")
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    save_plan(folder, mask, tmp_path / "plan.json")
    exported(folder, mask, tmp_path / "cut")
    words = ["--plan", str(tmp_path / "plan.json"), "--exported", str(tmp_path / "cut")]
    assert main(["verify", "--model", str(other), *words]) == 1
    assert "made for another model" in capsys.readouterr().err
    assert main(["verify", "--model", str(folder), *words, "--prompts", "0"]) == 1
    assert "--prompts 0: must be at least 1" in capsys.readouterr().err
