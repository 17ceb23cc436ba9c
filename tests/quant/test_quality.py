"""The accuracy gate: measured against a literal formula, enforced at load, remembered beside the weights."""

import json
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from published_int4 import AWQ, GPTQ, publish
from test_packed_file import is_mapped, touch
from world import tiny_checkpoint

from moe_runtime import loader
from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine
from moe_runtime.errors import CheckpointError
from moe_runtime.kernels import choose
from moe_runtime.quant import __main__ as command
from moe_runtime.quant.quality import TEXT_FILE, Gate, compare, log_probabilities, text_ids
from moe_runtime.quant.recipe import Recipe
from moe_runtime.tokenizer import Tokenizer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tiny_checkpoint(tmp_path / "model", hidden_size=64)
    (folder / TEXT_FILE).write_text("The first text.\n\nz\n\nThe second one, 第二.\n", encoding="utf-8")
    return folder


def load(folder: Path, **settings: object) -> Engine:
    engine = Engine.load(folder, EngineConfig(**settings))  # type: ignore[arg-type]
    for thread in threading.enumerate():
        if thread.name == "moe-packed-writer":
            thread.join()
    return engine


def test_the_divergence_is_that_of_the_textbook() -> None:
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(length, 50, generator=generator).log_softmax(-1) for length in (3, 4)]
    other = [(a + 0.3 * torch.randn(a.shape, generator=generator)).log_softmax(-1) for a in full]
    p, q = (torch.cat(part).double().exp() for part in (full, other))
    literal = [
        sum(float(x * (x / y).log()) for x, y in zip(a, b, strict=True)) for a, b in zip(p, q, strict=True)
    ]
    found = compare(full, other)
    assert found.kl == pytest.approx(sum(literal) / 7, rel=1e-5)
    assert found.largest_kl == pytest.approx(max(literal), rel=1e-5)
    assert found.top1 == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()))
    assert (found.num_tokens, compare(full, full).kl, compare(full, full).top1) == (7, 0.0, 1.0)


def test_texts_are_the_folders_own_or_the_neutral_ones(model: Path) -> None:
    tokenizer = Tokenizer.load(model)
    first, second = text_ids(model, tokenizer)
    assert (
        tokenizer.decode(first) == "The first text." and tokenizer.decode(second) == "The second one, 第二."
    )
    (model / TEXT_FILE).unlink()
    neutral = text_ids(model, tokenizer)
    assert sum(map(len, neutral)) == 512, "a long text is cut"
    (model / TEXT_FILE).write_text("\n\n\n")
    with pytest.raises(CheckpointError, match="quantization_text.txt: holds no text of two tokens"):
        text_ids(model, tokenizer)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


BAD_TEXTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "Latin-1": (
        lambda path: path.write_bytes("Un café".encode("latin-1")),
        "not UTF-8 at byte 6 .*save it as",
    ),
    "huge": (lambda path: path.write_text("x" * (1 << 20) + "\n"), "larger than 1048576 bytes; shorten it"),
    "a pipe": (_pipe, "not a regular file"),
    "a folder": (Path.mkdir, "cannot be read: Is a directory"),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_text_that_cannot_be_read_is_refused_by_name(model: Path, case: str) -> None:
    write, message = BAD_TEXTS[case]
    (model / TEXT_FILE).unlink()
    write(model / TEXT_FILE)
    with pytest.raises(CheckpointError, match=f"{TEXT_FILE}: {message}"):
        load(model, quantize="int4", max_quant_kl=0.5)


def test_nothing_is_tokenised_beyond_the_tokens_that_are_compared(model: Path) -> None:
    class Counting:
        def __init__(self) -> None:
            self.inner, self.num_texts = Tokenizer.load(model), 0

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            self.num_texts += 1
            return self.inner.encode(text, add_special_tokens=add_special_tokens)

    tokenizer = Counting()
    (model / TEXT_FILE).write_text("\n\n".join(["x" * 73] * 1000))  # the eighth leaves one token
    assert [len(ids) for ids in text_ids(model, tokenizer)] == [73] * 7  # type: ignore[arg-type]
    assert tokenizer.num_texts == 7


