"""What R rows of logits ask of a sampler that runs where the logits are, as two tensors; and what comes back.

Kernels read these numbers on the device, so nothing here can be checked there: who makes them (see
device_sampling.py) takes them from checked SamplingParams.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch


class Number(IntEnum):
    """A row's numbers, by column of ``Draws.numbers``. Their count is even, which keeps what follows aligned.

    TEMPERATURE         0 is greedy; else of a float32 above 0, finite
    FARTHEST            of a float32: tokens farther than that from the best, in logits / temperature, are
                        out (min_p as a distance: -log(min_p)); infinity keeps all
    TOP_K               0 keeps all, else below V
    TOP_P, FRACTION     (0, 1]; the uniform number in [0, 1) that decides
    REPETITION, PRESENCE, FREQUENCY   penalties, as in SamplingParams; the first of a float32
    LOGPROBS            -1: none are wanted; else how many of the likeliest tokens', beside the chosen one's
    FIRST               where the row's lists begin in ``Draws.entries``, one after the other:
    SEEN                ids of tokens in prompt or answer (for REPETITION)
    OUTPUT              ids of tokens in the answer, then as many counts (for PRESENCE and FREQUENCY)
    BIAS                ids, then the bits of as many float32 to be added
    FORBIDDEN           ids that must not be chosen
    """

    TEMPERATURE = 0
    FARTHEST = 1
    TOP_K = 2
    TOP_P = 3
    FRACTION = 4
    REPETITION = 5
    PRESENCE = 6
    FREQUENCY = 7
    LOGPROBS = 8
    FIRST = 9
    SEEN = 10
    OUTPUT = 11
    BIAS = 12
    FORBIDDEN = 13


class Status(IntEnum):
    """NOT_FINITE: the row holds NaN or infinity. NOTHING_LEFT: after penalties, bias and forbidden ids the
    best logit is not finite.
    """

    OK = 0
    NOT_FINITE = 1
    NOTHING_LEFT = 2


@dataclass(frozen=True)
class Draws:
    """numbers float64 [R, len(Number)]; entries int32 [L], lists of ids, each id once per list (an id that is
    no token is passed over). ``most_logprobs``: the largest LOGPROBS, known to the host.
    """

    numbers: torch.Tensor
    entries: torch.Tensor
    most_logprobs: int

    @property
    def width(self) -> int:
        """Numbers that come back per row, an int32 each: the token, its Status and, if any row wants them,
        the bits of its log-probability, then ``most_logprobs`` ids and as many log-probabilities.
        """
        return 2 if self.most_logprobs < 0 else 3 + 2 * self.most_logprobs
