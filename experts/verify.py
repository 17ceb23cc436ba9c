"""Is an exported checkpoint the masked model? Asked of its files, of logits bit by bit, and of answers.

Both models run on the same kernels, one after the other, so that one at a time is in memory. Logits are
float32 and compared as bits, through a digest per position.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_runtime.checkpoint import open_regular
from moe_runtime.config import EngineConfig
from moe_runtime.engine import Engine
from moe_runtime.errors import CheckpointError, PlanError, RequestFailed
from moe_runtime.experts import documents
from moe_runtime.experts.documents import Document
from moe_runtime.experts.export import MANIFEST, MANIFEST_KIND
from moe_runtime.experts.forward import all_logits, batch_tokens
from moe_runtime.experts.packing import cache_blocks, pack
from moe_runtime.experts.progress import Progress
from moe_runtime.masks import NO_MASK
from moe_runtime.plan import ExpertMask
from moe_runtime.sampling import SamplingParams

SCENARIO = "verify"
DIGEST_BYTES = 16
SHORTEST, LONGEST = 4, 32  # generated prompts, in tokens
MAX_TOLD = 10  # differences that are named
Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Verification:
    """prompts           how many, with ``positions`` tokens together, each with its logits compared
    generated         tokens of greedy answers that were compared
    files             how many the manifest names
    files_different   those of them that are missing or have other contents
    logits_different  (prompt, position) of logits whose bits differ
    answers_different  prompts whose greedy answers differ
    outside_mask      how often the masked model left its mask, which it never may
    """

    prompts: int
    positions: int
    generated: int
    files: int
    files_different: tuple[str, ...]
    logits_different: tuple[tuple[int, int], ...]
    answers_different: tuple[int, ...]
    outside_mask: int

    @property
    def passed(self) -> bool:
        return not (
            self.files_different or self.logits_different or self.answers_different or self.outside_mask
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "prompts": self.prompts,
            "positions": self.positions,
            "generated_tokens": self.generated,
            "files": self.files,
            "files_different": list(self.files_different),
            "logits_different": len(self.logits_different),
            "first_logits_different": [list(place) for place in self.logits_different[:MAX_TOLD]],
            "answers_different": len(self.answers_different),
            "first_answers_different": list(self.answers_different[:MAX_TOLD]),
            "outside_mask": self.outside_mask,
        }


@dataclass(frozen=True)
class _Outputs:
    """``logits``: a digest for each position of each prompt; ``answers``: token ids of each prompt's."""

    logits: list[list[bytes]]
    answers: list[tuple[int, ...]]
    outside_mask: int


def generate_prompts(count: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random token ids, the same for the same arguments on every machine."""
    chance = random.Random(seed)
    return [
        [chance.randrange(vocab_size) for _ in range(chance.randint(SHORTEST, LONGEST))] for _ in range(count)
    ]


def load_manifest(exported: Path, mask: ExpertMask) -> Document:
    """An export's manifest. Raises PlanError when it is missing, was changed, or is of another mask."""
    manifest = documents.load(exported / MANIFEST, MANIFEST_KIND)
    if manifest.body.get("mask_digest") != mask.digest:
        raise PlanError(f"{exported.name} was exported from another plan: its mask differs")
    return manifest


def verify(
    model_dir: Path,
    mask: ExpertMask,
    exported: Path,
    prompts: Prompts,
    config: EngineConfig,
    *,
    max_tokens: int,
) -> Verification:
    """Compare the model in ``model_dir`` under ``mask`` with the one in ``exported`` on ``prompts`` (token
    ids), answering each greedily with ``max_tokens`` tokens.

    Raises PlanError for no prompts, empty ones and an export of another mask; RequestFailed for logits that
    are not finite; else what loading raises.
    """
    if not prompts or not all(prompts):
        raise PlanError("nothing to verify with: there must be prompts, each of one token or more")
    manifest = load_manifest(exported, mask)
    files: dict[str, str] = manifest.body["files"]
    different = tuple(name for name, digest in files.items() if not _has_digest(exported / name, digest))
    # Weights come from the checkpoints themselves, and no file is left in either folder.
    longest = max(len(ids) for ids in prompts) + max_tokens
    config = replace(config, packed_file=False, max_context=longest)
    masked = _run(model_dir, mask, prompts, config, max_tokens)
    alone = _run(exported, None, prompts, config, max_tokens)
    return Verification(
        prompts=len(prompts),
        positions=sum(len(ids) for ids in prompts),
        generated=sum(len(ids) for ids in masked.answers),
        files=len(files),
        files_different=different,
        logits_different=tuple(
            (prompt, position)
            for prompt, rows in enumerate(zip(masked.logits, alone.logits, strict=True))
            for position, (one, other) in enumerate(zip(*rows, strict=True))
            if one != other
        ),
        answers_different=tuple(
            prompt
            for prompt, (one, other) in enumerate(zip(masked.answers, alone.answers, strict=True))
            if one != other
        ),
        outside_mask=masked.outside_mask,
    )


def _has_digest(path: Path, digest: str) -> bool:
    try:
        with open_regular(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == digest
    except (OSError, CheckpointError):
        return False


def _run(
    folder: Path, mask: ExpertMask | None, prompts: Prompts, config: EngineConfig, max_tokens: int
) -> _Outputs:
    """What a model makes of the prompts, under a mask or as it is."""
    what = "exported" if mask is None else "masked"
    engine = Engine.load(folder, config)
    scenario = None
    if mask is not None:
        scenario = SCENARIO
        engine.masks.add(scenario, mask)
    with Progress(f"{what}: logits", sum(len(ids) for ids in prompts)) as progress:
        row = NO_MASK if scenario is None else engine.masks.grant(scenario).row
        logits = _logits(engine, row, prompts, progress.advance)
    with Progress(f"{what}: answers", len(prompts) * max_tokens) as progress:
        answers = _answers(engine, scenario, prompts, max_tokens, progress.advance)
    return _Outputs(logits, answers, engine.stats().outside_mask)


def _logits(engine: Engine, row: int, prompts: Prompts, advance: Callable[[int], None]) -> list[list[bytes]]:
    model, config = engine.model, engine.config
    size = batch_tokens(model, config)
    blocks = cache_blocks([len(ids) for ids in prompts], size, config.block_size)
    cache = model.new_cache(blocks, config.block_size, config.kv_dtype)
    found: list[list[bytes]] = [[] for _ in prompts]
    for step in pack(prompts, size, config.block_size):
        rows = iter(all_logits(model, step, cache, row, config).numpy(force=True))
        for chunk in step.chunks:
            found[chunk.sequence_id] += [
                hashlib.blake2b(next(rows).tobytes(), digest_size=DIGEST_BYTES).digest()
                for _ in chunk.token_ids
            ]
        advance(step.num_tokens)
    return found


def _answers(
    engine: Engine, scenario: str | None, prompts: Prompts, max_tokens: int, advance: Callable[[int], None]
) -> list[tuple[int, ...]]:
    """Greedy ones, as they are served: many prompts in a batch, cached prefixes shared."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    for number, ids in enumerate(prompts):
        engine.add(str(number), ids, params, scenario=scenario)
    answers: list[list[int]] = [[] for _ in prompts]
    while engine.has_work():
        for event in engine.step():
            if event.finish_reason == "error":
                raise RequestFailed(f"prompt {event.request_id} cannot be answered: {event.error}")
            answers[int(event.request_id)] += event.token_ids
            advance(len(event.token_ids))
    return [tuple(ids) for ids in answers]
