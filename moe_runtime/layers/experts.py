"""The experts of one layer: where their weights are, and what they make of a batch.

T tokens, H hidden, I intermediate, E experts, top_k of them per token.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from moe_runtime.errors import CheckpointError
from moe_runtime.kernels import Kernels, PackedExperts, QuantizedWeight, Residence, Weight, WeightFormat
from moe_runtime.kernels.residence import ABSENT, ELSEWHERE
from moe_runtime.layers.host_link import HostLink
from moe_runtime.layers.norm import RmsNorm
from moe_runtime.layers.slots import Place, Slot
from moe_runtime.placement import LayerPlacement, Tier


class ExpertWeights:
    """The matrices of E gated MLPs in one packed home, allocated when the first of them arrives.

    With ``slot_of`` (one number per expert: its place in that home, ABSENT or ELSEWHERE) it is the home of
    some of them; ``layer`` and ``missed`` are Residence's.
    """

    def __init__(
        self,
        kernels: Kernels,
        num_experts: int,
        hidden: int,
        intermediate: int,
        *,
        slot_of: Sequence[int] | None = None,
        layer: int = 0,
        missed: torch.Tensor | None = None,
    ) -> None:
        self._kernels = kernels
        self._slot_of = range(num_experts) if slot_of is None else slot_of
        self.num_slots = sum(slot >= 0 for slot in self._slot_of)
        self._shape = (self.num_slots, hidden, intermediate)
        self.residence: Residence | None = None
        if slot_of is not None:
            places = torch.tensor(slot_of, dtype=torch.int32, device=kernels.device)
            missed = torch.zeros(1, dtype=torch.int64, device=kernels.device) if missed is None else missed
            self.residence = Residence(places, self.num_slots, layer, missed)
        self._allocated = False
        self.packed: PackedExperts

    def __call__(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        constants: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [T, H], ids int32 [T, top_k], weights [T, top_k] -> [T, H]. Ids from E on name rows of constants
        float32 [C, H]. KernelError for an id that is not here; on a GPU it adds nothing.
        """
        slots = self._slots(expert_ids, constants)
        if not self.num_slots:
            return _sum_of_constants(x, slots, weights, constants)
        result: torch.Tensor = self._kernels.fused_moe(x, slots, weights, self.packed, constants)
        return result

    def moments(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        counted: torch.Tensor,
        sums: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The result for x, and of what it adds up the moments, as reference.expert_moments has them. All
        experts must be here.
        """
        result: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
        result = self._kernels.expert_moments(x, self._slots(expert_ids), weights, self.packed, counted, sums)
        return result

    def add_norm(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        added: torch.Tensor | None,
        residual: torch.Tensor,
        norm: RmsNorm,
        constants: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``norm.add`` of the result for x plus ``added`` [T, H]."""
        if not self.num_slots:
            mixed = self(x, expert_ids, weights, constants)
            return norm.add(mixed if added is None else mixed + added, residual)
        slots = self._slots(expert_ids, constants)
        return self._kernels.fused_moe_add_norm(
            x, slots, weights, self.packed, added, residual, norm.weight, norm.eps, constants
        )

    def _slots(self, expert_ids: torch.Tensor, constants: torch.Tensor | None = None) -> torch.Tensor:
        if self.residence is None:
            return expert_ids
        num_constants = 0 if constants is None else len(constants)
        slots: torch.Tensor = self._kernels.expert_slots(expert_ids, self.residence, num_constants)
        return slots

    @property
    def num_bytes(self) -> int:
        """Of the weights, where they are."""
        return self.packed.num_bytes if self.num_slots else 0

    def slots(self, expert_id: int, prefix: str, parts: tuple[str, str, str]) -> Iterator[Slot]:
        _, hidden, intermediate = self._shape
        shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
        for part, name, shape in zip(("gate", "up", "down"), parts, shapes, strict=True):
            yield Slot(
                f"{prefix}.{name}.weight",
                shape,
                partial(self._write, expert_id, part),
                part="experts",
                float8=self._kernels.float8,
                expert=(expert_id, part),
                absent=self._slot_of[expert_id] < 0,
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
        self._kernels.pack_expert(self.packed, self._slot_of[expert_id], part, weight)


def format_of(weight: Weight) -> WeightFormat:
    return weight.format if isinstance(weight, QuantizedWeight) else WeightFormat.of(weight.dtype)


class TieredExperts:
    """Experts in two memories, each computed where it lies: the device's by its kernels, the host's by the
    CPU's, at the same time. Their sums are added, the device's first.

    The host waits for a layer's input and routing alone. It computes the (token, expert) pairs that are its
    own, so that a token's result does not depend on the others.
    """

    def __init__(
        self, device: ExpertWeights, host: ExpertWeights, host_kernels: Kernels, link: HostLink
    ) -> None:
        self.device = device
        self.host = host
        self._host_kernels = host_kernels
        self._link = link

    def __call__(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        constants: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As ExpertWeights'; the device has the constants."""
        fetched = self._link.fetch(x, expert_ids, weights)
        mixed = self.device(
            x, expert_ids, weights, constants
        )  # on a GPU: queued, and computed while we go on
        share = self._host_share(*fetched(), has_constants=constants is not None)
        return mixed if share is None else mixed.add_(self._link.send(share))

    def add_norm(
        self,
        x: torch.Tensor,
        expert_ids: torch.Tensor,
        weights: torch.Tensor,
        added: torch.Tensor | None,
        residual: torch.Tensor,
        norm: RmsNorm,
        constants: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ExpertWeights'."""
        mixed = self(x, expert_ids, weights, constants)
        return norm.add(mixed if added is None else mixed.add_(added), residual)

    def _host_share(
        self, x: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor, *, has_constants: bool
    ) -> torch.Tensor | None:
        """The sum over the experts that live here, [T, H]; all on the CPU. None where nobody chose one."""
        residence = self.host.residence
        assert residence is not None, "the host never has all experts of a tiered layer"
        slot_of = residence.slot_of
        if has_constants:  # their ids follow the experts', and none is here
            slot_of = torch.cat((slot_of, slot_of.new_full((int(expert_ids.max()) + 1,), ELSEWHERE)))
        slots = slot_of[expert_ids.long()]
        tokens, columns = torch.nonzero(slots >= 0, as_tuple=True)
        if not len(tokens):
            return None
        # A pair is a token of its own with one expert. nonzero lists them token by token, slot by slot, and
        # they are added up in this order.
        rows = self._host_kernels.fused_moe(
            x[tokens], slots[tokens, columns, None], weights[tokens, columns, None], self.host.packed
        )
        share = self._link.new(x.shape).zero_()
        return share.index_add_(0, tokens, rows)

    @property
    def num_bytes(self) -> int:
        """Of the weights, in both memories."""
        return self.device.num_bytes + self.host.num_bytes

    @property
    def residence(self) -> Residence | None:
        """The device's."""
        return self.device.residence

    def slots(self, expert_id: int, prefix: str, parts: tuple[str, str, str]) -> Iterator[Slot]:
        residence = self.host.residence
        assert residence is not None, "the host never has all experts of a tiered layer"
        home = self.host if int(residence.slot_of[expert_id]) >= 0 else self.device
        return home.slots(expert_id, prefix, parts)


def placed_experts(
    kernels: Kernels,
    hidden: int,
    intermediate: int,
    placed: LayerPlacement,
    missed: torch.Tensor,
    host: tuple[Kernels, HostLink] | None,
) -> ExpertWeights | TieredExperts:
    """The experts of a layer, still without weights, where ``placed`` says. ``missed`` is Residence's.
    ``host``, who computes there and the way to it, is for layers that have experts on it.
    """
    shape = (len(placed.tiers), hidden, intermediate)
    if placed.count("device") == len(placed.tiers):
        return ExpertWeights(kernels, *shape)
    device = ExpertWeights(
        kernels, *shape, slot_of=_slot_numbers(placed, "device"), layer=placed.layer, missed=missed
    )
    if not placed.count("host"):
        return device
    if host is None:
        raise ValueError(f"layer {placed.layer} has experts on the host, and nobody computes there")
    host_kernels, link = host
    there = ExpertWeights(host_kernels, *shape, slot_of=_slot_numbers(placed, "host"), layer=placed.layer)
    return TieredExperts(device, there, host_kernels, link)


def _sum_of_constants(
    x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor, constants: torch.Tensor | None
) -> torch.Tensor:
    """What a home of no expert makes of x [T, H]: slots from 0 on are constants, others are elsewhere."""
    total = torch.zeros_like(x)
    if constants is None:
        return total
    for column in range(slots.shape[1]):
        chosen = slots[:, column].long()
        weight = torch.where(chosen >= 0, weights[:, column], 0.0)
        total += weight[:, None] * constants[chosen.clamp(min=0)]
    return total


def _slot_numbers(placed: LayerPlacement, here: Tier) -> list[int]:
    """Experts of the tier ``here`` are numbered, ascending; of the others it says where they are not."""
    numbers, count = [], 0
    for tier in placed.tiers:
        if tier == here:
            numbers.append(count)
            count += 1
        else:
            numbers.append(ABSENT if tier == "absent" else ELSEWHERE)
    return numbers
