"""A whole model step in one C++ call (csrc/step.h): checked descriptors, and the program they make.

Every tensor is checked once, when its descriptor is made; ``StepProgram.run`` checks the batch's alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

import moe_runtime._C as _C
from moe_runtime.kernels.cache_rows import row_size
from moe_runtime.kernels.checks import cache_tag, check, check_layout, failure
from moe_runtime.kernels.meter import RouteMeter
from moe_runtime.kernels.packed import PackedExperts, PackedLinear, RouterSpec, WeightFormat
from moe_runtime.kernels.residence import Residence
from moe_runtime.kernels.route_recovery import RouteRecovery

_INT, _LONG = torch.int32, torch.int64

# Descriptors made of descriptors alone; their fields are those of csrc/step.h, and a part left out is absent.
GroupedAttention, LatentAttention, Layer = _C.GroupedAttention, _C.LatentAttention, _C.Layer


class Descriptors:
    """Makes csrc/step.h's descriptors out of tensors, and holds the tensors that they point to."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []

    def _address(self, argument: str, tensor: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> int:
        address = check("step", argument, tensor, shape, dtype)
        self.tensors.append(tensor)
        return address

    def _floats(self, argument: str, tensor: torch.Tensor | None, *shape: int) -> int:
        return 0 if tensor is None else self._address(argument, tensor, shape, torch.float32)

    def table(self, table: torch.Tensor) -> Any:
        """An embedding table [V, H] of any weight dtype."""
        rows, columns = table.shape
        dtype = WeightFormat.of(table.dtype).tag
        data = self._address("embedding", table, table.shape, table.dtype)
        return _C.Table(data=data, rows=rows, columns=columns, dtype=dtype)

    def matrix(self, packed: PackedLinear, bias: torch.Tensor | None = None) -> Any:
        """A packed matrix, or one per head; bias float32 [N]."""
        check_layout("step", packed.layout)
        self.tensors.append(packed.data)
        return _C.Matrix(
            data=packed.data.data_ptr(), heads=packed.heads, n=packed.out_features, k=packed.in_features,
            format=packed.format.tag,
            bias=self._floats("bias", bias, packed.out_features),
        )  # fmt: skip

    def norm(self, weight: torch.Tensor, eps: float) -> Any:
        return _C.Norm(weight=self._floats("norm", weight, *weight.shape), size=weight.numel(), eps=eps)

    def rotation(self, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> Any:
        """cos and sin float32 [positions, half]."""
        positions, half = cos.shape
        return _C.Rotation(
            cos=self._floats("cos", cos, positions, half), sin=self._floats("sin", sin, positions, half),
            positions=positions, half=half, interleaved=interleaved,
        )  # fmt: skip

    def cache(self, keys: torch.Tensor, values: torch.Tensor | None, key_dim: int, value_dim: int) -> Any:
        """keys [B, heads, block_size, Dk], values [B, heads, block_size, Dv], or None for MLA; or rows of an
        int8 cache (cache_rows.py).
        """
        num_blocks, heads, block_size, _ = keys.shape
        places = (num_blocks, heads, block_size)
        shape = _C.CacheShape(
            num_blocks=num_blocks, kv_heads=heads, block_size=block_size, key_dim=key_dim,
            value_dim=value_dim, dtype=cache_tag("step", "cache", keys),
        )  # fmt: skip
        values_at = 0
        if values is not None:
            values_shape = (*places, row_size(value_dim, keys.dtype))
            values_at = self._address("values", values, values_shape, keys.dtype)
        elif not 0 < value_dim < key_dim:
            raise failure("step", "value_dim", f"1 to {key_dim - 1}", value_dim)
        keys_shape = (*places, row_size(key_dim, keys.dtype))
        return _C.LayerCache(
            keys=self._address("keys", keys, keys_shape, keys.dtype), values=values_at, shape=shape
        )

    def mixture(
        self,
        experts: PackedExperts,
        spec: RouterSpec = RouterSpec(top_k=1),  # noqa: B008 (frozen)
        router: Any = None,
        selection_bias: torch.Tensor | None = None,
        masks: torch.Tensor | None = None,
        residence: Residence | None = None,
        recovery: RouteRecovery | None = None,
        constants: torch.Tensor | None = None,
    ) -> Any:
        """Routed experts, or with no ``router`` one expert that every token visits with weight 1.

        masks uint8 [M, E]: which experts a scenario may use; its values may change between steps, as those of
        ``recovery`` and of constants float32 [C, H], which it names. With a ``residence`` of E experts,
        ``experts`` are those that are in memory.
        """
        check_layout("step", experts.layout)
        num_experts = experts.num_experts if residence is None else residence.slot_of.shape[0]
        spec.check(num_experts)
        self.tensors += [experts.gate_up, experts.down]
        num_masks = 0 if masks is None else masks.shape[0]
        masks_at = 0
        if masks is not None:
            masks_at = self._address("masks", masks, (num_masks, num_experts), torch.uint8)
        parts: dict[str, Any] = {} if router is None else {"router": router}
        if residence is not None:
            parts["residence"] = self._residence(residence, experts)
        if recovery is not None:
            count = 0 if constants is None else constants.shape[0]
            parts["recovery"] = _C.Recovery(
                offsets=self._floats("offsets", recovery.offsets, num_masks, num_experts),
                stand_ins=self._address("stand_ins", recovery.stand_ins, (num_masks, num_experts), _INT),
                constants=_C.Constants(
                    rows=self._floats("constants", constants, count, experts.hidden), count=count
                ),
            )
        return _C.Mixture(
            selection_bias=self._floats("selection_bias", selection_bias, num_experts),
            rules=_C.RouterRules(
                top_k=spec.top_k, num_groups=spec.num_groups, topk_groups=spec.topk_groups,
                sigmoid=spec.scoring == "sigmoid", normalise=spec.norm_topk_prob,
                top2_sum=spec.group_score == "top2_sum", softmax_after_topk=spec.softmax_after_topk,
                routed_scaling=spec.routed_scaling, norm_epsilon=spec.norm_epsilon,
            ),
            masks=masks_at, num_masks=num_masks,
            gate_up=experts.gate_up.data_ptr(), down=experts.down.data_ptr(),
            num_experts=num_experts, hidden=experts.hidden, intermediate=experts.intermediate,
            format=experts.format.tag, **parts,
        )  # fmt: skip

    def _residence(self, residence: Residence, experts: PackedExperts) -> Any:
        if residence.num_slots != experts.num_experts:
            raise failure("step", "experts", f"{residence.num_slots} in memory", experts.num_experts)
        num_experts = residence.slot_of.shape[0]
        return _C.Residence(
            slot_of=self._address("slot_of", residence.slot_of, (num_experts,), _INT),
            num_experts=num_experts, num_slots=residence.num_slots, layer=residence.layer,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class StepProgram:
    """All layers of one model over one cache, as one call; the same bits as calling operation by operation.

    One step at a time: KernelError for a second thread that comes while one is running.
    """

    program: Any  # _C.StepProgram
    vocab_size: int
    tensors: tuple[torch.Tensor, ...]  # what the program points to

    def run(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        sequence_rows: torch.Tensor,
        block_tables: torch.Tensor,
        logit_rows: torch.Tensor,
        mask_rows: torch.Tensor,
        meter: RouteMeter | None = None,
    ) -> torch.Tensor:
        """Logits float32 [R, V]. Shapes and dtypes are those of batch.py's Batch; KernelError for others, and
        for values out of range. ``meter`` is added to, its ``lost`` by all layers but the last.
        """
        tokens, rows = token_ids.shape[0], logit_rows.shape[0]
        sequences, max_blocks = block_tables.shape
        logits = torch.empty(rows, self.vocab_size, dtype=torch.float32)
        self.program.run(
            check("step", "token_ids", token_ids, (tokens,), _LONG),
            check("step", "positions", positions, (tokens,), _INT),
            check("step", "slots", slots, (tokens,), _LONG),
            check("step", "sequence_rows", sequence_rows, (tokens,), _INT),
            check("step", "block_tables", block_tables, (sequences, max_blocks), _INT),
            check("step", "logit_rows", logit_rows, (rows,), _LONG),
            check("step", "mask_rows", mask_rows, (tokens,), _INT),
            tokens, sequences, max_blocks, rows, *_meter_addresses(meter, tokens), logits.data_ptr(),
        )  # fmt: skip
        return logits


def _meter_addresses(meter: RouteMeter | None, tokens: int) -> tuple[int, int]:
    if meter is None:
        return 0, 0
    lost = 0 if meter.lost is None else check("step", "lost", meter.lost, (tokens,), torch.float32)
    return lost, check("step", "outside", meter.outside, (1,), _LONG)


def step_program(
    parts: Descriptors, *, embedding: Any, layers: Sequence[Any], norm: Any, head: PackedLinear, rotation: Any
) -> StepProgram:
    """The program of a model whose descriptors ``parts`` made. KernelError for shapes that do not fit."""
    model = _C.Model(
        embedding=embedding, layers=list(layers), norm=norm, head=parts.matrix(head), rotation=rotation
    )
    return StepProgram(_C.StepProgram(model), head.out_features, tuple(parts.tensors))
