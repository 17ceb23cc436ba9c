"""Operations that follow each other in every model, as one call that a backend may answer with one launch.

Where it does not, they are what is written here, and computed one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from moe_runtime.kernels.meter import RouteMeter
from moe_runtime.kernels.packed import RouterSpec
from moe_runtime.kernels.route_recovery import RouteRecovery

Pair = tuple[torch.Tensor, torch.Tensor]


class Fusions(Protocol):
    """A backend's own form of the operations of ``FusedOperations``: the same names, meanings and arguments,
    none of them left out.
    """

    @property
    def route_tokens(self) -> Callable[..., Pair]: ...
    @property
    def rope_write_cache(self) -> Callable[..., object]: ...
    @property
    def fused_moe_add_norm(self) -> Callable[..., Pair]: ...


class FusedOperations:
    """Part of Kernels, whose fields the operations below are made of."""

    linear: Callable[..., torch.Tensor]
    route: Callable[..., Pair]
    rope: Callable[..., torch.Tensor]
    write_cache: Callable[..., None]
    fused_moe: Callable[..., torch.Tensor]
    add_rms_norm: Callable[..., Pair]
    fused: Fusions | None

    def route_tokens(
        self,
        x: torch.Tensor,
        router: Any,
        spec: RouterSpec,
        bias: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        mask_rows: torch.Tensor | None = None,
        meter: RouteMeter | None = None,
        recovery: RouteRecovery | None = None,
    ) -> Pair:
        """``route`` of x [T, H] times the packed ``router`` [E, H]."""
        if self.fused is not None:
            return self.fused.route_tokens(x, router, spec, bias, masks, mask_rows, meter, recovery)
        logits = self.linear(x, router, None)
        return self.route(logits, spec, bias, masks, mask_rows, meter, recovery)

    def rope_write_cache(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        positions: torch.Tensor,
        interleaved: bool,
        cache: torch.Tensor,
        slots: torch.Tensor,
        offset: int = 0,
    ) -> None:
        """``rope`` of x [T, heads, D] in place, and ``write_cache`` of the result."""
        if self.fused is not None:
            self.fused.rope_write_cache(x, cos, sin, positions, interleaved, cache, slots, offset)
            return
        self.write_cache(cache, self.rope(x, cos, sin, positions, interleaved, offset=offset), slots)

    def fused_moe_add_norm(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        experts: Any,
        added: torch.Tensor | None,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        constants: torch.Tensor | None = None,
    ) -> Pair:
        """``add_rms_norm`` of ``residual`` and ``fused_moe`` plus ``added`` [T, H], if that is given."""
        if self.fused is not None:
            return self.fused.fused_moe_add_norm(
                x, expert_ids, expert_weights, experts, added, residual, norm_weight, eps, constants
            )
        mixed = self.fused_moe(x, expert_ids, expert_weights, experts, constants)
        if added is not None:
            mixed += added
        return self.add_rms_norm(mixed, residual, norm_weight, eps)
