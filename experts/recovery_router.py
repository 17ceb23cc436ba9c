"""Offsets of the kept experts' router logits that bring a masked layer nearer to the full one: closed form.

For a token, F = sum_i w_i f_i over its chosen experts is what a layer adds (the shared expert left out), F*
what the full layer adds to the same input, and J [H, E] = dF/dl the change of F with the router's logits, the
choice being held. The offsets b of the kept experts are one Gauss-Newton step of ridge regression,

    b = argmin sum_t |F*_t - F_t - J_t b|^2 + damping * trace(A) / K * |b|^2
      = (A + damping * trace(A) / K * 1)^-1 g,      A = sum_t J_t^T J_t,  g = sum_t J_t^T (F*_t - F_t),

with K kept experts: small normal equations per layer, which one pass over texts adds up, in float64 and in
the texts' order. (Router-only recovery: Router KD, arXiv 2603.02217, trains the router by gradient descent;
this is one step that needs none.)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_runtime.kernels import RouterSpec

TOKENS_AT_ONCE = 256  # whose experts' outputs are in float64 together


def slopes(
    spec: RouterSpec, logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """own float64 [T, top_k] and drawn float64 [T, E], so that dF/dl_j = own_j f_j - drawn_j F, own being 0
    for experts that were not chosen.

    logits [T, E]; ids int32 [T, top_k], the experts chosen, and their weights [T, top_k] as applied; kept
    bool [E]. By kind of router, with s its ``routed_scaling`` and the sums over the chosen experts:

    softmax, normalised      w = s e^l / sum e^l            own = w,             drawn = w / s
    softmax                  w = s p, p over all kept       own = w,             drawn = p, of all kept
    sigmoid, normalised      w = s q / sum q, q = sigmoid   own = w (1 - q),     drawn = own / s
    sigmoid                  w = s q                        own = w (1 - q),     drawn = 0

    A bias for the choice and groups of experts move the choice alone, which is held.
    """
    chosen, own = ids.long(), weights.double()
    whole = logits.double()
    if spec.scoring == "sigmoid" and not spec.softmax_after_topk:
        own = own * torch.sigmoid(-whole.gather(1, chosen))
    if spec.norm_topk_prob or spec.softmax_after_topk:
        drawn = torch.zeros_like(whole).scatter_(1, chosen, own / spec.routed_scaling)
    elif spec.scoring == "softmax":
        drawn = whole.masked_fill(~kept, -torch.inf).softmax(-1)
    else:
        drawn = torch.zeros_like(whole)
    return own, drawn


class NormalEquations:
    """Of one layer of E experts. ``error``: sum |F* - F|^2 so far."""

    def __init__(self, num_experts: int) -> None:
        self.gram = torch.zeros(num_experts, num_experts, dtype=torch.float64)
        self.pull = torch.zeros(num_experts, dtype=torch.float64)
        self.error = 0.0

    def add(
        self,
        ids: torch.Tensor,
        weights: torch.Tensor,
        outputs: torch.Tensor,
        target: torch.Tensor,
        own: torch.Tensor,
        drawn: torch.Tensor,
    ) -> None:
        """T tokens more: the chosen experts' ids int32 [T, top_k], weights [T, top_k] and outputs f
        [T, top_k, H]; target F* [T, H]; ``slopes``. All on the CPU.
        """
        for start in range(0, len(ids), TOKENS_AT_ONCE):
            rows = slice(start, start + TOKENS_AT_ONCE)
            self._add(ids[rows].long(), weights[rows], outputs[rows], target[rows], own[rows], drawn[rows])

    def _add(
        self,
        ids: torch.Tensor,
        weights: torch.Tensor,
        outputs: torch.Tensor,
        target: torch.Tensor,
        own: torch.Tensor,
        drawn: torch.Tensor,
    ) -> None:
        # J = D - F drawn^T, D's columns own_j f_j: all products come from top_k x top_k ones per token.
        f = outputs.double()
        mixed = torch.einsum("tk,tkh->th", weights.double(), f)
        left = target.double() - mixed
        columns = f * own.unsqueeze(-1)
        num_experts = len(self.pull)
        pairs = (ids.unsqueeze(2) * num_experts + ids.unsqueeze(1)).view(-1)
        products = torch.bmm(columns, columns.transpose(1, 2))
        self.gram.view(-1).index_add_(0, pairs, products.view(-1))
        along = torch.einsum("tkh,th->tk", columns, mixed)
        crossed = torch.zeros_like(drawn).scatter_(1, ids, along).T @ drawn
        self.gram -= crossed + crossed.T
        self.gram += (drawn * mixed.square().sum(-1, keepdim=True)).T @ drawn
        self.pull.index_add_(0, ids.view(-1), torch.einsum("tkh,th->tk", columns, left).view(-1))
        self.pull -= drawn.T @ (mixed * left).sum(-1)
        self.error += float(left.square().sum())

    def solve(self, kept: Sequence[int], damping: float) -> torch.Tensor:
        """b, float64 [E], 0 for experts that are not kept; all 0 where no logit changes anything."""
        offsets = torch.zeros_like(self.pull)
        gram, pull = self.gram[kept][:, kept], self.pull[kept]
        scale = float(gram.trace()) / len(kept)
        if scale > 0:
            ridge = damping * scale * torch.eye(len(kept), dtype=torch.float64)
            offsets[kept] = torch.linalg.solve(gram + ridge, pull)
        return offsets

    def error_at(self, offsets: torch.Tensor) -> float:
        """sum |F* - F - J b|^2 for offsets b [E]: what the linear model says is left."""
        return self.error - 2 * float(offsets @ self.pull) + float(offsets @ self.gram @ offsets)
