"""The profile: against sums made one by one, the same bits again, additive, of one model only."""

import json
import random
from pathlib import Path

import pytest
import torch
from literal_statistics import literal_sums
from safetensors.torch import load_file
from world import ARCHITECTURES, tiny_checkpoint, write_weights

from moe_runtime.config import EngineConfig
from moe_runtime.errors import PlanError
from moe_runtime.experts.__main__ import main
from moe_runtime.experts.corpus import Corpus, Text
from moe_runtime.experts.corpus_text import Rendered
from moe_runtime.experts.model_identity import ModelIdentity
from moe_runtime.experts.packing import cache_blocks, pack
from moe_runtime.experts.profile import profile
from moe_runtime.experts.sketch import lost_weight
from moe_runtime.experts.statistics import SUMS, Statistics
from moe_runtime.experts.statistics_file import load_statistics, save_statistics

WHOLE = {"counts", "answer_counts", "documents_seen", "pairs", "tail"}
SMALL = EngineConfig(max_batch_tokens=48, block_size=8, packed_file=False)


def texts(seed: int, lengths: tuple[int, ...] = (70, 1, 17, 48, 3, 31)) -> list[Text]:
    generator = random.Random(seed)
    return [
        Text(f"{seed}:{number}", Rendered(tuple(generator.randrange(250) for _ in range(length))))
        for number, length in enumerate(lengths)
    ]


