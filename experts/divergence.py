"""How far one model's next-token distributions are from another's, token by token, and in summary."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from moe_runtime.errors import PlanError

VALUES_AT_ONCE = 1 << 16  # of logits in float64, which should stay in the processor's cache


@dataclass(frozen=True, eq=False)
class TokenDivergences:
    """Of every token that predicts another one: T of them, document after document, in order.

    documents   int64 [T]     which document it is in
    positions   int64 [T]     its place there; the last token of a document predicts nothing and is left out
    kl          float64 [T]   KL(full || masked) of the distributions of the next token, in nats
    same_top1   bool [T]      whether both find the same next token likeliest (of equals the lowest id)
    nll_full    float64 [T]   -log probability of the token that does follow, in nats
    nll_masked  float64 [T]
    """

    documents: torch.Tensor
    positions: torch.Tensor
    kl: torch.Tensor
    same_top1: torch.Tensor
    nll_full: torch.Tensor
    nll_masked: torch.Tensor

    @classmethod
    def joined(cls, parts: Sequence[TokenDivergences]) -> TokenDivergences:
        """One after the other; at least one part."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def select(self, rows: torch.Tensor) -> TokenDivergences:
        """The tokens that ``rows``, bool [T] or indices, says."""
        return TokenDivergences(*(getattr(self, field.name)[rows] for field in fields(self)))

    def summary(self) -> Divergence:
        """Raises PlanError when there is no token."""
        if not len(self.kl):
            raise PlanError("no token to compare on: every document has a single token")
        values = self.kl.numpy()
        return Divergence(
            kl_mean=float(values.mean()),
            kl_p95=float(np.quantile(values, 0.95, method="higher")),
            kl_p99=float(np.quantile(values, 0.99, method="higher")),
            kl_max=float(values.max()),
            top1=float(self.same_top1.double().mean()),
            nll_full=float(self.nll_full.mean()),
            nll_masked=float(self.nll_masked.mean()),
            num_tokens=len(values),
            num_documents=len(self.documents.unique()),
        )


@dataclass(frozen=True, slots=True)
class Divergence:
    """A summary of TokenDivergences. Quantiles are values that occur (the next higher one), KL and NLL are in
    nats, ``top1`` is a share from 0 to 1.
    """

    kl_mean: float
    kl_p95: float
    kl_p99: float
    kl_max: float
    top1: float
    nll_full: float
    nll_masked: float
    num_tokens: int
    num_documents: int


def compare_logits(
    full: torch.Tensor, masked: torch.Tensor, following: torch.Tensor
) -> dict[str, torch.Tensor]:
    """kl, same_top1, nll_full, nll_masked of logits float32 [R, V] each and the ids int64 [R] that follow.

    Computed in float64: KL = sum p (x - y) - (lse x - lse y) with p = softmax x is exactly 0 for equal
    logits. Raises PlanError for logits that are not finite: any comparison with their KL would be false.
    """
    found: dict[str, list[torch.Tensor]] = {"kl": [], "same_top1": [], "nll_full": [], "nll_masked": []}
    size = max(1, VALUES_AT_ONCE // full.shape[-1])
    for start in range(0, len(full), size):
        rows = slice(start, start + size)
        next_ids = following[rows, None].to(full.device)
        best, other_best = full[rows].argmax(-1, keepdim=True), masked[rows].argmax(-1, keepdim=True)
        x, y = full[rows].double(), masked[rows].double()
        x_next, y_next = x.gather(1, next_ids), y.gather(1, next_ids)
        difference = x - y
        x_max, y_max = x.gather(1, best), y.gather(1, other_best)
        x, y = x.sub_(x_max).exp_(), y.sub_(y_max).exp_()
        x_sum, y_sum = x.sum(-1, keepdim=True), y.sum(-1, keepdim=True)
        x_norm, y_norm = x_max + x_sum.log(), y_max + y_sum.log()
        kl = difference.mul_(x).sum(-1, keepdim=True) / x_sum - (x_norm - y_norm)
        if not bool(kl.isfinite().all()):
            raise PlanError("the model's logits are not finite, so nothing can be compared")
        found["kl"].append(kl.clamp(min=0.0))  # it is never below 0, rounding is
        found["same_top1"].append(best == other_best)
        found["nll_full"].append(x_norm - x_next)
        found["nll_masked"].append(y_norm - y_next)
    return {name: torch.cat(parts)[:, 0].cpu() for name, parts in found.items()}
