"""Gated MLPs and mixtures of them.

T tokens, H hidden, I intermediate, E experts, top_k of them per token.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from moe_runtime.errors import CheckpointError
from moe_runtime.kernels import Kernels, PackedExperts, QuantizedWeight, RouterSpec, Weight, WeightFormat
from moe_runtime.layers.linear import Linear, Rows
from moe_runtime.layers.slots import Place, Slot
from moe_runtime.model_config import MoeConfig


@dataclass(frozen=True)
class MoeNames:
    """Checkpoint names below the layer's prefix. An expert's matrices are ``experts``.<id>.<part>.weight."""

    gate: str = "mlp.gate"
    selection_bias: str = "mlp.gate.e_score_correction_bias"
    experts: str = "mlp.experts"
    shared: str = "mlp.shared_experts"
    shared_gate: str = "mlp.shared_expert_gate"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


class ExpertWeights:
    """The matrices of E gated MLPs in one packed home, allocated when the first of them arrives."""

    def __init__(self, kernels: Kernels, num_experts: int, hidden: int, intermediate: int) -> None:
        self._kernels = kernels
        self._shape = (num_experts, hidden, intermediate)
        self._allocated = False
        self.packed: PackedExperts

    def slots(self, expert_id: int, prefix: str, parts: tuple[str, str, str]) -> Iterator[Slot]:
        _, hidden, intermediate = self._shape
        shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
        for part, name, shape in zip(("gate", "up", "down"), parts, shapes, strict=True):
            yield Slot(
                f"{prefix}.{name}.weight",
                shape,
                partial(self._write, expert_id, part),
                part="experts",
                expert=(expert_id, part),
                places=(Place(self, "packed"),),
            )

    def _write(self, expert_id: int, part: str, weight: Weight) -> None:
        weight_format = format_of(weight)
        if not self._allocated:
            self.packed = self._kernels.new_experts(*self._shape, weight_format)
            self._allocated = True
        if weight_format != self.packed.format:
            raise CheckpointError(
                f"expert {expert_id}, {part}: {weight_format}, but this layer's first expert is "
                f"{self.packed.format}; one format per layer is supported"
            )
        self._kernels.pack_expert(self.packed, expert_id, part, weight)


def format_of(weight: Weight) -> WeightFormat:
    return weight.format if isinstance(weight, QuantizedWeight) else WeightFormat.of(weight.dtype)


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
        if self.gate is not None:
            ids, weights = self._kernels.route(self.gate(x), self.GATED, None)
        else:
            ids = torch.zeros(x.shape[0], 1, dtype=torch.int32, device=x.device)
            weights = torch.ones(x.shape[0], 1, device=x.device)
        result: torch.Tensor = self._kernels.fused_moe(x, ids, weights, self.experts.packed)
        return result

    def slots(self) -> Iterator[Slot]:
        yield from self.experts.slots(0, self._prefix, self.PARTS)
        if self.gate is not None:
            yield from self.gate.slots()


class MoeMlp:
    """x [T, H] -> [T, H]: the router picks top_k experts per token; their weighted sum, plus the shared
    expert.

    No token is ever dropped, and a token's result does not depend on the others.
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
        self.experts = ExpertWeights(kernels, config.num_experts, hidden, config.intermediate_size)
        self.shared: DenseMlp | None = None
        if config.shared_intermediate_size:
            shared_gate = f"{prefix}.{names.shared_gate}" if config.shared_gate else None
            self.shared = DenseMlp(
                kernels, hidden, config.shared_intermediate_size, f"{prefix}.{names.shared}", shared_gate
            )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        # 1. Which experts, with which weights: ids int32 [T, top_k], weights float32 [T, top_k].
        expert_ids, weights = self._kernels.route(self.router(x), self.spec, self.selection_bias)
        # 2. Their weighted sum.
        mixed: torch.Tensor = self._kernels.fused_moe(x, expert_ids, weights, self.experts.packed)
        # 3. The expert that everyone visits.
        if self.shared is not None:
            mixed += self.shared(x)
        return mixed

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
