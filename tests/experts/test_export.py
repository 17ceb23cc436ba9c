"""Exports: survivors byte for byte, loadable by stock engines; what cannot be exported is refused."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from exporting import CASES, ROUTER, case_checkpoint, check_bytes, exported, mask_of, tensors_of
from model_oracle import chunked_logits, load
from published_int4 import AWQ, GPTQ, publish
from safetensors.torch import load_file
from test_loader_memory import as_fp8
from world import edit_config, tiny_checkpoint, write_weights

from moe_runtime.errors import CheckpointError, PlanError
from moe_runtime.experts import documents
from moe_runtime.experts.export import GHOST_ROUTER, MANIFEST, MANIFEST_KIND
from moe_runtime.experts.profile import require_enough
from moe_runtime.plan import ExpertMask

PROMPT = torch.arange(40, 61)


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("architecture", CASES)
def test_survivors_are_the_same_bytes_under_new_numbers(
    tmp_path: Path, architecture: str, shards: int
) -> None:
    folder, mask = case_checkpoint(tmp_path / "full", architecture, shards=shards, torch_dtype="bfloat16")
    exported(folder, mask, tmp_path / "cut")
    check_bytes(folder, mask, tmp_path / "cut")
    load(tmp_path / "cut", "cpu")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "cut" / file).read_bytes() == (folder / file).read_bytes()
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "cut"))
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys() and len(changed) == 1
    assert after[changed.pop()] == len(CASES[architecture][1])


PUBLISHED: dict[str, Callable[[Path], object]] = {
    "fp8": as_fp8,
    "awq": lambda folder: publish(folder, AWQ),
    "gptq": lambda folder: publish(folder, GPTQ),
}


@pytest.mark.parametrize("form", PUBLISHED)
def test_scales_and_codes_move_with_their_expert(tmp_path: Path, form: str) -> None:
    wide = {"moe_intermediate_size": 32, "num_hidden_layers": 1, "num_experts": 5}
    folder = tiny_checkpoint(tmp_path / "full", torch_dtype="bfloat16", **wide)
    PUBLISHED[form](folder)
    mask = mask_of(folder, (0, 2, 4))
    exported(folder, mask, tmp_path / "cut")
    check_bytes(folder, mask, tmp_path / "cut")
    load(tmp_path / "cut", "cpu")


@pytest.mark.parametrize("architecture", sorted(CASES.keys() - {"bailing_moe_v2"}))
def test_transformers_loads_a_uniform_export_and_computes_the_same(tmp_path: Path, architecture: str) -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    folder, mask = case_checkpoint(tmp_path / "full", architecture, shards=2)
    exported(folder, mask, tmp_path / "cut", ghost_router=True)
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "cut", output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(found.values()), found
    with torch.no_grad():
        expected = model.eval()(PROMPT[None]).logits[0]
    ours = chunked_logits(load(tmp_path / "cut", "cpu"), [PROMPT])[0]
    # As in tests/models/test_parity.py: both are float32 and sum in another order.
    assert float((ours - expected).abs().max() / expected.abs().max()) <= 5e-6


def test_layers_of_unequal_size_are_for_our_loader_alone(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "full", num_hidden_layers=4, mlp_only_layers=[2])
    mask = mask_of(folder, (0, 1, 5), (2, 3), range(8))
    with pytest.raises(PlanError, match=r"only moe_runtime can load.*vLLM.*--allow-non-uniform"):
        exported(folder, mask, tmp_path / "cut")
    done = exported(folder, mask, tmp_path / "cut", allow_non_uniform=True)
    assert any("only moe_runtime can load" in note for note in done.notes)
    check_bytes(folder, mask, tmp_path / "cut")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert (config["num_experts"], config["num_experts_per_layer"]) == (8, [3, 2, 0, 8])
    model = load(tmp_path / "cut", "cpu")
    assert [mixture.config.num_experts for _, mixture in model.mixtures()] == [3, 2, 8]
    with pytest.raises(PlanError, match="different numbers of experts.*profile the model that it was"):
        require_enough(tmp_path / "cut", [])
    # What is uneven can be cut again, to layers of one size: then it is a model like any other.
    again = mask_of(tmp_path / "cut", (1, 2), (0, 1), (3, 6))
    exported(tmp_path / "cut", again, tmp_path / "even")
    assert "num_experts_per_layer" not in json.loads((tmp_path / "even" / "config.json").read_text())
    require_enough(tmp_path / "even", [])
    load(tmp_path / "even", "cpu")


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ([8], "a number for each layer, 0 for the dense ones alone"),
        ([8, 0], "0 for the dense ones alone"),
        ([4, 6], "its largest number must be the number of experts, 8"),
        ([8, 1], "2 experts per token exceed the 1 that can be chosen"),
    ],
)
def test_counts_per_layer_that_cannot_be_are_refused(tmp_path: Path, counts: list[int], message: str) -> None:
    folder = edit_config(tiny_checkpoint(tmp_path), num_experts_per_layer=counts)
    with pytest.raises(CheckpointError, match=message):
        load(folder, "cpu")


def test_layers_for_multi_token_prediction_are_copied_whole(tmp_path: Path) -> None:
    folder, mask = case_checkpoint(tmp_path / "full", "deepseek_v3", num_nextn_predict_layers=1)
    tensors = load_file(folder / "model.safetensors")
    extra = {
        name.replace("layers.1.", "layers.2."): tensor.clone()
        for name, tensor in tensors.items()
        if "layers.1." in name
    }
    write_weights(folder, {**tensors, **extra})
    done = exported(folder, mask, tmp_path / "cut")
    assert any("multi-token prediction" in note for note in done.notes)
    check_bytes(folder, mask, tmp_path / "cut")
    assert "model.layers.2.mlp.experts.15.up_proj.weight" in tensors_of(tmp_path / "cut")
    load(tmp_path / "cut", "cpu")


def test_the_ghost_router_keeps_all_rows_where_engines_do_not_look(tmp_path: Path) -> None:
    folder, mask = case_checkpoint(tmp_path / "full", "deepseek_v3")
    exported(folder, mask, tmp_path / "cut", ghost_router=True)
    routers = {name: tensor for name, tensor in tensors_of(folder).items() if ROUTER.search(name)}
    ghosts = load_file(tmp_path / "cut" / GHOST_ROUTER)
    assert len(ghosts) == 2 and ghosts.keys() == routers.keys()
    assert all(torch.equal(ghosts[name], routers[name]) for name in routers)
    assert [path.name for path in (tmp_path / "cut").glob("*.safetensors")] == ["model.safetensors"]


def test_the_manifest_says_what_was_kept_and_hashes_every_file(tmp_path: Path) -> None:
    folder, mask = case_checkpoint(tmp_path / "full", "qwen3_moe", shards=3)
    (folder / "scenarios").mkdir()
    (folder / "model.gguf").write_bytes(b"another form")
    (folder / "LICENSE").write_text("as it is")
    exported(folder, mask, tmp_path / "cut", ghost_router=True)
    manifest = documents.load(tmp_path / "cut" / MANIFEST, MANIFEST_KIND).body
    assert ExpertMask.from_json(manifest["mask"]) == mask and manifest["mask_digest"] == mask.digest
    assert manifest["config"] == {"num_experts": [8, 4]}
    assert manifest["left_out"] == ["model.gguf", "scenarios"]
    files = {
        str(path.relative_to(tmp_path / "cut")): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (tmp_path / "cut").rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
    assert manifest["files"] == files and "LICENSE" in files and GHOST_ROUTER in files
    sizes = [
        sum(tensor.nbytes for tensor in tensors_of(path).values()) for path in (folder, tmp_path / "cut")
    ]
    assert [manifest["bytes"][name] for name in ("full", "kept")] == sizes


def test_modules_that_are_not_quantised_keep_their_names(tmp_path: Path) -> None:
    names = ["lm_head", "gate", "model.layers.0.mlp.experts.3.up_proj", "model.layers.1.mlp.experts.5"]
    folder = tiny_checkpoint(tmp_path / "full", torch_dtype="bfloat16")
    as_fp8(folder)
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    edit_config(folder, quantization_config={**section, "modules_to_not_convert": names})
    exported(folder, mask_of(folder, (1, 3, 4)), tmp_path / "cut")
    after = json.loads((tmp_path / "cut" / "config.json").read_text())["quantization_config"]
    assert after["modules_to_not_convert"] == ["lm_head", "gate", "model.layers.0.mlp.experts.1.up_proj"]
    edit_config(folder, quantization_config={**section, "modules_to_not_convert": ["experts.3.up_proj"]})
    exported(folder, mask_of(folder, (1, 3, 4)), tmp_path / "part")  # not a name of this family's experts
    edit_config(folder, quantization_config={**section, "modules_to_not_convert": ["mlp.experts.3"]})
    with pytest.raises(CheckpointError, match="names an expert of no certain layer"):
        exported(folder, mask_of(folder, (1, 3, 4)), tmp_path / "none")


def test_lists_for_every_layer_keep_the_first_experts(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "full", num_hidden_layers=1)
    publish(folder, GPTQ)
    section = json.loads((folder / "config.json").read_text())["quantization_config"]
    lists = [["self_attn.q_proj"], [f"mlp.experts.{expert}.up_proj" for expert in range(8)]]
    edit_config(folder, quantization_config={**section, "modules_in_block_to_quantize": lists})
    exported(folder, mask_of(folder, (1, 7)), tmp_path / "cut")
    after = json.loads((tmp_path / "cut" / "config.json").read_text())["quantization_config"]
    assert after["modules_in_block_to_quantize"] == [lists[0], lists[1][:2]]
    lists[1].pop(3)
    edit_config(folder, quantization_config={**section, "modules_in_block_to_quantize": lists})
    with pytest.raises(CheckpointError, match="treats some experts apart"):
        exported(folder, mask_of(folder, (1, 7)), tmp_path / "none")


@pytest.mark.parametrize(
    ("architecture", "kept", "message"),
    [
        ("qwen3_moe", range(8), "keeps every expert, so there is nothing to cut"),
        ("qwen3_moe", (3,), "layer 0 keeps 1 experts, each token takes 2"),
        (
            "deepseek_v3",
            (0, 1, 2, 6, 8, 11, 12, 14),
            "layer 1 keeps 3, 1, 2, 2 experts in its 4 routing groups",
        ),
        ("deepseek_v3", (0, 4, 8, 12), "keeps one expert in each routing group"),
    ],
)
def test_masks_that_leave_no_model_are_refused(
    tmp_path: Path, architecture: str, kept: range | tuple[int, ...], message: str
) -> None:
    folder, _ = case_checkpoint(tmp_path / "full", architecture)
    with pytest.raises(PlanError, match=message):
        exported(folder, mask_of(folder, kept), tmp_path / "cut")
    other = tiny_checkpoint(tmp_path / "other", num_experts=4)
    with pytest.raises(PlanError, match="made for another model"):
        exported(folder, mask_of(other, (1, 2)), tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


def test_checkpoints_that_cannot_be_cut_are_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "full")
    mask, tensors = mask_of(folder, (1, 2)), load_file(folder / "model.safetensors")
    gate, expert = "model.layers.0.mlp.gate.weight", "model.layers.1.mlp.experts.2.up_proj.weight"
    changes: list[tuple[dict[str, torch.Tensor | None], str]] = [
        ({gate: tensors[gate][:5].clone()}, f"{gate}: shape .5, 32., expected a row for each of 8"),
        ({gate: None}, "layer 0 has no router mlp.gate.weight"),
        ({expert: None}, "layer 1: expert 2 lacks up_proj.weight"),
        ({"model.layers.0.mlp.gate.weight_scale_inv": torch.ones(1)}, "no row per expert"),
        (
            {"model.layers.0.mlp.experts.gate_up_proj": torch.ones(8, 2)},
            "not a tensor of one expert of the 8",
        ),
        (
            {"model.layers.0.mlp.experts.8.up_proj.weight": torch.ones(2)},
            "not a tensor of one expert of the 8",
        ),
    ]
    for change, message in changes:
        edited = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        write_weights(folder, edited)
        with pytest.raises(CheckpointError, match=message):
            exported(folder, mask, tmp_path / "cut")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]
