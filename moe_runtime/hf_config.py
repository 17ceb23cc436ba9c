"""Reads a Hugging Face ``config.json`` strictly: every value has a type and a range, every key is known.

A key that nobody reads could change the mathematics, so it is refused rather than ignored. What cannot
change them (training settings, bookkeeping of the saving library) is listed in ``INERT``; a key set to
null, false or empty switches nothing on and passes too.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from moe_runtime.errors import CheckpointError

MAX_JSON_BYTES = 64 * 1024 * 1024

INERT = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "_commit_hash", "architectures",
    "attention_dropout", "aux_loss_alpha", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "embedding_dropout", "ep_size", "eos_token_id", "id2label", "initializer_range", "is_decoder", "label2id",
    "max_length", "min_length", "model_type", "mtp_loss_scaling_factor", "num_beams", "output_dropout",
    "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "router_aux_loss_coef",
    "router_jitter_noise", "router_z_loss_coef", "seq_aux", "temperature", "tokenizer_class", "top_k",
    "top_p",
    "torch_dtype", "transformers_version", "typical_p", "use_cache", "length_penalty", "repetition_penalty",
    "diversity_penalty", "num_beam_groups", "num_return_sequences", "encoder_no_repeat_ngram_size",
    "no_repeat_ngram_size", "unsloth_version", "moe_capacity_factor", "use_bfloat16",
})  # fmt: skip


def read_json(path: Path) -> dict[str, object]:
    """The JSON object in ``path``. Raises CheckpointError when it is absent, oversized, not an object, holds
    a key twice, or a number that JSON does not have (NaN).
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise CheckpointError(f"larger than {MAX_JSON_BYTES} bytes", file=path.name)
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=path.name) from error
    except ValueError as error:
        raise CheckpointError(f"not valid JSON: {error}", file=path.name) from error
    if not isinstance(value, dict):
        raise CheckpointError("the top level is not an object", file=path.name)
    return value


def parse_json(text: bytes) -> object:
    """``json.loads`` that raises ValueError on duplicate keys, NaN, bad UTF-8 and absurd nesting."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _no_duplicates(pairs: Sequence[tuple[str, object]]) -> dict[str, object]:
    values: dict[str, object] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"duplicate key {key!r}")
        values[key] = value
    return values


def _no_constant(name: str) -> object:
    raise ValueError(f"{name} is not a number")


class Fields:
    """One JSON object, read key by key.

    Each reader takes the key (``"num_experts|num_local_experts"`` means either name; both may be there if
    they agree), checks type and range, and remembers the key; ``finish`` refuses what was never read. A
    reader without ``default`` requires the key; null counts as absent.
    """

    def __init__(self, values: Mapping[str, object], file: str = "config.json", path: str = "") -> None:
        self._values = values
        self._file = file
        self._path = path
        self._read: set[str] = set()

    def error(self, key: str, message: str) -> CheckpointError:
        return CheckpointError(f"{self._path}{key}: {message}", file=self._file)

    def has(self, keys: str) -> bool:
        """Whether the key is there with a value other than null."""
        return any(self._values.get(key) is not None for key in keys.split("|"))

    def _take(self, keys: str) -> tuple[str, object]:
        names = keys.split("|")
        self._read.update(names)
        found = [(name, self._values[name]) for name in names if self._values.get(name) is not None]
        if len(found) > 1 and any(value != found[0][1] for _, value in found):
            raise self.error(" and ".join(name for name, _ in found), "two names of one field disagree")
        return found[0] if found else (names[0], None)

    def integer(self, keys: str, low: int, high: int, default: int | None = None) -> int:
        key, value = self._take(keys)
        if value is None:
            if default is None:
                raise self.error(key, "missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"expected an integer, got {_show(value)}")
        if not low <= value <= high:
            raise self.error(key, f"{_show(value)} is outside {low}..{high}")
        return value

    def optional_integer(self, keys: str, low: int, high: int) -> int | None:
        self._take(keys)
        return self.integer(keys, low, high) if self.has(keys) else None

    def number(self, keys: str, low: float, high: float, default: float | None = None) -> float:
        key, value = self._take(keys)
        if value is None:
            if default is None:
                raise self.error(key, "missing")
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(key, f"expected a number, got {_show(value)}")
        if not low <= value <= high:  # false for NaN, and exact for integers too large for a float
            raise self.error(key, f"{_show(value)} is outside {low:g}..{high:g}")
        return float(value)

    def optional_number(self, keys: str, low: float, high: float) -> float | None:
        self._take(keys)
        return self.number(keys, low, high) if self.has(keys) else None

    def flag(self, keys: str, default: bool) -> bool:
        key, value = self._take(keys)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"expected true or false, got {_show(value)}")
        return value

    def choice(self, keys: str, options: Sequence[str], default: str | None = None) -> str:
        key, value = self._take(keys)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "missing")
        if not isinstance(value, str) or value not in options:
            raise self.error(key, f"{_show(value)} is not supported; supported: {', '.join(options)}")
        return value

    def integers(self, keys: str, low: int, high: int) -> tuple[int, ...]:
        """A list of integers, or a single one; absent is empty."""
        key, value = self._take(keys)
        items = value if isinstance(value, list) else [] if value is None else [value]
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int) or not low <= item <= high:
                raise self.error(key, f"expected integers in {low}..{high}, got {_show(value)}")
        return tuple(items)

    def strings(self, keys: str) -> tuple[str, ...]:
        key, value = self._take(keys)
        items = [] if value is None else value
        if not isinstance(items, list) or not all(isinstance(item, str) for item in items):
            raise self.error(key, f"expected a list of strings, got {_show(value)}")
        return tuple(items)

    def section(self, keys: str) -> "Fields | None":
        key, value = self._take(keys)
        if value is None or value == {}:
            return None
        if not isinstance(value, dict):
            raise self.error(key, f"expected an object, got {_show(value)}")
        return Fields(value, self._file, f"{self._path}{key}.")

    def skip(self, *keys: str) -> None:
        """Leave keys aside whose value, whatever it is, cannot matter here."""
        self._read.update(keys)

    def expect(self, keys: str, value: object, reason: str) -> None:
        """Refuse the file when ``keys`` is there with anything but ``value`` (or null)."""
        key, found = self._take(keys)
        if found is not None and (type(found) is not type(value) or found != value):
            raise self.error(key, f"{_show(found)} is not supported: {reason}")

    def finish(self) -> None:
        """Refuse keys that no reader asked for."""
        for key in sorted(self._values.keys() - self._read - INERT):
            value = self._values[key]
            if value is None or value is False or value == [] or value == {} or value == "":
                continue
            raise self.error(
                ascii(key[:80])[1:-1],
                f"unknown setting ({_show(value)}); it might change the mathematics, so it is refused. "
                "If it is known to be harmless, remove it from the file",
            )


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
