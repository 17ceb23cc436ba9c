"""Tokenizer: text to ids and back, from the model folder's tokenizer.json. Knows no chat and no sequences."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import tokenizers

from moe_runtime.errors import CheckpointError, RequestError
from moe_runtime.hf_config import read_json

CONFIG_FILE = "tokenizer_config.json"
NO_NAMES: Mapping[str, str] = MappingProxyType({})
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

# Texts come one at a time: the library's own thread per core would only be in the kernels' way.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Tokenizer:
    """Wraps one ``tokenizers.Tokenizer``.

    *Special* tokens are those the file calls special: ``decode`` leaves them out. *Control* tokens are the
    special ones and every added token written in brackets, like ``<think>`` or ``<｜User｜>``, which some
    families do not call special: text from users must not turn into one of them.
    """

    def __init__(self, description: str, special_names: Mapping[str, str] = NO_NAMES) -> None:
        """``description`` is the text of a tokenizer.json; ``special_names`` are ``bos_token`` and its like.

        Raises CheckpointError.
        """
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_str(description)
            self._description: dict[str, Any] = json.loads(description)
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"not a tokenizer: {error}", file="tokenizer.json") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.control_tokens: dict[str, int] = {
            token.content: token_id for token_id, token in sorted(added.items()) if _is_control(token)
        }
        self.control_ids = frozenset(self.control_tokens.values())
        self.special_names = dict(special_names)
        self.eos_id: int | None = self._tokenizer.token_to_id(self.special_names.get("eos_token", ""))
        self.byte_level = _decoder_types(self._description) == ["ByteLevel"]

    @classmethod
    def load(cls, model_dir: Path) -> "Tokenizer":
        """From ``tokenizer.json`` and, if there, ``tokenizer_config.json``. Raises CheckpointError."""
        return cls(_read(model_dir / "tokenizer.json"), _special_names(read_tokenizer_config(model_dir)))

    @property
    def vocab_size(self) -> int:
        """Ids below this may have a token; a model's own vocab_size is often padded above it."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def max_id(self) -> int:
        """The largest id that ``encode`` can give; -1 without any token."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    def encode(self, text: str, *, add_special_tokens: bool = False, plain: bool = False) -> list[int]:
        """Ids of ``text``.

        ``add_special_tokens`` adds what the file's post-processor adds (often a begin token). ``plain`` takes
        control tokens written in ``text`` for ordinary characters. Other threads run meanwhile, however long
        ``text`` is. Raises RequestError for text that is not Unicode (lone surrogates).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError(f"text is not valid Unicode: {error.reason}", param="messages") from error
        if plain:
            return self._encode_plain(text)
        return _encode(self._tokenizer, [text], add_special_tokens)[0]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of ``token_ids``; bytes that form no character become U+FFFD, ids without token nothing."""
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens))

    def token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it (``Ġthe``, ``▁the``, ``<0x0A>``), None when there is none."""
        token: str | None = self._tokenizer.id_to_token(token_id)
        return token

    def piece(self, token_id: int) -> tuple[str, bytes]:
        """Text and exact bytes of one token inside a text; the text of half a character shows U+FFFD."""
        token = self.token(token_id)
        if token is None:
            return "", b""
        if self.byte_level:
            data = self.byte_level_bytes(token)
        elif match := BYTE_TOKEN.fullmatch(token):
            data = bytes([int(match[1], 16)])
        else:
            data = token.replace("▁", " ").encode("utf-8")
        return data.decode("utf-8", errors="replace"), data

    def byte_level_bytes(self, token: str) -> bytes:
        """Bytes of a byte-level token; one with any other character in it stands for itself."""
        try:
            return bytes(self._byte_of_character[character] for character in token)
        except KeyError:
            return token.encode("utf-8")

    def _encode_plain(self, text: str) -> list[int]:
        ids = _encode(self._plain_tokenizer, [text])[0]
        if self.control_ids.isdisjoint(ids):
            return ids
        # Some vocabularies hold "<s>" as an ordinary entry too. Letter by letter it cannot be met.
        letters = sorted(set(text))
        ids_of = dict(zip(letters, _encode(self._plain_tokenizer, letters), strict=True))
        return [
            token_id for letter in text for token_id in ids_of[letter] if token_id not in self.control_ids
        ]

    @cached_property
    def _plain_tokenizer(self) -> Any:
        """The same tokenizer, blind to control tokens. Made when the first text needs it: it costs a load."""
        description = dict(self._description)
        description["added_tokens"] = [
            token | {"special": token["content"] in self.control_tokens}
            for token in self._description.get("added_tokens") or []
        ]
        plain = tokenizers.Tokenizer.from_str(json.dumps(description))
        plain.encode_special_tokens = True
        plain.no_truncation()
        plain.no_padding()
        return plain

    @cached_property
    def _byte_of_character(self) -> dict[str, int]:
        """The byte-level alphabet: printable bytes stand for themselves, the others for U+0100 onwards."""
        printable = [
            *range(ord("!"), ord("~") + 1),
            *range(ord("¡"), ord("¬") + 1),
            *range(ord("®"), ord("ÿ") + 1),
        ]
        others = [byte for byte in range(256) if byte not in printable]
        return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def read_tokenizer_config(model_dir: Path) -> dict[str, object]:
    """``tokenizer_config.json`` as it is, empty when there is none. Raises CheckpointError."""
    path = model_dir / CONFIG_FILE
    return read_json(path) if path.exists() else {}


def _encode(library: Any, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
    """Ids of each text. Of the library's calls only those for many texts let other Python threads run."""
    encodings = library.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
    return [encoding.ids for encoding in encodings]


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"cannot be read: {error}", file=path.name) from error


def _special_names(config: Mapping[str, object]) -> dict[str, str]:
    """``bos_token`` and its like: a string, or an object with ``content``."""
    names: dict[str, str] = {}
    for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            names[name] = value
    return names


def _is_control(token: Any) -> bool:
    content = token.content
    bracketed = len(content) > 2 and content[0] in "<[" and content[-1] in ">]"
    return bool(token.special or bracketed)


def _decoder_types(description: dict[str, Any]) -> list[str]:
    decoder = description.get("decoder") or {}
    if decoder.get("type") == "Sequence":
        return [part.get("type", "") for part in decoder.get("decoders", [])]
    return [decoder.get("type", "")]
