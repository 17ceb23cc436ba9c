"""Which texts have passages in common, told from a sample of hashes: so that nothing is tested on what it was
planned with.

Every run of WINDOW tokens has a hash; of these about one in ONE_IN is kept, chosen by the hash itself, so
that two texts that share a passage keep the same hashes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

WINDOW = 16  # tokens; a shorter text is one run
ONE_IN = 8
FACTOR = np.uint64(0x9E3779B97F4A7C15)
Hashes = npt.NDArray[np.int64]


def mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Each value's bits spread over all 64 (the finaliser of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def fingerprints(token_ids: Sequence[int]) -> Hashes:
    """Ascending, distinct, at least one of a text that has tokens."""
    ids = mixed(np.asarray(token_ids, dtype=np.uint64) + np.uint64(1))
    width = min(WINDOW, len(ids))
    if not width:
        return np.empty(0, dtype=np.int64)
    hashes = np.zeros(len(ids) - width + 1, dtype=np.uint64)
    for place in range(width):
        hashes = hashes * FACTOR + ids[place : place + len(hashes)]
    hashes = mixed(hashes)
    kept = hashes[hashes % np.uint64(ONE_IN) == 0]
    return np.unique(kept if len(kept) else hashes.min(keepdims=True)).view(np.int64)


def union(parts: Iterable[Hashes]) -> Hashes:
    """Ascending, distinct."""
    return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *parts]))


def shared(token_ids: Sequence[int], known: Hashes) -> float:
    """The share of a text's fingerprints, 0 to 1, that are among ``known``."""
    own = fingerprints(token_ids)
    return float(np.isin(own, known).mean()) if len(own) else 0.0
