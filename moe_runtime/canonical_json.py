"""Equal values have equal digests, on every machine: the hash of a value's canonical JSON."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def digest(value: Any) -> str:
    """SHA-256, hexadecimal. Raises ValueError or TypeError for what JSON cannot hold, such as NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
