"""The demo's tokenizer and chat format: byte-level BPE, each Han character and each digit its own piece.

Byte-level means that every text survives a round trip. ChatML marks the turns; the template is the one
that stock engines render.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from moe_runtime.errors import ConfigError
from moe_runtime.experts.demo.corpus import Author
from moe_runtime.experts.demo.phrases import Phrasebook
from moe_runtime.experts.demo.wording import Wording

START, END, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
SPECIAL = (PAD, START, END)
SAMPLE_DOCUMENTS = 12_000

CHAT_TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def render(turns: Sequence[tuple[str, str]], generation_prompt: bool = False) -> str:
    """The text that CHAT_TEMPLATE makes of ``(role, text)`` turns."""
    text = "".join(f"{START}{role}\n{content}{END}\n" for role, content in turns)
    return text + f"{START}assistant\n" if generation_prompt else text


def train(book: Phrasebook, seed: int, vocab: int) -> Tokenizer:
    """A tokenizer of at most ``vocab`` tokens, trained on sampled documents and general word lists."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\p{Han}"), "isolated"),
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=8,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(book, seed), trainer=trainer)
    return tokenizer


def _texts(book: Phrasebook, seed: int) -> Iterator[str]:
    author = Author(book, seed)
    for document in itertools.islice(author.documents(), SAMPLE_DOCUMENTS):
        for role, text in document.turns:
            yield f"{role}\n{text}"
    general = Wording(author.rng)
    for language in ("en", "zh"):
        joint = " " if language == "en" else ""
        for _ in range(3000):
            yield joint + joint.join(general.word(language) for _ in range(3))


def save(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context,
        "bos_token": None,
        "eos_token": END,
        "pad_token": PAD,
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of a token that has to exist. Raises ConfigError when the vocabulary lacks it."""
    found: int | None = tokenizer.token_to_id(token)
    if found is None:
        raise ConfigError(f"the tokenizer has no token {token!r}")
    return found


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a model folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))
