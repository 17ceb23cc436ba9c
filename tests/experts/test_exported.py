"""Exports with their full router: bits of the export alone, and the lost mass of the masked full model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from exporting import case_checkpoint, exported, mask_of
from safetensors.torch import load_file, save_file
from serving import serving_service
from test_loader_memory import as_fp8
from world import tiny_checkpoint

from moe_runtime.async_engine import AsyncEngine
from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine
from moe_runtime.errors import CheckpointError, PlanError
from moe_runtime.experts import documents
from moe_runtime.experts.export import GHOST_ROUTER, MANIFEST, MANIFEST_KIND, Provenance, export
from moe_runtime.experts.exported import open_exported
from moe_runtime.placement import Placement
from moe_runtime.plan import ExpertMask
from moe_runtime.server.scenarios import open_scenarios
from moe_runtime.server.service import build_service
from moe_runtime.server.settings import ServerConfig

CONFIG = EngineConfig(max_context=128, block_size=8, cache_bytes=1 << 22, threads=1, packed_file=False)
PROMPTS = [list(range(start, start + 23)) for start in (40, 7, 190)]
FAMILIES = ["qwen3_moe", "deepseek_v3", "bailing_moe_v2"]  # softmax; sigmoid with bias and groups, two names

Answer = tuple[tuple[int, ...], tuple[float, ...], float | None]


def answers(engine: Engine, scenario: str | None) -> list[Answer]:
    """Token ids, their log probabilities and the prompt's lost mass, of all prompts in one batch."""
    params = replace(
        engine.default_params, temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    for number, ids in enumerate(PROMPTS):
        engine.add(str(number), ids, params, scenario=scenario)
    ids: dict[str, list[int]] = {}
    logprobs: dict[str, list[float]] = {}
    lost: dict[str, float | None] = {}
    while engine.has_work():
        for event in engine.step():
            ids.setdefault(event.request_id, []).extend(event.token_ids)
            told = [*(event.prompt_logprobs or ())[1:], *(event.logprobs or ())]
            logprobs.setdefault(event.request_id, []).extend(
                each.logprob for each in told if each is not None
            )
            lost.setdefault(event.request_id, event.lost_mass)
    assert engine.stats().outside_mask == 0
    return [(tuple(ids[name]), tuple(logprobs[name]), lost[name]) for name in map(str, range(len(PROMPTS)))]


def with_ghosts(folder: Path, **options: Any) -> Engine:
    """As moe-serve loads it."""
    found = open_exported(folder)
    assert found is not None
    placement = Placement.of(found.scenario.mask)
    engine = Engine.load(folder, replace(CONFIG, **options), placement=placement, ghosts=found.ghosts)
    engine.masks.add(found.scenario.name, found.scenario.mask, found.scenario.policy)
    return engine


def masked(folder: Path, mask: ExpertMask) -> list[Answer]:
    engine = Engine.load(folder, CONFIG)
    engine.masks.add("masked", mask)
    return answers(engine, "masked")


def check(full: Path, mask: ExpertMask, cut: Path) -> None:
    ghostly = answers(with_ghosts(cut), "exported")
    alone = answers(Engine.load(cut, CONFIG), None)
    assert [each[:2] for each in ghostly] == [each[:2] for each in alone]
    assert ghostly == masked(full, mask)
    assert all(mass is not None and 0 < mass < 1 for *_, mass in ghostly) and alone[0][2] is None


@pytest.mark.parametrize("architecture", FAMILIES)
def test_an_export_with_its_full_router_says_the_same_and_knows_what_it_lost(
    tmp_path: Path, architecture: str, isa: str
) -> None:
    full, mask = case_checkpoint(tmp_path / "full", architecture, num_hidden_layers=3, shards=2)
    exported(full, mask, tmp_path / "cut", ghost_router=True)
    check(full, mask, tmp_path / "cut")


def test_layers_of_unequal_size_scales_and_an_export_of_an_export(tmp_path: Path) -> None:
    wide = {"moe_intermediate_size": 32, "num_hidden_layers": 3, "torch_dtype": "bfloat16"}
    full = tiny_checkpoint(tmp_path / "full", **wide)
    as_fp8(full)
    mask = mask_of(full, (0, 1, 5), range(8), (2, 3))
    exported(full, mask, tmp_path / "cut", ghost_router=True, allow_non_uniform=True)
    check(full, mask, tmp_path / "cut")
    again = mask_of(tmp_path / "cut", (0, 2), (1, 2, 5, 7), (0, 1))
    exported(tmp_path / "cut", again, tmp_path / "less", ghost_router=True, allow_non_uniform=True)
    check(tmp_path / "cut", again, tmp_path / "less")  # its ghosts are of the model that it was cut from


def test_a_packed_file_minds_the_ghosts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    full, mask = case_checkpoint(tmp_path / "full", "qwen3_moe")
    cut = tmp_path / "cut"
    exported(full, mask, cut, ghost_router=True)
    first = answers(with_ghosts(cut, packed_file=True), "exported")
    names = [path.name for path in (cut / ".moe_packed").iterdir()]
    assert len(names) == 1 and "_some-" in names[0]
    assert answers(with_ghosts(cut, packed_file=True), "exported") == first
    (cut / GHOST_ROUTER).touch()
    assert answers(with_ghosts(cut, packed_file=True), "exported") == first
    assert "it is stale: ghost router differs" in caplog.text


def test_ghosts_of_another_model_are_refused(tmp_path: Path) -> None:
    full, mask = case_checkpoint(tmp_path / "full", "deepseek_v3")
    cut = tmp_path / "cut"
    assert open_exported(full) is None
    exported(full, mask, cut)
    assert open_exported(cut) is None
    exported(full, mask, tmp_path / "ghostly", ghost_router=True)
    cut = tmp_path / "ghostly"
    tensors = load_file(cut / GHOST_ROUTER)
    gate, bias = "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.e_score_correction_bias"
    other = tensors[gate].clone()
    other[0] += 1  # of an expert that stayed
    found = open_exported(cut)
    assert found is not None
    changes: list[tuple[dict[str, torch.Tensor | None], str]] = [
        ({gate: other}, "its rows of the experts that stayed are not the checkpoint's"),
        ({gate: tensors[gate][:-1].clone()}, r"F32 \[15, 32\], expected F32 \[16, 32\]"),
        ({bias: None}, "is missing"),
        ({gate.replace("1", "0"): tensors[gate].clone()}, "no router of this checkpoint"),
    ]
    for change, message in changes:
        edited = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(edited, cut / GHOST_ROUTER)
        with pytest.raises(PlanError, match="is not the file that pruning_manifest.json lists"):
            open_exported(cut)
        with pytest.raises(CheckpointError, match=message):
            Engine.load(cut, CONFIG, placement=Placement.of(mask), ghosts=found.ghosts)
    (cut / MANIFEST).unlink()
    with pytest.raises(PlanError, match="pruning_manifest.json: No such file"):
        open_exported(cut)


def test_a_manifest_that_says_too_little_is_refused(tmp_path: Path) -> None:
    full, mask = case_checkpoint(tmp_path / "full", "qwen3_moe")
    cut = tmp_path / "cut"
    exported(full, mask, cut, ghost_router=True)
    body = dict(documents.load(cut / MANIFEST, MANIFEST_KIND).body)
    for lacking in ("files", "mask", "config", "bytes"):
        rest = {name: value for name, value in body.items() if name != lacking}
        documents.save(cut / MANIFEST, MANIFEST_KIND, rest, {})
        with pytest.raises(PlanError, match=f"not a manifest of .*'{lacking}'"):
            open_exported(cut)


def test_an_export_without_a_certificate_is_served_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    full, mask = case_checkpoint(tmp_path / "full", "qwen3_moe")
    told = "scenario credit is served although it was exported without a certificate"
    for name, certificate in (("without", {}), ("with", {"certificate": "8" * 64})):
        caplog.clear()
        provenance = Provenance({"scenario": "credit", "plan": "7" * 64, **certificate}, {})
        export(full, mask, tmp_path / name, provenance, ghost_router=True)
        assert [scenario.name for scenario in open_scenarios(tmp_path / name, ServerConfig())] == ["credit"]
        warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert (told in warned) is not bool(certificate)


def test_the_server_measures_logs_and_refuses_as_for_a_subset(tmp_path: Path) -> None:
    full, mask = case_checkpoint(tmp_path / "full", "qwen3_moe")
    cut, log = tmp_path / "cut", tmp_path / "drift.jsonl"
    export(full, mask, cut, Provenance({"scenario": "credit", "plan": "7" * 64}, {}), ghost_router=True)
    policy = cut / Path(GHOST_ROUTER).parent / "policy.json"
    policy.write_text('{"threshold": 0.0, "action": "fallback"}')
    with pytest.raises(PlanError, match="falls back to the full model, of which this server holds a part"):
        open_scenarios(cut, ServerConfig())
    policy.write_text('{"threshold": 0.0, "action": "flag"}')
    token = tmp_path / "token"
    token.write_text("a secret that is long enough")
    token.chmod(0o600)
    config = ServerConfig(port=0, drift_log=log, admin_token_file=token)
    scenarios = open_scenarios(cut, config)
    assert scenarios.exported is not None and not scenarios.come_and_go
    engine = with_ghosts(cut)
    service = build_service(AsyncEngine(engine), cut, "tiny", config, scenarios)
    expected = masked(full, mask)
    with serving_service(service) as running:
        body = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 4, "temperature": 0}
        answer = httpx.post(f"{running.url}/v1/completions", json=body, timeout=30)
        usage = answer.json()["usage"]["scenario"]
        assert usage["name"] == "credit" and usage["drift"] == "flag"
        assert usage["lost_mass"] == pytest.approx(expected[0][2], abs=1e-6)
        assert answer.headers["x-moe-drift"].startswith("flag; lost_mass=0.")
        cards = httpx.get(f"{running.url}/v1/models").json()["data"]
        assert [card["id"] for card in cards] == ["tiny"] and cards[0]["scenario"]["experts_kept"] == 8
        assert httpx.get(f"{running.url}/v1/models/tiny").status_code == 200
        metrics = httpx.get(f"{running.url}/metrics").text
        assert 'moe_scenario_lost_mass_count{model_name="tiny",scenario="credit"} 1' in metrics
        unknown = httpx.post(f"{running.url}/v1/completions", json={**body, "model": "tiny:wealth"})
        assert unknown.status_code == 404 and "this server has 'tiny'." in unknown.text
        bearer = {"Authorization": f"Bearer {token.read_text()}"}
        dropped = httpx.delete(f"{running.url}/admin/scenarios/credit", headers=bearer)
        assert dropped.status_code == 409 and "is the model itself" in dropped.text
        assert httpx.post(f"{running.url}/v1/completions", json=body).status_code == 200
    line = json.loads(log.read_text().splitlines()[0])
    assert line["scenario"] == "credit" and line["lost_mass"] == pytest.approx(expected[0][2], abs=1e-6)
