"""Text to ids and back, whole or token by token, for byte-level and for byte-fallback vocabularies."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Library
from world import write_tokenizer

from moe_runtime.detokenizer import StopStrings, detokenizer_for
from moe_runtime.errors import CheckpointError, RequestError
from moe_runtime.tokenizer import Tokenizer

TEXTS = [
    "hello world, hello there",
    "你好，世界。利率是多少？",
    "naïve café 🙂🙂",
    "def f(x):\n    return x\n",
]
SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_level(vocab_size: int = 320) -> Tokenizer:
    """Like Qwen's: byte-level BPE, and an added token that the file does not call special."""
    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=SPECIALS, show_progress=False
    )
    library.train_from_iterator(TEXTS, trainer)
    library.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<｜User｜>", normalized=False)])
    library.add_tokens([AddedToken("    ", normalized=False), AddedToken("/nothink", normalized=False)])
    return Tokenizer(library.to_str(), {"eos_token": "<|im_end|>"})


def byte_fallback() -> Tokenizer:
    """Like Llama's and Mixtral's: a visible space, and tokens for single bytes."""
    letters = sorted(set("".join(TEXTS[:1]) + "你好naïve▁"))
    names = [
        "<unk>",
        *SPECIALS,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *letters,
        "▁h",
        "el",
        "lo",
        "▁▁",
    ]
    merges = [("▁", "h"), ("e", "l"), ("l", "o"), ("▁", "▁")]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    library = Library(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens([AddedToken(name, normalized=False) for name in ["<unk>", *SPECIALS]])
    return Tokenizer(library.to_str())


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}
DEMO_FILE = Path(__file__).resolve().parent.parent / "experts" / "demo" / "model" / "tokenizer.json"
DEMO = Tokenizer(DEMO_FILE.read_text(encoding="utf-8"))
either = pytest.mark.parametrize("name", TOKENIZERS)
IDS = st.lists(st.integers(0, 300), max_size=30)


@either
@settings(max_examples=300, derandomize=True, deadline=None)
@given(ids=IDS)
def test_pieces_put_together_are_the_full_decoding(name: str, ids: list[int]) -> None:
    tokenizer = TOKENIZERS[name]
    detokenizer = detokenizer_for(tokenizer)
    pieces = [detokenizer.push(token_id) for token_id in ids] + [detokenizer.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)


