"""Tokens chosen where the logits are: what each row asks for goes there in one copy, the tokens come back in
one, and that is the only time in a step that the host waits.

Means what ``Generation.look`` and sampling.py mean; kernels/triton/sampling.py computes it. Only a chunk that
asks for more than its next token (log-probabilities of its prompt, or an answer of no tokens, whose logits
have to be finite) has its rows of logits copied to the host, in that step, and is looked at there.

Nothing is kept between steps: penalties need the distinct tokens of prompt and answer, 4 bytes each, which
are sent anew. So preemption and a failed step have nothing to repair here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from moe_runtime.errors import RequestFailed
from moe_runtime.generation import Draw, Generation, Outcome, Sampled, look_at, rows_of
from moe_runtime.kernels.draws import Draws, Number, Status
from moe_runtime.sampling import NOT_FINITE, NOTHING_LEFT, divisor, uniform
from moe_runtime.scheduler import Chunk

Sampler = Callable[[torch.Tensor, Draws], torch.Tensor]  # as kernels/triton/sampling.py's sample_rows
Ints = npt.NDArray[np.int32]

MESSAGES: Mapping[Status, str] = {Status.NOT_FINITE: NOT_FINITE, Status.NOTHING_LEFT: NOTHING_LEFT}


def sample_on_device(
    chunks: tuple[Chunk, ...], logits: torch.Tensor, generations: Mapping[int, Generation], sampler: Sampler
) -> list[Outcome]:
    """What ``sample_on_host`` gives for ``logits`` [R, V], which stay where they are, unchanged."""
    asked = [(generations[chunk.sequence_id], chunk) for chunk in chunks]
    draws = [generation.draw(chunk) for generation, chunk in asked]
    due = [draw for draw in draws if draw is not None]
    rows = rows_of(chunks)
    # 1. Launched, not waited for.
    if due:
        last = logits
        if len(due) < len(logits):
            last = torch.stack([logits[own.stop - 1] for own, draw in zip(rows, draws, strict=True) if draw])
        found = sampler(last, draws_on(due, logits.shape[1], logits.device))
    # 2. The host looks at the others, if they have logits; then the tokens arrive.
    outcomes: list[Outcome] = [None] * len(chunks)
    for place, ((generation, chunk), own) in enumerate(zip(asked, rows, strict=True)):
        if draws[place] is None and own.start < own.stop:
            outcomes[place] = look_at(generation, chunk, logits[own].numpy(force=True))
    if due:
        numbers = iter(found.numpy(force=True))
        for place, ((generation, _), draw) in enumerate(zip(asked, draws, strict=True)):
            if draw is not None:
                outcomes[place] = _outcome(generation, draw, next(numbers), logits.shape[1])
    return outcomes


def draws_on(draws: Sequence[Draw], vocab_size: int, device: torch.device) -> Draws:
    """The tensors of ``draws``, sent in one copy that the host does not wait for."""
    lists = [_lists(draw) for draw in draws]
    sizes = [sum(len(each) for each in row) for row in lists]
    firsts = np.cumsum([0, *sizes]).tolist()
    rows = [
        _numbers(draw, row, first, vocab_size)
        for draw, row, first in zip(draws, lists, firsts[:-1], strict=True)
    ]
    numbers = np.asarray(rows, dtype=np.float64)
    flat = [numbers.view(np.int32).ravel(), *(each for row in lists for each in row)]
    run = torch.empty(2 * numbers.size + firsts[-1], dtype=torch.int32, pin_memory=device.type == "cuda")
    np.concatenate(flat, out=run.numpy())
    if run.device != device:
        # The pinned bytes are not used again before the copy is done: torch sees to it.
        run = run.to(device, non_blocking=True)
    return Draws(
        numbers=run[: 2 * numbers.size].view(torch.float64).view(numbers.shape),
        entries=run[2 * numbers.size :],
        most_logprobs=int(numbers[:, Number.LOGPROBS].max()),
    )


def _numbers(draw: Draw, lists: Sequence[Ints], first: int, vocab_size: int) -> list[float]:
    """One row of ``Draws.numbers``."""
    params = draw.params
    seen, output, _, bias, _, forbidden = (len(each) for each in lists)
    by_number = {
        Number.TEMPERATURE: 0.0 if params.greedy else divisor(params),
        Number.FARTHEST: abs(math.log(params.min_p)) if params.min_p > 0.0 else math.inf,
        Number.TOP_K: params.top_k if 0 < params.top_k < vocab_size else 0,
        Number.TOP_P: params.top_p,
        Number.FRACTION: uniform(draw.seed, draw.choice, draw.history.num_output),
        Number.REPETITION: params.repetition_penalty,
        Number.PRESENCE: params.presence_penalty,
        Number.FREQUENCY: params.frequency_penalty,
        Number.LOGPROBS: -1 if params.logprobs is None else params.logprobs,
        Number.FIRST: first,
        Number.SEEN: seen,
        Number.OUTPUT: output,
        Number.BIAS: bias,
        Number.FORBIDDEN: forbidden,
    }
    return [by_number[number] for number in Number]


NO_IDS = np.zeros(0, dtype=np.int32)


def _lists(draw: Draw) -> tuple[Ints, ...]:
    """Ids seen; ids and counts of the answer; ids and bits of the bias; ids forbidden now."""
    history = draw.history
    seen, output = history.seen, history.output
    counted = (NO_IDS, NO_IDS)
    if output is not None:
        counted = (output.ids.astype(np.int32), output.counts.astype(np.int32))
    early = history.num_output < draw.params.min_tokens
    return (
        NO_IDS if seen is None else seen.ids.astype(np.int32),
        *counted,
        history.bias_ids.astype(np.int32),
        history.bias.view(np.int32),
        history.end_ids.astype(np.int32) if early else NO_IDS,
    )


def _outcome(generation: Generation, draw: Draw, found: Ints, vocab_size: int) -> Outcome:
    """Of one row of what came back, int32 [Draws.width]."""
    status = Status(int(found[1]))
    if status is not Status.OK:
        return RequestFailed(MESSAGES[status])
    if draw.params.logprobs is None:
        return Sampled(int(found[0]))
    ids = found[3 : 3 + min(draw.params.logprobs, vocab_size)].tolist()
    logprobs = found[2:].view(np.float32).tolist()  # the chosen token's, as many as there are ids, the ids'
    likeliest = logprobs[1 + (len(found) - 3) // 2 :]
    return generation.sampled(int(found[0]), logprobs[0], list(zip(ids, likeliest, strict=False)))
