"""Scenario texts: what is read as what, and every way in which a text can be wrong."""

import json
from pathlib import Path

import pytest
from world import END_OF_TEXT, tiny_checkpoint, write_json

from moe_runtime.errors import PlanError
from moe_runtime.experts.corpus import find_scenarios, find_texts_of, read_corpus
from moe_runtime.experts.corpus_text import Renderer
from moe_runtime.experts.fingerprints import fingerprints, shared, union

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Rate?"},
    {"role": "assistant", "content": "5%"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def renderer(model: Path) -> Renderer:
    return Renderer.load(model)


def text_of(ids: tuple[int, ...]) -> str:
    return bytes(token for token in ids if token < 256).decode()


def jsonl(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    return path


def test_conversations_are_rendered_and_everybody_is_told_apart(renderer: Renderer) -> None:
    found = renderer.chat(TALK)
    answers = [text_of(found.token_ids[start:end]) for start, end in found.answers]
    assert [answer.split("\n")[0] for answer in answers] == ["5%", "Yes"]
    assert text_of(found.token_ids[: found.lead]).startswith("system\nBe brief.\n")
    assert "Rate?" not in text_of(found.token_ids[: found.lead])
    assert found.token_ids[: len(found.prompt_ids)] == found.prompt_ids
    assert text_of(found.prompt_ids).endswith("Sure?\nassistant\n")


def test_a_known_answer_is_the_last_word(renderer: Renderer, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "q.jsonl", {"messages": TALK[:2], "answer": "7%"})
    (text,) = read_corpus("credit", path, renderer).texts
    start, end = text.rendered.answers[0]
    assert text.answer == "7%" and text_of(text.token_ids[start:end]).startswith("7%")
    assert text.token_ids[:start] == text.rendered.prompt_ids


def test_paragraphs_are_documents_and_a_folder_is_a_scenario(renderer: Renderer, tmp_path: Path) -> None:
    folder = tmp_path / "credit"
    folder.mkdir()
    (folder / "a.txt").write_text("\none\nmore\n\n\ntwo\n")
    jsonl(folder / "b.jsonl", {"text": "three"})
    found = read_corpus("credit", folder, renderer)
    assert sorted(text_of(text.token_ids) for text in found.texts) == ["one\nmore", "three", "two"]
    assert sorted(text.id for text in found.texts) == ["a.txt:2", "a.txt:6", "b.jsonl:1"]
    assert found.num_tokens == 16


def test_a_seed_is_an_order_and_the_digest_minds_neither_order_nor_files(
    renderer: Renderer, tmp_path: Path
) -> None:
    words = [f"text number {number}" for number in range(20)]
    (tmp_path / "a.txt").write_text("\n\n".join(words))
    jsonl(tmp_path / "b.jsonl", *({"text": word} for word in reversed(words)))
    first, again, other = (read_corpus("s", tmp_path / "a.txt", renderer, seed=seed) for seed in (1, 1, 2))
    assert first == again and first.texts != other.texts
    assert first.digest == other.digest == read_corpus("s", tmp_path / "b.jsonl", renderer).digest
    assert first.take(30).texts == first.texts[:2] and first.take(1).texts == first.texts[:1]
    assert first.take(30).digest != first.digest


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.txt", b"", "holds no text"),
        ("x.txt", b" \n\n \n", "holds no text"),
        ("x.jsonl", b"", "holds no text"),
        ("x.txt", b"good\n\nb\xff", r"x.txt:3: not UTF-8"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', "x.jsonl:2: "),
        ("x.jsonl", b"[]", "must be an object"),
        ("x.jsonl", b"{}", "either messages or text"),
        ("x.jsonl", b'{"text": "a", "messages": []}', "either messages or text"),
        ("x.jsonl", b'{"text": "a", "tools": []}', "either messages or text"),
        ("x.jsonl", b'{"text": "a", "text": "b"}', "duplicate key"),
        ("x.jsonl", b'{"text": " "}', "not blank"),
        ("x.jsonl", b'{"text": 1}', "must be a string"),
        ("x.jsonl", b'{"text": "\\ud800"}', "not valid Unicode"),
        ("x.jsonl", b'{"messages": []}', "not empty"),
        ("x.jsonl", b'{"messages": [1]}', "role and content"),
        ("x.jsonl", b'{"text": "a", "answer": "b"}', "belongs to messages"),
        ("x.jsonl", b'{"messages": [{"role": "assistant", "content": "a"}], "answer": "b"}', "cannot follow"),
        ("x.txt", b"a" * 513, "513 tokens; the model's context is 512: split it"),
        ("x.csv", b"a", "ends in .jsonl or .txt"),
    ],
)
def test_what_cannot_be_read_is_an_error_that_says_where(
    renderer: Renderer, tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PlanError, match=message):
        read_corpus("credit", tmp_path / name, renderer)


def test_missing_and_empty_folders_are_errors(renderer: Renderer, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="no .jsonl or .txt file"):
        read_corpus("credit", tmp_path, renderer)
    with pytest.raises(PlanError, match="does not exist"):
        read_corpus("credit", tmp_path / "none", renderer)


def test_messages_need_a_template(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    write_json(folder / "tokenizer_config.json", {"bos_token": "<|endoftext|>"})
    renderer = Renderer.load(folder)
    assert renderer.text("<|endoftext|>a").lead == 1 and renderer.text("a").lead == 0
    assert renderer.text("<|endoftext|>a").token_ids == (END_OF_TEXT, 97)
    with pytest.raises(PlanError, match="no chat template"):
        renderer.chat(TALK)


def test_scenarios_are_named_by_files_folders_or_by_hand(tmp_path: Path) -> None:
    for name in ("credit", "wealth"):
        (tmp_path / "all" / name).mkdir(parents=True)
        (tmp_path / "all" / name / "a.txt").write_text("x")
    assert sorted(find_scenarios([str(tmp_path / "all")])) == ["credit", "wealth"]
    assert sorted(find_scenarios([str(tmp_path / "all" / "credit"), "loans=b.txt"])) == ["credit", "loans"]
    with pytest.raises(PlanError, match="two scenarios are called 'credit'"):
        find_scenarios([str(tmp_path / "all"), "credit.txt"])
    with pytest.raises(PlanError, match="a name has letters"):
        find_scenarios(["../x=a.txt"])
    (tmp_path / "all" / "b.txt").write_text("x")
    with pytest.raises(PlanError, match="files and folders"):
        find_scenarios([str(tmp_path / "all")])


def test_fingerprints_find_a_passage_that_two_texts_share() -> None:
    first, second = list(range(400)), list(range(1000, 1400))
    known = union([fingerprints(first), fingerprints([7])])
    assert shared(first, known) == 1 and shared(second, known) == 0
    assert 0.2 < shared(first[100:200] + second[:200], known) < 0.5
    assert shared([7], known) == 1 and shared([8], known) == 0
    assert shared([], known) == 0 and len(fingerprints(first)) < 100


def test_only_a_bare_path_is_the_text_of_whatever_plan_it_is_given_to() -> None:
    assert find_texts_of(["credit"], ["w.txt"]) == {"credit": Path("w.txt")}
    assert find_texts_of(["credit"], ["wealth=w.txt", "credit.txt"]) == {"credit": Path("credit.txt")}
    for scenarios, words in (
        (["credit"], ["wealth=w.txt"]),
        (["credit"], ["w.txt", "wealth.txt"]),
        (["credit", "wealth"], ["wealth.txt"]),
    ):
        with pytest.raises(PlanError, match="no text of the plan's scenario 'credit'; .* of: .*w"):
            find_texts_of(scenarios, words)