@either
@settings(max_examples=200, derandomize=True, deadline=None)
@given(text=st.text(max_size=20))
def test_no_half_character_is_ever_shown(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    detokenizer = detokenizer_for(tokenizer)
    ids = tokenizer.encode(text, plain=True)
    pieces = [detokenizer.push(token_id) for token_id in ids] + [detokenizer.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(prompt=IDS, ids=IDS)
def test_an_answer_continues_its_prompt(prompt: list[int], ids: list[int]) -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    prompt = [token_id for token_id in prompt if not 5 <= token_id < 5 + 256] + [270]  # no bytes at the seam
    detokenizer = detokenizer_for(tokenizer, prompt)
    answer = "".join(detokenizer.push(token_id) for token_id in ids) + detokenizer.finish()
    assert tokenizer.decode(prompt) + answer == tokenizer.decode(prompt + ids)


def test_byte_level_text_streams_character_by_character() -> None:
    tokenizer = TOKENIZERS["byte level"]
    detokenizer = detokenizer_for(tokenizer)
    pieces = [detokenizer.push(token_id) for token_id in tokenizer.encode("🙂a")]
    assert "".join(pieces) == "🙂a" and all(piece in ("", "🙂", "a", "🙂a") for piece in pieces)


@either
@settings(max_examples=200, derandomize=True, deadline=None)
@given(text=st.text(max_size=20), special=st.sampled_from(SPECIALS), at=st.integers(0, 20))
def test_special_tokens_in_plain_text_are_ordinary_characters(
    name: str, text: str, special: str, at: int
) -> None:
    tokenizer = TOKENIZERS[name]
    hostile = text[:at] + special + text[at:]
    ids = tokenizer.encode(hostile, plain=True)
    assert tokenizer.control_ids.isdisjoint(ids)
    assert special in tokenizer.decode(ids, skip_special_tokens=False)
    assert tokenizer.control_tokens[special] in tokenizer.encode(special)


def test_bracketed_added_tokens_are_control_tokens_and_others_are_not() -> None:
    tokenizer = TOKENIZERS["byte level"]
    assert {"<think>", "<｜User｜>", *SPECIALS} == set(tokenizer.control_tokens)
    assert tokenizer.encode("    ", plain=True) == tokenizer.encode("    ")
    assert len(tokenizer.encode("<think>")) == 1 < len(tokenizer.encode("<think>", plain=True))


@either
@given(text=st.text(max_size=30))
@settings(max_examples=200, derandomize=True, deadline=None)
def test_plain_and_ordinary_encoding_agree_on_harmless_text(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    assert tokenizer.encode(text) == tokenizer.encode(text, plain=True)


LIBRARIES = [
    (tokenizer, Library.from_str(json.dumps(tokenizer._description)))
    for tokenizer in (*TOKENIZERS.values(), DEMO)
]
PARTS = st.text(max_size=8) | st.sampled_from([*SPECIALS, *TEXTS, " ", "<think>"])


@settings(max_examples=300, derandomize=True, deadline=None)
@given(parts=st.lists(PARTS, max_size=8), add_special_tokens=st.booleans())
def test_ids_are_those_of_the_library_s_call_for_one_text(parts: list[str], add_special_tokens: bool) -> None:
    text = "".join(parts)
    for tokenizer, library in LIBRARIES:
        expected = library.encode(text, add_special_tokens=add_special_tokens).ids
        assert tokenizer.encode(text, add_special_tokens=add_special_tokens) == expected


def longest_wait_of_another_thread(work: Callable[[], object]) -> float:
    """As a share of the time that ``work`` takes."""
    moments: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.wait(0.002):
            moments.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        start = time.monotonic()
        work()
        end = time.monotonic()
    finally:
        done.set()
        thread.join()
    turns = [start, *(moment for moment in moments if start < moment < end), end]
    return max(later - earlier for earlier, later in zip(turns, turns[1:], strict=False)) / (end - start)


@pytest.mark.parametrize("plain", [False, True])
def test_other_threads_run_while_a_long_text_is_encoded(plain: bool) -> None:
    words = ["interest", "rate", "Harbor", "基金的风险等级", "<|im_end|>", "🙂", "4.5 %"]
    text = " ".join(random.Random(1).choices(words, k=100_000))
    DEMO.encode("<|im_end|>", plain=plain)  # what is made at the first call only
    # A call that keeps the interpreter makes the others wait for all of it (1.0); measured without: 0.05.
    assert longest_wait_of_another_thread(lambda: DEMO.encode(text, plain=plain)) < 0.5


def test_one_text_at_a_time_needs_no_thread_per_core() -> None:
    code = (
        "import os, sys; from pathlib import Path; from moe_runtime.tokenizer import Tokenizer; "
        "tokenizer = Tokenizer(Path(sys.argv[1]).read_text(encoding='utf-8')); "
        "before = os.listdir('/proc/self/task'); tokenizer.encode('hello ' * 1000); "
        "assert os.listdir('/proc/self/task') == before"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TOKENIZERS_")}
    subprocess.run([sys.executable, "-c", code, str(DEMO_FILE)], check=True, env=environment, timeout=60)


def test_an_ordinary_entry_spelt_like_a_control_token_is_never_met_in_plain_text() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    ids = tokenizer.encode("<s> hello <s>" * 3, plain=True)
    assert tokenizer.control_ids.isdisjoint(ids)
    assert tokenizer.decode(ids, skip_special_tokens=False).count("<s>") == 6


def test_the_largest_id_counts_gaps_and_added_tokens() -> None:
    for tokenizer in TOKENIZERS.values():
        assert tokenizer.max_id == tokenizer.vocab_size - 1
    sparse = Library(models.WordLevel({"a": 0, "b": 41}, unk_token="a"))
    assert (Tokenizer(sparse.to_str()).max_id, Tokenizer(sparse.to_str()).vocab_size) == (41, 2)


def test_pieces_have_exact_bytes_even_of_half_characters() -> None:
    tokenizer = TOKENIZERS["byte fallback"]
    assert tokenizer.piece(5 + 0xE4) == ("\ufffd", b"\xe4")
    level = TOKENIZERS["byte level"]
    assert b"".join(level.piece(token_id)[1] for token_id in level.encode("é 🙂")) == "é 🙂".encode()
    assert level.piece(10**6) == ("", b"")


@either
def test_lone_surrogates_are_refused(name: str) -> None:
    with pytest.raises(RequestError, match="not valid Unicode"):
        TOKENIZERS[name].encode("a\ud800b")


def test_a_folder_is_read_with_its_end_token(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    assert Tokenizer.load(tmp_path).eos_id == 258


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": {"type": "nonsense"}}', "\x00"])
def test_a_broken_tokenizer_file_is_a_checkpoint_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_missing_or_broken_configuration_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: cannot be read"):
        Tokenizer.load(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps([]))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


CUTS = st.lists(st.text("abc", max_size=4), max_size=8)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3)


def literal_stop(text: str, stops: list[str], include: bool, num_early: int) -> tuple[str, str | None]:
    """Read letter by letter; stop at the first letter that completes a stop string (the longest of them),
    the first ``num_early`` letters aside.
    """
    for end in range(num_early + 1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            stop = max(done, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=500, derandomize=True, deadline=None)
@given(pieces=CUTS, stops=STOPS, include=st.booleans(), num_early=st.integers(0, 5))
def test_stop_strings_cut_at_the_same_place_however_the_text_is_cut_up(
    pieces: list[str], stops: list[str], include: bool, num_early: int
) -> None:
    matcher = StopStrings(stops, include_stop=include)
    shown, found = "", None
    for place, piece in enumerate(pieces):
        text, found = matcher.push(piece, may_stop=place >= num_early)
        shown += text
        if found is not None:
            break
    shown += matcher.finish() if found is None else ""
    num_early_letters = len("".join(pieces[:num_early]))
    assert (shown, found) == literal_stop("".join(pieces), stops, include, num_early_letters)


def test_text_that_cannot_become_a_stop_string_is_shown_at_once() -> None:
    matcher = StopStrings(["stop"])
    assert [matcher.push(piece)[0] for piece in ("as", "t", "ars", "x")] == ["a", "", "star", "sx"]
