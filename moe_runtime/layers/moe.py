"""Gated MLPs and mixtures of them.

T tokens, H hidden, I intermediate, E experts, top_k of them per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from moe_runtime.kernels import Kernels, RouteMeter, RouterSpec
from moe_runtime.layers.experts import ExpertWeights, TieredExperts, placed_experts
from moe_runtime.layers.host_link import HostLink
from moe_runtime.layers.linear import Linear, Rows
from moe_runtime.layers.norm import RmsNorm
from moe_runtime.layers.recovery import RecoveryTables
from moe_runtime.layers.slots import Place, Slot
from moe_runtime.model_config import MoeConfig
from moe_runtime.placement import LayerPlacement

MAX_MASKS = 64  # scenarios at once; a row costs one byte per expert of the model


@dataclass(frozen=True)
class MoeNames:
    """Checkpoint names below the layer's prefix. An expert's matrices are ``experts``.<id>.<part>.weight."""

    gate: str = "mlp.gate"
    selection_bias: str = "mlp.gate.e_score_correction_bias"
    experts: str = "mlp.experts"
    shared: str = "mlp.shared_experts"
    shared_gate: str = "mlp.shared_expert_gate"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, eq=False)
class Fence:
    """What the rows of a batch may use: ``rows`` int32 [T] names a mask of every layer for each, -1 for none.
    ``meter`` is told what the masks do.
    """

    rows: torch.Tensor
    meter: RouteMeter | None = None

    def select(self, kept: torch.Tensor) -> "Fence":
        """Of the rows ``kept``; their lost weight is not measured any more."""
        meter = None if self.meter is None else RouteMeter(None, self.meter.outside)
        return Fence(self.rows.index_select(0, kept), meter)


class DenseMlp:
    """x [T, H] -> [T, H] through one gated MLP that every token visits: a mixture of one expert.

    ``gate`` names a row whose sigmoid weighs each token's result; without it the weight is 1.
    """

    PARTS = ("gate_proj", "up_proj", "down_proj")
    GATED = RouterSpec(top_k=1, scoring="sigmoid")

    def __init__(
        self, kernels: Kernels, hidden: int, intermediate: int, prefix: str, gate: str | None = None
    ) -> None:
        self._kernels = kernels
        self._prefix = prefix
        self.experts = ExpertWeights(kernels, 1, hidden, intermediate)
        self.gate = None if gate is None else Linear(kernels, hidden, [Rows(gate, 1)], any_float=True)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x, *self._visits(x))

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, norm: RmsNorm, fence: Fence | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``norm.add`` of the result for x; ``fence`` changes nothing here."""
        return self.experts.add_norm(x, *self._visits(x), None, residual, norm)

    def _visits(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Every token's expert, which is the only one, and its weight: int32 and float32 [T, 1]."""
        if self.gate is not None:
            return self._kernels.route_tokens(x, self.gate.packed, self.GATED)
        ids = torch.zeros(x.shape[0], 1, dtype=torch.int32, device=x.device)
        return ids, torch.ones(x.shape[0], 1, device=x.device)

    def slots(self) -> Iterator[Slot]:
        yield from self.experts.slots(0, self._prefix, self.PARTS)
        if self.gate is not None:
            yield from self.gate.slots()


class MoeMlp:
    """x [T, H] -> [T, H]: the router picks top_k experts per token; their weighted sum, plus the shared
    expert.

    No token is ever dropped, and a token's result does not depend on the others. ``masks`` uint8
    [MAX_MASKS, E] is the layer's part of the model's mask table (masks.py writes it): a token whose row is m
    chooses among the experts of masks[m] alone. Rows that nobody has written allow all that are in memory.
    ``recovery`` is what the rows have for the others.
    """

    def __init__(
        self,
        kernels: Kernels,
        config: MoeConfig,
        hidden: int,
        prefix: str,
        names: MoeNames = MoeNames(),  # noqa: B008 (frozen)
    ) -> None:
        self._kernels = kernels
        self.config = config
        self._hidden = hidden
        self._prefix = prefix
        self._names = names
        self.spec = RouterSpec(
            top_k=config.top_k,
            scoring=config.scoring,
            norm_topk_prob=config.norm_topk_prob,
            num_groups=config.num_groups,
            topk_groups=config.topk_groups,
            group_score=config.group_score,
            routed_scaling=config.routed_scaling,
            norm_epsilon=1e-20 if config.scoring == "sigmoid" else 0.0,
        )
        gate = Rows(f"{prefix}.{names.gate}", config.num_experts)
        self.router = Linear(kernels, hidden, [gate], any_float=True)
        self.selection_bias: torch.Tensor | None = None
        self.masks = torch.ones(MAX_MASKS, config.num_experts, dtype=torch.uint8, device=kernels.device)
        self.recovery = RecoveryTables(MAX_MASKS, config.num_experts, hidden, kernels.device)
        self.placed: LayerPlacement | None = None  # None: every expert is where the kernels compute
        self.experts: ExpertWeights | TieredExperts
        self.experts = ExpertWeights(kernels, config.num_experts, hidden, config.intermediate_size)
        self.shared: DenseMlp | None = None
        if config.shared_intermediate_size:
            shared_gate = f"{prefix}.{names.shared_gate}" if config.shared_gate else None
            self.shared = DenseMlp(
                kernels, hidden, config.shared_intermediate_size, f"{prefix}.{names.shared}", shared_gate
            )

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, norm: RmsNorm, fence: Fence | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``norm.add`` of the mixture's result for x: what follows it in a model is part of the call."""
        # 1. Which experts, with which weights.
        expert_ids, weights = self.route(x, fence)
        # 2. The expert that everyone visits.
        shared = None if self.shared is None else self.shared(x)
        # 3. Their weighted sum, and the rest of the way to the next layer.
        constants = self.recovery.constants
        return self.experts.add_norm(x, expert_ids, weights, shared, residual, norm, constants)

    def route(self, x: torch.Tensor, fence: Fence | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, H] -> ids int32 [T, top_k] and their weights float32 [T, top_k], as they are applied. The ids
        from E on are those of ``recovery``'s constants.
        """
        masks = () if fence is None else (self.masks, fence.rows, fence.meter, self.recovery.routing)
        routed: tuple[torch.Tensor, torch.Tensor] = self._kernels.route_tokens(
            x, self.router.packed, self.spec, self.selection_bias, *masks
        )
        return routed

    def place(
        self,
        placed: LayerPlacement,
        missed: torch.Tensor,
        host: tuple[Kernels, HostLink] | None = None,
    ) -> None:
        """Say where the experts are to live, before any of them comes; see ``placed_experts``."""
        self.placed = placed
        absent = torch.tensor(placed.experts("absent"), dtype=torch.int64, device=self.masks.device)
        self.masks.index_fill_(1, absent, 0)  # by a list of ids torch's threads are called for, which costs
        self.experts = placed_experts(
            self._kernels, self._hidden, self.config.intermediate_size, placed, missed, host
        )

    def slots(self) -> Iterator[Slot]:
        yield from self.router.slots()
        if self.config.selection_bias:
            name = f"{self._prefix}.{self._names.selection_bias}"
            yield Slot(
                name,
                (self.config.num_experts,),
                self._write_selection_bias,
                any_float=True,
                places=(Place(self, "selection_bias"),),
            )
        for expert_id in range(self.config.num_experts):
            prefix = f"{self._prefix}.{self._names.experts}.{expert_id}"
            yield from self.experts.slots(expert_id, prefix, self._names.parts)
        if self.shared is not None:
            yield from self.shared.slots()

    def _write_selection_bias(self, bias: torch.Tensor) -> None:
        self.selection_bias = bias.to(self._kernels.device, torch.float32, copy=True)