def corpus(*parts: list[Text], scenario: str = "credit") -> Corpus:
    return Corpus(scenario, tuple(text for part in parts for text in part))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def close(got: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    error = (got - expected).abs().max()
    assert error <= relative * expected.abs().max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_sum_is_what_the_checkpoint_says_token_by_token(tmp_path: Path, architecture: str) -> None:
    """Chosen ids and their weights, too, for every family of routers: the counts are equal. The kernels
    compute in float32 with about 100 terms a sum: 1e-5 of the largest is a few of their errors.
    """
    folder = tiny_checkpoint(tmp_path, architecture)
    own = texts(0)
    found = profile(folder, [corpus(own)], SMALL).of("credit")
    truth = literal_sums(folder, [list(text.token_ids) for text in own])
    shape = found.counts.shape
    layers = sorted({key[0] for key in truth["counts"]})
    assert shape == (len(layers), 8)
    for name, sums in truth.items():
        got = getattr(found, name)
        expected = torch.zeros_like(got)
        for (layer, *rest), value in sums.items():
            expected[(layers.index(layer), *rest)] = value
        if name in WHOLE:
            assert torch.equal(got, expected), name
        else:
            close(got, expected, 1e-5)
    assert torch.equal(found.tail.sum(-1), found.counts) and found.num_documents == len(own)


def test_int4_experts_are_profiled_as_they_are_served(tiny: Path) -> None:
    config = EngineConfig(
        max_batch_tokens=48, block_size=8, packed_file=False, quantize="int4", quantize_group=32
    )
    plain, quantised = (profile(tiny, [corpus(texts(0))], each) for each in (SMALL, config))
    assert quantised.shape.weights == "int4-g32"
    close(quantised.of("credit").norm, plain.of("credit").norm, 0.5)
    assert not torch.equal(quantised.of("credit").norm, plain.of("credit").norm)
    with pytest.raises(PlanError, match="differ in weights"):
        plain.add(quantised)


def test_a_second_run_writes_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        save_statistics(file, profile(tiny, [corpus(texts(0)), corpus(texts(1), scenario="wealth")], SMALL))
    assert files[0].read_bytes() == files[1].read_bytes()


def test_profiles_of_parts_add_up_to_the_profile_of_the_whole(tiny: Path) -> None:
    parts = [profile(tiny, [corpus(texts(seed))], SMALL) for seed in (0, 1)]
    added = parts[0].add(parts[1]).of("credit")
    whole = profile(tiny, [corpus(texts(0), texts(1))], SMALL).of("credit")
    for name in (*SUMS, "peak"):
        got, expected = getattr(added, name), getattr(whole, name)
        if name in WHOLE:
            assert torch.equal(got, expected), name
        else:
            close(got, expected, 1e-12)
    for name in ("sample_keys", "sample_experts", "sample_weights", "fingerprints"):
        assert torch.equal(getattr(added, name), getattr(whole, name)), name
    assert (added.num_documents, added.num_tokens) == (whole.num_documents, whole.num_tokens)
    with pytest.raises(PlanError, match="counted twice"):
        parts[0].add(parts[0])


def test_scenarios_stay_apart_and_merge(tiny: Path) -> None:
    both = profile(tiny, [corpus(texts(0)), corpus(texts(1), scenario="wealth")], SMALL)
    merged = both.merge(["credit", "wealth"])
    assert torch.equal(merged.counts, both.of("credit").counts + both.of("wealth").counts)
    with pytest.raises(PlanError, match="no statistics of scenario 'loans'; there are: credit, wealth"):
        both.of("loans")


def test_the_sample_of_tokens_knows_what_a_set_of_kept_experts_loses(tiny: Path) -> None:
    """With fewer tokens than the sample holds, its mean is that of the gate sums."""
    found = profile(tiny, [corpus(texts(0))], SMALL).of("credit")
    kept = torch.ones(2, 8, dtype=torch.bool)
    kept[0, :3] = kept[1, 5:] = False
    lost = lost_weight(found.sample_experts, found.sample_weights, kept)
    by_layer = (found.gate * ~kept).sum(1) / found.gate.sum(1)  # qwen3's weights sum to 1
    assert len(lost) == found.num_tokens
    assert float(lost.mean()) == pytest.approx(float(by_layer.mean()), rel=1e-6)


def test_the_tail_bounds_what_an_expert_contributes(tiny: Path) -> None:
    found = profile(tiny, [corpus(texts(0))], SMALL).of("credit")
    median, tail = found.contribution(0.5), found.contribution(0.99)
    assert bool((median[~found.unseen] > 0).all()) and bool((tail >= median).all())
    assert bool((found.contribution(0.5)[found.unseen] == 0).all())


def test_begin_token_and_system_prompt_can_be_left_out_and_answers_are_told_apart(tiny: Path) -> None:
    plain = texts(0)
    first = Rendered(plain[0].token_ids, lead=60, answers=((62, 70),))
    marked = [Text("m", first), *plain[1:]]
    all_of_it = profile(tiny, [corpus(marked)], SMALL).of("credit")
    without = profile(tiny, [corpus(marked)], SMALL, skip_lead=True).of("credit")
    assert all_of_it.num_tokens - without.num_tokens == 60
    assert all_of_it.counts.sum() - without.counts.sum() == 60 * 2 * 2  # layers, top_k
    assert all_of_it.answer_counts.sum() == without.answer_counts.sum() == 8 * 2 * 2
    assert without.num_documents == all_of_it.num_documents


def test_too_little_text_is_refused_with_the_number_needed(tiny: Path) -> None:
    with pytest.raises(PlanError, match="'credit' has 10 tokens in 1 documents; 128 are needed: 32 for each"):
        profile(tiny, [corpus(texts(0, (10,)))], SMALL)


def test_a_model_whose_numbers_overflow_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.experts.3.down_proj.weight"].fill_(3e38)
    write_weights(folder, tensors)
    with pytest.raises(PlanError, match="layer 1: norm is not finite; the model computes NaN or infinity"):
        profile(folder, [corpus(texts(0))], SMALL)


# --- files --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tiny: Path) -> Statistics:
    return profile(tiny, [corpus(texts(0))], SMALL)


def test_a_file_gives_back_what_was_saved(made: Statistics, tmp_path: Path) -> None:
    saved = save_statistics(tmp_path / "x", made)
    loaded = load_statistics(tmp_path / "x", made.model)
    assert (loaded.digest, loaded.shape, loaded.model) == (saved.digest, made.shape, made.model)
    mine, theirs = made.of("credit"), loaded.of("credit")
    assert all(torch.equal(tensor, theirs.tensors()[name]) for name, tensor in mine.tensors().items())
    assert (theirs.num_documents, theirs.num_tokens) == (mine.num_documents, mine.num_tokens)
    assert theirs.corpora == mine.corpora


def test_what_was_read_stays_when_the_file_is_overwritten(made: Statistics, tmp_path: Path) -> None:
    save_statistics(tmp_path / "x", made)
    loaded = load_statistics(tmp_path / "x").of("credit").counts
    before = loaded.clone()
    assert before.any()
    with (tmp_path / "x").open("r+b") as file:  # in place: a mapping would see it
        file.write(bytes((tmp_path / "x").stat().st_size))
    assert torch.equal(loaded, before)


def test_statistics_of_another_model_are_refused(made: Statistics, tmp_path: Path) -> None:
    save_statistics(tmp_path / "x", made)
    other = ModelIdentity.of(tiny_checkpoint(tmp_path / "other", seed=1))
    with pytest.raises(PlanError, match="x was made for another model: its weights differ"):
        load_statistics(tmp_path / "x", other)
    stranger = Statistics(other, made.shape, made.scenarios)
    with pytest.raises(PlanError, match="another model"):
        made.add(stranger)


@pytest.mark.parametrize("place", [40, -1000, -3])
def test_a_changed_byte_is_found(made: Statistics, tmp_path: Path, place: int) -> None:
    save_statistics(tmp_path / "x", made)
    data = bytearray((tmp_path / "x").read_bytes())
    data[place] ^= 1
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(PlanError):
        load_statistics(tmp_path / "x")


@pytest.mark.parametrize("data", [b"", b"text", b"\0" * 64])
def test_what_is_no_statistics_file_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(PlanError, match="^x: "):
        load_statistics(tmp_path / "x")


def test_a_disk_that_refuses_leaves_the_old_file(made: Statistics, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="cannot be written"):
        save_statistics(tmp_path / "missing" / "x", made)
    with pytest.raises(PlanError, match="nothing to write"):
        save_statistics(tmp_path / "x", Statistics(made.model, made.shape, {}))
    assert not list(tmp_path.iterdir())


# --- batches ------------------------------------------------------------------------------------------------


def test_packing_reads_every_token_once_in_order_and_shares_no_block() -> None:
    generator = random.Random(0)
    for _ in range(50):
        documents = [list(range(generator.randint(1, 90))) for _ in range(generator.randint(1, 150))]
        batch, block = generator.choice([(16, 4), (40, 8), (300, 16)])
        read: dict[int, list[int]] = {}
        open_blocks: dict[int, tuple[int, ...]] = {}
        for step in pack(documents, batch, block):
            assert 0 < step.num_tokens <= batch
            used = [item for chunk in step.chunks for item in chunk.blocks]
            assert len(used) == len(set(used))
            assert all(
                0 <= item < cache_blocks([len(ids) for ids in documents], batch, block) for item in used
            )
            for chunk in step.chunks:
                assert len(chunk.blocks) == -(-chunk.end // block)
                before = open_blocks.get(chunk.sequence_id, ())
                assert chunk.blocks[: len(before)] == before
                assert len(read.setdefault(chunk.sequence_id, [])) == chunk.start
                read[chunk.sequence_id] += chunk.token_ids
                open_blocks[chunk.sequence_id] = chunk.blocks
        assert [read[number] for number in range(len(documents))] == documents


# --- the command --------------------------------------------------------------------------------------------


def test_the_command_profiles_adds_and_says_what_it_did(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, letter in (("credit", "a"), ("wealth", "b")):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(letter * 40 + str(line) for line in range(5)))
    options = ["--model", str(tiny), "--no-packed-file", "--json"]
    for name in ("credit", "wealth"):
        out = str(tmp_path / f"{name}.stats")
        assert main(["profile", str(tmp_path / f"{name}.txt"), "--out", out, *options]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["scenarios"]["wealth"]["tokens"] == 5 * 41 and told["scenarios"]["wealth"]["documents"] == 5
    both = str(tmp_path / "both.stats")
    added = ["--add", str(tmp_path / "credit.stats"), "--add", str(tmp_path / "wealth.stats")]
    assert main(["profile", "--out", both, *added]) == 0
    assert sorted(load_statistics(Path(both)).scenarios) == ["credit", "wealth"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to profile"),
        (["a.txt"], "texts need a model"),
        (["none.txt", "--model", "MODEL"], "does not exist"),
        (["--add", "none.stats"], "no such file"),
        (["a.txt", "--model", "MODEL", "--max-tokens", "0"], "--max-tokens 0"),
    ],
)
def test_the_command_never_succeeds_at_doing_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    words = [str(tiny) if word == "MODEL" else word for word in words]
    assert main(["profile", *words, "--out", str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("moe-experts profile: ") and message in error
    assert not (tmp_path / "x").exists()
