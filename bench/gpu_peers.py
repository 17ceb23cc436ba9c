"""The same mixture by others, in bf16, on the same weights and choices: torch and transformers.

Every peer gets its input in bf16 already, and the loop over experts knows the choices beforehand, which in
service would be a wait for the device: what is compared is at its best.
"""

import importlib.util
import types
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from gpu_clock import Call, Clock
from gpu_mixture import Mixture, Tokens, relative_error

GATHERING_MOST = 64  # token-expert pairs up to which copying each pair's weights is worth a try
WRONG_ABOVE = 3e-2


class Bf16Weights:
    """gate_up [E, 2 I, H] and down [E, H, I] of one set, views of our own where rows are not padded."""

    def __init__(self, mixture: Mixture, which: int) -> None:
        experts, shared = mixture.sets[which % len(mixture.sets)]
        self.gate_up, self.down = self._plain(experts)
        self.shared = None if shared is None else self._plain(shared)

    @staticmethod
    def _plain(experts: Any) -> tuple[torch.Tensor, torch.Tensor]:
        gate_up = experts.gate_up.data[..., : experts.hidden].contiguous()
        down = experts.down.data[..., : experts.intermediate].contiguous()
        return gate_up.view(experts.num_experts, -1, experts.hidden), down

    def add_shared(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        if self.shared is not None:
            gate_up, down = self.shared
            out = out + gated(x, gate_up[0], down[0])
        return out


def gated(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


Side = Callable[[Bf16Weights, Tokens], Call]


def torch_loop(weights: Bf16Weights, tokens: Tokens) -> Call:
    """One expert after the other, each on its own tokens."""
    x = tokens.x.bfloat16()
    groups = []
    for expert in tokens.ids.unique().tolist():
        rows, slots = torch.nonzero(tokens.ids == expert, as_tuple=True)
        groups.append((expert, rows, tokens.weights[rows, slots, None].bfloat16()))

    def run() -> torch.Tensor:
        out = torch.zeros_like(x)
        for expert, rows, scale in groups:
            result = gated(x[rows], weights.gate_up[expert], weights.down[expert])
            out.index_add_(0, rows, result * scale)
        return weights.add_shared(x, out)

    return run


def torch_grouped_mm(weights: Bf16Weights, tokens: Tokens) -> Call:
    """Sorted by expert, two grouped products, put back."""
    x, top_k, num_experts = tokens.x.bfloat16(), tokens.ids.shape[1], weights.gate_up.shape[0]
    flat, scale = tokens.ids.flatten(), tokens.weights.flatten()[:, None].bfloat16()
    all_experts = torch.arange(num_experts, device=x.device)

    def run() -> torch.Tensor:
        chosen, order = flat.sort()
        ends = torch.searchsorted(chosen, all_experts, right=True).int()
        gate, up = torch._grouped_mm(x[order // top_k], weights.gate_up.transpose(1, 2), offs=ends).chunk(
            2, dim=-1
        )
        result = torch._grouped_mm(F.silu(gate) * up, weights.down.transpose(1, 2), offs=ends)
        back = torch.empty_like(result)
        back[order] = result
        out = (back * scale).view(len(x), top_k, -1).sum(1)
        return weights.add_shared(x, out)

    return run


def transformers_side(implementation: str) -> Side:
    """transformers' own experts module, with one of its implementations."""

    def side(weights: Bf16Weights, tokens: Tokens) -> Call:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        num_experts, hidden, intermediate = weights.down.shape
        config = Qwen3MoeConfig(
            num_experts=num_experts, hidden_size=hidden, moe_intermediate_size=intermediate
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = Qwen3MoeExperts(config)
        module.gate_up_proj = torch.nn.Parameter(weights.gate_up, requires_grad=False)
        module.down_proj = torch.nn.Parameter(weights.down, requires_grad=False)
        x, ids, scale = tokens.x.bfloat16(), tokens.ids.long(), tokens.weights.bfloat16()

        def run() -> torch.Tensor:
            with torch.no_grad():
                return weights.add_shared(x, module(x, ids, scale))

        return run

    return side


SIDES: types.MappingProxyType[str, Side] = types.MappingProxyType(
    {
        "torch loop over experts": torch_loop,
        "torch._grouped_mm": torch_grouped_mm,
        "transformers grouped_mm": transformers_side("grouped_mm"),
        "transformers batched_mm": transformers_side("batched_mm"),
    }
)


def measure(mixture: Mixture, inputs: list[Tokens], clock: Clock) -> dict[str, dict[str, Any]]:
    """Seconds of each peer, or why there are none; a peer that is wrong is no peer."""
    expected = mixture.call(0, inputs[0])().double()
    answers: dict[str, dict[str, Any]] = {}
    for name, side in SIDES.items():
        if "batched" in name and inputs[0].ids.numel() > GATHERING_MOST:
            continue
        if name.startswith("transformers") and importlib.util.find_spec("transformers") is None:
            answers[name] = {"absent": "not installed"}
            continue
        try:
            calls = [side(Bf16Weights(mixture, place), tokens) for place, tokens in enumerate(inputs)]
            error = relative_error(calls[0](), expected)
            answers[name] = {"error": error, "seconds": asdict(clock.measure(calls))}
        except Exception as problem:  # noqa: BLE001 (a peer's failure is a result, not ours)
            answers[name] = {"absent": f"{type(problem).__name__}: {str(problem)[:200]}"}
            continue
        if error > WRONG_ABOVE:
            answers[name] = {"absent": f"wrong by {error:.1e}"}
    found = importlib.util.find_spec("triton_kernels") is not None
    answers["triton_kernels"] = {
        "absent": "found, but its interface is not known here" if found else "not installed"
    }
    return answers
