"""The router correction's mathematics, against what finite differences and a dense solver say."""

import pytest
import torch

from moe_runtime.experts.recovery_router import NormalEquations, slopes
from moe_runtime.kernels import RouterSpec, reference

TOKENS, EXPERTS, TOP_K, HIDDEN = 300, 8, 2, 12  # more tokens than are added at once
KEPT = [0, 2, 3, 5, 6, 7]
SPECS = {
    "softmax": RouterSpec(TOP_K),
    "softmax, scaled": RouterSpec(3, routed_scaling=2.5),
    "softmax, normalised": RouterSpec(TOP_K, norm_topk_prob=True),
    "softmax after the choice": RouterSpec(TOP_K, softmax_after_topk=True, routed_scaling=0.5),
    "sigmoid": RouterSpec(TOP_K, "sigmoid"),
    "sigmoid, normalised, scaled": RouterSpec(TOP_K, "sigmoid", True, routed_scaling=1.5, norm_epsilon=1e-20),
    "sigmoid, bias, groups": RouterSpec(
        TOP_K, "sigmoid", True, 4, 2, "top2_sum", routed_scaling=2.5, norm_epsilon=1e-20
    ),
}


class World:
    """Tokens of one layer in float64, and ``mix``: the literal masked mixture for given logits."""

    def __init__(self, spec: RouterSpec) -> None:
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.spec = spec
        self.logits, self.target = normal(TOKENS, EXPERTS), normal(TOKENS, HIDDEN)
        self.outputs = normal(TOKENS, EXPERTS, HIDDEN)  # of every expert for every token
        self.bias = 0.3 * normal(EXPERTS) if spec.num_groups > 1 else None
        self.kept = torch.zeros(EXPERTS, dtype=torch.bool)
        self.kept[KEPT] = True
        self.ids, self.weights = self.route(self.logits)
        self.own, self.drawn = slopes(spec, self.logits, self.ids, self.weights, self.kept)

    def route(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.zeros(len(logits), dtype=torch.int32)
        return reference.route(logits, self.spec, self.bias, self.kept.to(torch.uint8)[None], rows)

    def chosen(self, ids: torch.Tensor) -> torch.Tensor:
        """The outputs of the chosen experts, [T, top_k, H]."""
        return self.outputs.gather(1, ids.long().unsqueeze(-1).expand(-1, -1, HIDDEN))

    def mix(self, logits: torch.Tensor) -> torch.Tensor:
        ids, weights = self.route(logits)
        return (weights.unsqueeze(-1) * self.chosen(ids)).sum(1)

    def jacobian(self) -> torch.Tensor:
        """[T, H, E], by central differences."""
        columns, step = [], 1e-6
        for expert in range(EXPERTS):
            change = torch.zeros(EXPERTS, dtype=torch.float64)
            change[expert] = step
            columns.append((self.mix(self.logits + change) - self.mix(self.logits - change)) / (2 * step))
        return torch.stack(columns, -1)

    def equations(self) -> NormalEquations:
        found = NormalEquations(EXPERTS)
        found.add(self.ids, self.weights, self.chosen(self.ids), self.target, self.own, self.drawn)
        return found

    def steady(self) -> torch.Tensor:
        """bool [T]: tokens whose choice is the same on both sides of every difference."""
        same = torch.ones(TOKENS, dtype=torch.bool)
        for change in (1e-6, -1e-6):
            for expert in range(EXPERTS):
                moved = self.logits.clone()
                moved[:, expert] += change
                same &= (self.route(moved)[0] == self.ids).all(1)
        return same


@pytest.mark.parametrize("name", SPECS)
def test_the_slopes_are_those_of_finite_differences(name: str) -> None:
    world = World(SPECS[name])
    steady = world.steady()
    assert steady.float().mean() > 0.99
    numeric = world.jacobian()
    chosen = torch.zeros(TOKENS, EXPERTS, HIDDEN, dtype=torch.float64)
    columns = world.own.unsqueeze(-1) * world.chosen(world.ids)
    chosen.scatter_(1, world.ids.long().unsqueeze(-1).expand_as(columns), columns)
    analytic = chosen.transpose(1, 2) - world.mix(world.logits).unsqueeze(-1) * world.drawn.unsqueeze(1)
    # Central differences of 1e-6 round off at 1e-16 / 1e-6 of numbers around 5, and curve at 1e-12.
    assert torch.allclose(analytic[steady], numeric[steady], rtol=0, atol=2e-8)
    assert not numeric[steady][..., ~world.kept].any() and numeric[steady].abs().max() > 0.1


@pytest.mark.parametrize("name", SPECS)
def test_the_normal_equations_are_those_of_the_dense_jacobian(name: str) -> None:
    world = World(SPECS[name])
    columns = torch.zeros(TOKENS, EXPERTS, HIDDEN, dtype=torch.float64)
    own = world.own.unsqueeze(-1) * world.chosen(world.ids)
    columns.scatter_(1, world.ids.long().unsqueeze(-1).expand_as(own), own)
    mixed = world.mix(world.logits)
    dense = (columns.transpose(1, 2) - mixed.unsqueeze(-1) * world.drawn.unsqueeze(1)).reshape(-1, EXPERTS)
    left = (world.target - mixed).reshape(-1)
    found = world.equations()
    assert torch.allclose(found.gram, dense.T @ dense, rtol=1e-10, atol=1e-10)
    assert torch.allclose(found.pull, dense.T @ left, rtol=1e-10, atol=1e-10)
    assert found.error == pytest.approx(float(left.square().sum()), rel=1e-12)
    # The ridge's minimum, by a dense least-squares solver.
    damping = 0.1
    scale = (damping * found.gram[KEPT][:, KEPT].trace() / len(KEPT)).sqrt()
    rows = torch.cat((dense[:, KEPT], scale * torch.eye(len(KEPT), dtype=torch.float64)))
    right = torch.cat((left, torch.zeros(len(KEPT), dtype=torch.float64)))
    expected = torch.linalg.lstsq(rows, right, driver="gelsd").solution
    offsets = found.solve(KEPT, damping)
    assert torch.allclose(offsets[KEPT], expected, rtol=1e-9, atol=1e-12)
    assert not offsets[~world.kept].any()
    assert found.error_at(offsets) == pytest.approx(float((left - dense @ offsets).square().sum()), rel=1e-10)
    assert found.error_at(offsets) < found.error


@pytest.mark.parametrize("name", SPECS)
def test_offsets_that_were_planted_are_found(name: str) -> None:
    """The target is what the layer makes with some offsets: they come back, up to what changes nothing."""
    world = World(SPECS[name])
    planted = torch.zeros(EXPERTS, dtype=torch.float64)
    planted[KEPT] = 1e-5 * torch.tensor([3.0, -1.0, 2.0, 0.5, -2.0, 1.0], dtype=torch.float64)
    world.target = world.mix(world.logits + planted)
    found = world.equations()
    offsets = found.solve(KEPT, 1e-12)
    # What is left is the second order of 3e-5, against a first order of it.
    assert found.error_at(offsets) < 1e-6 * found.error
    again = (world.mix(world.logits + offsets) - world.target).square().sum()
    assert float(again) < 1e-6 * found.error


def test_more_damping_is_less_change_and_no_slope_is_none() -> None:
    found = World(SPECS["softmax, normalised"]).equations()
    sizes = [float(found.solve(KEPT, damping).norm()) for damping in (0.01, 0.1, 1.0, 10.0)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] > 0
    alone = World(RouterSpec(1, norm_topk_prob=True))  # one expert of weight 1, whatever its logit
    assert not alone.equations().solve(KEPT, 0.1).abs().max() > 1e-12
    assert not NormalEquations(EXPERTS).solve(KEPT, 0.1).any()
