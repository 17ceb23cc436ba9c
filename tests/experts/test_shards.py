"""Domain expert shards: every tensor in one file, the whole a checkpoint, each part of it dispensable."""

import argparse
import json
from pathlib import Path

import pytest
from safetensors import safe_open
from scenario_files import some_mask, write_scenario
from world import tiny_checkpoint

from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine
from moe_runtime.errors import CheckpointError, PlanError
from moe_runtime.experts.commands_shard import add_arguments, run
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.registry import Registry, placement_of
from moe_runtime.placement import Placement
from moe_runtime.plan import ExpertMask, LayerMask
from moe_runtime.sampling import SamplingParams

CONFIG = EngineConfig(max_context=64, packed_file=False, threads=1)
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
# Of 8 experts per layer: 0 and 1 shared, 2 and 3 credit's, 4 wealth's, 5 to 7 nobody's.
KEPT = {"credit": (0, 1, 2, 3), "wealth": (0, 1, 4)}


def mask(name: str) -> ExpertMask:
    return ExpertMask(tuple(LayerMask(layer, 8, KEPT[name]) for layer in range(2)))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    model = tiny_checkpoint(tmp_path / "model", shards=2)
    for name in KEPT:
        write_scenario(model / "scenarios", model, name, mask(name))
    return model


@pytest.fixture
def out(model: Path, tmp_path: Path) -> Path:
    assert command(model, tmp_path / "out") == 0
    return tmp_path / "out"


def command(model: Path, out: Path, *words: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.add_argument("--json", action="store_true")
    return run(parser.parse_args(["--model", str(model), "--out", str(out), *words]))


def tensors(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found.update({name: file.get_tensor(name).numpy().tobytes() for name in file.keys()})  # noqa: SIM118
    return found


def answer(engine: Engine, scenario: str | None) -> tuple[int, ...]:
    engine.add("one", list(b"What is the rate?"), GREEDY, scenario=scenario)
    tokens: list[int] = []
    while engine.has_work():
        tokens += [token for event in engine.step() for token in event.token_ids]
    return tuple(tokens)


def test_every_expert_is_in_the_file_of_those_who_keep_it(model: Path, out: Path) -> None:
    names = ["base", "experts-credit", "experts-rest", "experts-shared", "experts-wealth"]
    assert sorted(path.stem for path in out.glob("*.safetensors")) == names
    shards = json.loads((out / "expert_shards.json").read_text())["body"]["shards"]
    assert {name: shard["experts"] for name, shard in shards.items()} == {
        "base": {},
        "shared": {"0": [0, 1], "1": [0, 1]},
        "credit": {"0": [2, 3], "1": [2, 3]},
        "wealth": {"0": [4], "1": [4]},
        "rest": {"0": [5, 6, 7], "1": [5, 6, 7]},
    }
    assert tensors(out) == tensors(model)


def test_the_whole_folder_is_the_same_model(model: Path, out: Path) -> None:
    assert answer(Engine.load(out, CONFIG), None) == answer(Engine.load(model, CONFIG), None)
    assert ModelIdentity.of(out) == ModelIdentity.of(model)


@pytest.mark.parametrize("live", [False, True])
def test_a_scenario_runs_on_shared_and_its_own_shard_alone(model: Path, out: Path, live: bool) -> None:
    full = Engine.load(model, CONFIG)
    full.masks.add("credit", mask("credit"))
    for name in ("experts-wealth", "experts-rest"):
        (out / f"{name}.safetensors").rename(out.parent / name)
    scenario = Registry(model / "scenarios", out).open("credit")  # its certificate holds for the shards, too
    engine = Engine.load(out, CONFIG, placement=placement_of([scenario]), live=live)
    engine.masks.add("credit", scenario.mask)
    assert answer(engine, "credit") == answer(full, "credit")
    with pytest.raises(CheckpointError, match="experts-rest.safetensors is not in the folder|experts-wealth"):
        Engine.load(out, CONFIG)
    with pytest.raises(CheckpointError, match="experts-wealth.safetensors is not in the folder"):
        Engine.load(out, CONFIG, placement=Placement.of(mask("wealth")))


def test_a_shard_that_arrives_serves_its_scenario_at_once(model: Path, out: Path) -> None:
    full = Engine.load(model, CONFIG)
    full.masks.add("wealth", mask("wealth"))
    (out / "experts-wealth.safetensors").rename(out.parent / "away")
    (out / "experts-rest.safetensors").unlink()
    engine = Engine.load(out, CONFIG, placement=Placement.of(mask("credit")), live=True)
    assert engine.live is not None
    wanted = engine.live.lacking(mask("wealth"))
    assert wanted == {0: [4], 1: [4]}
    with pytest.raises(CheckpointError, match="experts-wealth.safetensors is not in the folder"):
        engine.live.read(wanted)
    (out.parent / "away").rename(out / "experts-wealth.safetensors")
    engine.live.read(wanted)
    engine.live.admit(wanted, engine.masks.absent)
    engine.masks.add("wealth", mask("wealth"))
    assert answer(engine, "wealth") == answer(full, "wealth")


def test_a_shard_of_another_model_is_found(model: Path, out: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path / "other", seed=1)
    for name in KEPT:
        write_scenario(other / "scenarios", other, name, mask(name))
    command(other, tmp_path / "wrong")
    (tmp_path / "wrong" / "experts-credit.safetensors").replace(out / "experts-credit.safetensors")
    with pytest.raises(
        PlanError, match=r"experts-credit.safetensors is not the file that expert_shards.json"
    ):
        ModelIdentity.of(out)
    (out / "expert_shards.json").write_text("{}")
    with pytest.raises(CheckpointError, match="not a list of shards"):
        Engine.load(out, CONFIG)


def test_what_cannot_be_split_is_told_and_leaves_nothing(model: Path, out: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="out exists already"):
        command(model, out)
    write_scenario(model / "scenarios", model, "rest", some_mask(model, 3, 0))
    with pytest.raises(PlanError, match="a scenario is called rest"):
        command(model, tmp_path / "new")
    (model / "model-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        command(model, tmp_path / "new", "--scenarios", "credit", "--allow-uncertified")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
