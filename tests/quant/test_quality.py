"""The accuracy gate: measured against a literal formula, enforced at load, remembered in the packed file."""

import json
import threading
from pathlib import Path

import pytest
import torch
from published_int4 import GPTQ, publish
from test_packed_file import is_mapped
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
    assert not (model / ".moe_packed").exists()
    load(model, quantize="int4", max_quant_kl=0.5)
    load(model, max_quant_kl=1e-9)  # nothing is quantised


def test_the_full_model_is_loaded_once_and_never_beside_the_quantised_one(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[bool] = []
    pack = loader._pack

    def counting(folder: Path, kernels: object, recipe: Recipe) -> object:
        loads.append(bool(recipe.formats))
        return pack(folder, kernels, recipe)  # type: ignore[arg-type]

    monkeypatch.setattr(loader, "_pack", counting)
    load(model, quantize="int4")
    assert loads == [True]
    # The file knows no divergence yet, then it does.
    assert is_mapped(load(model, quantize="int4", max_quant_kl=0.5).model) and loads == [True, False]
    assert is_mapped(load(model, quantize="int4", max_quant_kl=0.5).model) and loads == [True, False]
    with pytest.raises(CheckpointError, match="--max-quant-kl 1e-06"):
        load(model, quantize="int4", max_quant_kl=1e-6)
    assert loads == [True, False]
    (model / TEXT_FILE).write_text("Another text, so it is measured again.")
    load(model, quantize="int4", max_quant_kl=0.5)
    assert loads == [True, False, False]


def test_a_model_published_in_four_bits_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    publish(folder, GPTQ)
    with pytest.raises(CheckpointError, match="--max-quant-kl compares .* published in 4 bits"):
        load(folder, quantize="lm_head=int8", max_quant_kl=0.5)


def test_a_model_that_computes_nan_does_not_pass(model: Path) -> None:
    gate = Gate(0.5, [[5, 6]])
    gate.prepare(None, lambda: loader.load_model(model, choose("reference")))
    broken = loader.load_model(model, choose("reference"))
    broken.norm.weight = broken.norm.weight * float("nan")
    with pytest.raises(CheckpointError, match="divergence of nan"):
        gate.measure(broken)


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
