"""What kernels/fusions.py asks of a backend, from the kernels that do it in one launch."""

from __future__ import annotations

import torch

from moe_runtime.kernels.checks import failure
from moe_runtime.kernels.meter import RouteMeter
from moe_runtime.kernels.packed import RouterSpec
from moe_runtime.kernels.route_recovery import RouteRecovery
from moe_runtime.kernels.triton.fused_moe import fused_moe_add_norm
from moe_runtime.kernels.triton.rope import rope_write_cache
from moe_runtime.kernels.triton.router import NUM_ARRIVALS, route_tokens
from moe_runtime.kernels.triton.weights import DeviceExperts, DeviceLinear


class TritonFusions:
    """For one device and one stream at a time: routers share a counter that each leaves at zero."""

    rope_write_cache = staticmethod(rope_write_cache)

    def __init__(self, device: torch.device) -> None:
        self._arrivals = torch.zeros(NUM_ARRIVALS, dtype=torch.int32, device=device)

    def route_tokens(
        self,
        x: torch.Tensor,
        router: DeviceLinear,
        spec: RouterSpec,
        bias: torch.Tensor | None,
        masks: torch.Tensor | None,
        mask_rows: torch.Tensor | None,
        meter: RouteMeter | None,
        recovery: RouteRecovery | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same launch for every number of tokens, so that a token's choice is the same in any company."""
        if router.heads != 1 or not router.format.is_plain:
            expected = "one matrix of float32, bfloat16 or float16"
            raise failure("route_tokens", "router", expected, f"{router.heads} of {router.format}")
        weight = router.data[0, :, : router.in_features]
        ids, weights, _ = route_tokens(
            x, weight, spec, bias, masks, mask_rows, arrivals=self._arrivals, meter=meter, recovery=recovery
        )
        return ids, weights

    def fused_moe_add_norm(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        expert_weights: torch.Tensor,
        experts: DeviceExperts,
        added: torch.Tensor | None,
        residual: torch.Tensor,
        norm_weight: torch.Tensor,
        eps: float,
        constants: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return fused_moe_add_norm(
            x, expert_ids, expert_weights, experts, residual, norm_weight, eps, constants, added
        )
