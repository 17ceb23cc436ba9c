"""Where tokens begin in the text, for vocabularies with a begin token, half characters and leading spaces."""

import pytest

from moe_runtime.engine import TokenLogprob
from moe_runtime.server.logprobs import CompletionLogprobs, Piece

SPECIAL = {1, 2}
TEXTS = {1: "<s>", 2: "</s>", 3: " Hello", 4: " world", 5: "!", 6: "Hello", 7: " "}


def _piece(token_id: int) -> Piece:
    data = bytes([token_id]) if token_id >= 128 else TEXTS[token_id].encode()
    return Piece(data.decode(errors="replace"), data)


@pytest.mark.parametrize(
    ("echo", "prompt", "answer", "offsets"),
    [
        ("Hello world", [1, 3, 4], [5, 4], [0, 0, 5, 11, 12]),
        (" Hello world", [1, 7, 6, 4], [5], [0, 0, 1, 6, 12]),
        ("<s>Hello", [1, 6], [2, 5, 2], [0, 3, 8, 8, 9]),
        ("利!", [*"利".encode(), 5], [*"率".encode(), 4], [0, 0, 0, 1, 2, 2, 2, 3]),
        ("\ufffd", [0xE5], [5], [0, 1]),
        ("", [], [4, 2, 5], [0, 6, 6]),
    ],
)
def test_offsets_point_to_the_text_of_each_token(
    echo: str, prompt: list[int], answer: list[int], offsets: list[int]
) -> None:
    logprobs = CompletionLogprobs(SPECIAL)
    pieces = [_piece(token_id) for token_id in prompt]
    first = logprobs.prompt(echo, prompt, pieces, [None] * len(prompt))
    tokens = [TokenLogprob(i, _piece(i).text, _piece(i).bytes, -1.0) for i in answer]
    second = [logprobs.answer([token]) for token in tokens]  # one by one, as a stream comes
    assert first["text_offset"] + [at for part in second for at in part["text_offset"]] == offsets