def test_texts_are_read_each_from_its_own_beginning(model: Path) -> None:
    decoder = loader.load_model(model, choose("reference"))
    texts = [[5, 6, 7, 8], [6, 7, 8]]
    both = log_probabilities(decoder, texts)
    assert torch.equal(both[1], log_probabilities(decoder, texts[1:])[0])
    assert torch.allclose(both[0].exp().sum(-1), torch.ones(4))


def test_a_model_beyond_the_limit_is_refused_by_name_and_number(model: Path) -> None:
    limit = r"divergence of 0\.\d{4} on average \(over \d+ tokens; .*% of the likeliest tokens stay\), above "
    with pytest.raises(CheckpointError, match=limit + "--max-quant-kl 1e-06; choose finer"):
        load(model, quantize="int4", max_quant_kl=1e-6)
    assert [path.name for path in (model / ".moe_packed").iterdir()] == ["int4-g128.json"]
    load(model, quantize="int4", max_quant_kl=0.5)


def test_a_limit_without_anything_quantised_is_said_to_be_of_no_use(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(model, max_quant_kl=1e-9)
    assert "--max-quant-kl 1e-09 has nothing to do: without --quantize no weight changes" in caplog.text
    caplog.clear()
    load(model)
    assert "--max-quant-kl" not in caplog.text


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry per model packed from its checkpoint: whether it was quantised."""
    loads: list[bool] = []
    pack = loader._pack

    def counting(folder: Path, kernels: object, recipe: Recipe, room: object) -> object:
        loads.append(bool(recipe.formats))
        return pack(folder, kernels, recipe, room)  # type: ignore[arg-type]

    monkeypatch.setattr(loader, "_pack", counting)
    return loads


def test_the_full_model_is_loaded_once_and_never_beside_the_quantised_one(
    model: Path, loads: list[bool]
) -> None:
    load(model, quantize="int4")
    assert loads == [True]
    packed = model / ".moe_packed" / "int4-g128.moe"
    written = packed.stat().st_ino
    # No divergence is known yet, then it is.
    assert is_mapped(load(model, quantize="int4", max_quant_kl=0.5).model) and loads == [True, False]
    assert is_mapped(load(model, quantize="int4", max_quant_kl=0.5).model) and loads == [True, False]
    with pytest.raises(CheckpointError, match="--max-quant-kl 1e-06"):
        load(model, quantize="int4", max_quant_kl=1e-6)
    assert loads == [True, False]
    (model / TEXT_FILE).write_text("Another text, so it is measured again.")
    load(model, quantize="int4", max_quant_kl=0.5)
    assert loads == [True, False, False]
    assert packed.stat().st_ino == written, "for one number the weights are not written again"


def test_a_refused_model_is_measured_once_too(model: Path, loads: list[bool]) -> None:
    for _ in range(2):
        with pytest.raises(CheckpointError, match="--max-quant-kl 1e-06"):
            load(model, quantize="int4", max_quant_kl=1e-6)
        assert loads == [False, True], "the second refusal loads nothing"
    load(model, quantize="int4", max_quant_kl=0.5)
    assert loads == [False, True, True], "and what was found serves another limit"


def _other_program(path: Path) -> None:
    kept = json.loads(path.read_text())
    del kept["finding"]["kl"]
    path.write_text(json.dumps(kept))


def _linked(path: Path) -> None:
    path.rename(path.with_suffix(".real"))
    path.symlink_to(path.with_suffix(".real"))


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda path: os.truncate(path, 40), "is not used, measuring again: .*"),
    "no object": (lambda path: path.write_text("[1]"), "is not used, measuring again: .*"),
    "not text": (lambda path: path.write_bytes(b'{"\xff'), "is not used, measuring again: .*"),
    "huge": (lambda path: os.truncate(path, (16 << 20) + 1), r"it has 16777217 bytes, at most 16777216 are"),
    "writable by others": (lambda path: path.chmod(0o666), r"can be written by others \(mode 666\)"),
    "a link": (_linked, "it is a symbolic link"),
    "stale": (lambda path: touch(path.parent.parent), "it is stale: model.safetensors was of"),
    "of another program": (_other_program, ""),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_finding_that_is_not_fit_is_measured_again(
    model: Path, loads: list[bool], caplog: pytest.LogCaptureFixture, case: str
) -> None:
    damage, message = UNFIT[case]
    load(model, quantize="int4", max_quant_kl=0.5)
    path = model / ".moe_packed" / "int4-g128.json"
    finding = json.loads(path.read_text())["finding"]
    damage(path)
    del loads[:]
    load(model, quantize="int4", max_quant_kl=0.5)
    assert loads[0] is False, "the full model was asked"
    assert re.search(message, caplog.text)
    assert json.loads(path.read_text())["finding"] == finding and not path.is_symlink()
    assert sorted(path.parent.glob(".*")) == []


def test_no_finding_is_kept_of_a_checkpoint_that_was_replaced_meanwhile(
    model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def replaced(self: Gate, decoder: object) -> dict[str, object]:
        touch(model)
        return measure(self, decoder)  # type: ignore[arg-type]

    measure = Gate.measure
    monkeypatch.setattr(Gate, "measure", replaced)
    load(model, quantize="int4", max_quant_kl=0.5)
    assert "int4-g128.json is not written, the next start measures again: the checkpoint was" in caplog.text
    assert "in memory only" in caplog.text and not (model / ".moe_packed").exists()


@pytest.mark.parametrize("method", [AWQ, GPTQ], ids=["awq", "gptq"])
@pytest.mark.parametrize("quantize", ["none", "lm_head=int8"])
def test_a_model_published_in_four_bits_has_nothing_to_be_compared_with(
    tmp_path: Path, loads: list[bool], method: dict[str, object], quantize: str
) -> None:
    folder = tiny_checkpoint(tmp_path)
    publish(folder, method)
    message = "published in 4 bits .*no full-precision model for --max-quant-kl 0.5 .*; leave it out"
    with pytest.raises(CheckpointError, match=message):
        load(folder, quantize=quantize, max_quant_kl=0.5)
    assert loads == [], "it is said before anything is loaded"
    load(folder, quantize=quantize)


def test_the_command_refuses_a_model_published_in_four_bits(
    tmp_path: Path, loads: list[bool], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_checkpoint(tmp_path)
    publish(folder, GPTQ)
    assert command.main(["--model", str(folder)]) == 2
    captured = capsys.readouterr()
    assert re.search(r"config.json: .*4 bits \(gptq\).*for this table.*--model", captured.err)
    assert captured.out == "" and loads == []


def test_a_model_that_computes_nan_does_not_pass(model: Path) -> None:
    gate = Gate(0.5, [[5, 6]])
    gate.prepare(None, lambda: loader.load_model(model, choose("reference")))
    broken = loader.load_model(model, choose("reference"))
    broken.norm.weight = broken.norm.weight * float("nan")
    found = gate.measure(broken)
    with pytest.raises(CheckpointError, match="divergence of nan"):
        gate.check(found)
    again = Gate(0.5, [[5, 6]])
    with pytest.raises(CheckpointError, match="divergence of nan"):
        again.prepare(json.loads(json.dumps(found)), lambda: pytest.fail("it is known"))


def test_the_command_prints_a_row_per_format_and_finer_ones_are_nearer(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    assert command.main(["--model", str(model), "--json", str(out)]) == 0
    rows = {row["format"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows)[0] == "float32" and len(rows) == 9
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 11 and all(line.count("|") == 7 for line in printed)
    assert rows["int8"]["kl"] < rows["int4-g32"]["kl"] < 0.2
    assert rows["int8"]["weight_error"] < rows["int4-g32z"]["weight_error"] < rows["int4-g32"]["weight_error"]
    assert rows["int4-g128"]["weight_bytes"] < rows["int8"]["weight_bytes"] < rows["float32"]["weight_bytes"]
    assert command.main(["--model", str(tmp_path)]) == 2
    assert "tokenizer.json: cannot be read" in capsys.readouterr().err
    assert command.main(["--model", str(tmp_path), "--device", "cuda", "--backend", "reference"]) == 2
    assert "cuda" in capsys.readouterr().err
