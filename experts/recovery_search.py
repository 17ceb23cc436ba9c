"""A plan's router correction: fitted on some texts, its strength chosen by measured KL on others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from moe_runtime.batch import Batch
from moe_runtime.config import EngineConfig
from moe_runtime.experts.forward import Runner
from moe_runtime.experts.packing import cache_blocks, pack
from moe_runtime.experts.recovery_router import NormalEquations, slopes
from moe_runtime.layers.decoder import Decoder
from moe_runtime.layers.moe import Fence, MoeMlp
from moe_runtime.layers.trace import Mixing, trace
from moe_runtime.plan import ExpertMask
from moe_runtime.recovery import Recovery

DAMPINGS = (0.01, 0.1, 1.0)  # times the mean of A's diagonal
STEPS = (1.0, 0.5, 0.25)  # of the offsets found: the choice of experts moves, which the linear model holds

Documents = Sequence[Sequence[int]]
Advance = Callable[[int], None]  # told of tokens computed


@dataclass(frozen=True)
class Found:
    """The best correction, and how it was chosen.

    damping, step       which of DAMPINGS and STEPS, also when not even that one ``helps``
    kl_alone, kl_with   mean KL on the texts to choose by, nats: of the plan alone, and with the correction
    explained           of all layers' squared error, the share that the linear model says goes, 0 to 1
    tried               mean KL by (damping, step)
    """

    recovery: Recovery
    damping: float
    step: float
    kl_alone: float
    kl_with: float
    explained: float
    tried: Mapping[tuple[float, float], float]

    @property
    def helps(self) -> bool:
        return self.kl_with < self.kl_alone


class _Fitter:
    """A Watcher of layers/trace.py: the full model reads, and what every masked layer would have made of the
    same input goes into the layer's normal equations.
    """

    def __init__(self, model: Decoder, row: int, mask: ExpertMask) -> None:
        """``row``: of ``mask`` in the model's mask table."""
        self._mixtures = dict(model.mixtures())
        self._device, self._hidden = model.device, model.config.hidden_size
        self._row = row
        self._kept: dict[int, torch.Tensor] = {}
        for layer in mask.layers:
            kept = torch.zeros(layer.num_experts, dtype=torch.bool)
            kept[list(layer.kept)] = True
            self._kept[layer.layer] = kept
        self.equations = {layer.layer: NormalEquations(layer.num_experts) for layer in mask.layers}
        self._num_tokens = 0

    def start(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    @property
    def counted(self) -> torch.Tensor:
        return torch.zeros(self._num_tokens, dtype=torch.uint8, device=self._device)

    def output_sums(self, layer: int) -> torch.Tensor:
        """Nothing is added to them, as nothing is ``counted``."""
        num_experts = self._mixtures[layer].config.num_experts
        return torch.zeros(num_experts, self._hidden, dtype=torch.float64, device=self._device)

    def observe(self, mixing: Mixing) -> None:
        mixture, x = self._mixtures[mixing.layer], mixing.inputs
        rows = torch.full((len(x),), self._row, dtype=torch.int32, device=x.device)
        ids, weights = mixture.route(x, Fence(rows))
        logits = mixture.router(x)
        kept = self._kept[mixing.layer].to(x.device)
        own, drawn = slopes(mixture.spec, logits, ids, weights, kept)
        outputs = _outputs(mixture, x, ids)
        self.equations[mixing.layer].add(
            *(each.cpu() for each in (ids, weights, outputs, mixing.mixed, own, drawn))
        )


def _outputs(mixture: MoeMlp, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """float32 [T, top_k, H]: what each of the chosen experts makes of its token, before any weight."""
    top_k = ids.shape[1]
    ones = torch.ones(len(x) * top_k, 1, device=x.device)
    alone = mixture.experts(x.repeat_interleave(top_k, 0), ids.reshape(-1, 1).contiguous(), ones)
    return alone.view(len(x), top_k, -1)


def fit(
    runner: Runner,
    config: EngineConfig,
    mask: ExpertMask,
    documents: Documents,
    advance: Advance = lambda tokens: None,
) -> dict[int, NormalEquations]:
    """By layer, over all tokens of ``documents``. Raises PlanError for a mask that does not fit the model."""
    model = runner.model
    blocks = cache_blocks([len(ids) for ids in documents], config.max_batch_tokens, config.block_size)
    cache = model.new_cache(blocks, config.block_size, config.kv_dtype)
    with runner.masked([mask]) as rows:
        fitter = _Fitter(model, rows[0], mask)
        for step in pack(documents, config.max_batch_tokens, config.block_size):
            fitter.start(step.num_tokens)
            trace(model, Batch.build(step, config.block_size), cache, fitter)
            advance(step.num_tokens)
    return fitter.equations


def search(
    runner: Runner,
    mask: ExpertMask,
    equations: Mapping[int, NormalEquations],
    documents: Documents,
    advance: Advance = lambda tokens: None,
) -> Found:
    """The correction of least mean KL on ``documents`` (not those it was fitted on), of all DAMPINGS and
    STEPS. ``advance`` is told of tokens, ``num_trials`` times those of the documents.
    """
    solved = {damping: solve(equations, mask, damping) for damping in DAMPINGS}
    tried = {
        (damping, step): Recovery(
            "router", {layer: (step * offsets).float() for layer, offsets in solved[damping].items()}
        )
        for damping, step in product(DAMPINGS, STEPS)
    }
    measured = runner.compare(documents, [mask] * num_trials(), advance, [None, *tried.values()])
    alone, *others = (float(found.kl.mean()) for found in measured)
    kl = dict(zip(tried, others, strict=True))
    best = min(kl, key=lambda pair: (kl[pair], pair))
    damping, step = best
    left = sum(of.error_at(step * solved[damping][layer]) for layer, of in equations.items())
    whole = sum(of.error for of in equations.values())
    return Found(tried[best], damping, step, alone, kl[best], 1 - left / whole if whole else 0.0, kl)


def num_trials() -> int:
    """Masked runs that ``search`` takes."""
    return 1 + len(DAMPINGS) * len(STEPS)


def solve(
    equations: Mapping[int, NormalEquations], mask: ExpertMask, damping: float
) -> dict[int, torch.Tensor]:
    """Offsets float64 [E] by layer."""
    return {layer.layer: equations[layer.layer].solve(list(layer.kept), damping) for layer in mask.layers}
