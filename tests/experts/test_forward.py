"""The teacher-forced runner against a literal computation; the batches change nothing, equals cost 0."""

from pathlib import Path

import pytest
import torch
from world import tiny_checkpoint

from moe_runtime.config import EngineConfig
from moe_runtime.errors import PlanError
from moe_runtime.experts import divergence, forward
from moe_runtime.experts.divergence import TokenDivergences, compare_logits
from moe_runtime.experts.forward import Runner
from moe_runtime.plan import ExpertMask, LayerMask

LENGTHS = (30, 1, 7, 90, 2, 15)  # the fourth one takes several batches
pytestmark = pytest.mark.usefixtures("compute_device")


def documents(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in LENGTHS]


def mask_of(*kept: int, layers: tuple[int, ...] = (0, 1)) -> ExpertMask:
    return ExpertMask(tuple(LayerMask(layer, 8, kept) for layer in layers))


def config(**changes: object) -> EngineConfig:
    return EngineConfig(**{"max_batch_tokens": 40, "block_size": 8, "packed_file": False} | changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"))


def literal(full: torch.Tensor, masked: torch.Tensor, ids: list[int]) -> dict[str, torch.Tensor]:
    """Of one document: logits [T, V] of both."""
    p, q = full.double().log_softmax(-1)[:-1], masked.double().log_softmax(-1)[:-1]
    following = torch.tensor(ids[1:])
    return {
        "kl": torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1),
        "same_top1": p.argmax(-1) == q.argmax(-1),
        "nll_full": -p.gather(1, following[:, None])[:, 0],
        "nll_masked": -q.gather(1, following[:, None])[:, 0],
    }


def test_every_number_is_the_literal_one_for_every_token_and_mask(tiny: Path) -> None:
    """Logits here come from the reference kernels with a mask in the router: another way to the same."""
    runner = Runner.load(tiny, config())
    reference = Runner.load(tiny, config(backend="reference", max_batch_tokens=128))
    masks = [mask_of(0, 1, 2, 3), mask_of(2, 3, 5, 6, 7)]
    found = runner.compare(documents(), masks)
    for mask, numbers in zip(masks, found, strict=True):
        assert numbers.documents.tolist() == [n for n, size in enumerate(LENGTHS) for _ in range(size - 1)]
        assert numbers.positions.tolist() == [place for size in LENGTHS for place in range(size - 1)]
        for number, ids in enumerate(documents()):
            if len(ids) < 2:
                continue
            logits = []
            for row in (None, mask):
                with reference.masked([row] if row else []) as rows:
                    cache = reference._new_cache([ids])
                    step = next(iter(reference._steps([ids])))
                    logits.append(reference._logits(step, cache, rows[0] if rows else -1))
            expected = literal(*logits, ids)
            own = numbers.select(numbers.documents == number)
            for name, values in expected.items():
                # Two kernels in float32 differ by about 1e-6 of logits around 1.
                assert torch.allclose(getattr(own, name).double(), values.double(), atol=2e-5, rtol=0), name


def test_batches_other_masks_and_memory_change_no_bit(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = mask_of(1, 2, 4, 7)
    expected = Runner.load(tiny, config()).compare(documents(), [mask, mask_of(0, 1)])[0]

    def check(got: TokenDivergences) -> None:
        for name in ("documents", "positions", "kl", "same_top1", "nll_full", "nll_masked"):
            assert torch.equal(getattr(got, name), getattr(expected, name)), name

    runner = Runner.load(tiny, config(max_batch_tokens=17))
    check(runner.compare_one(documents(), mask))
    check(runner.compare_one(documents(), mask))  # the full model's logits from memory
    runner.compare_one(documents(1), mask)
    check(runner.compare_one(documents(), mask))
    monkeypatch.setattr(forward, "REMEMBERED_BYTES", 0)
    monkeypatch.setattr(forward, "MASKS_TOGETHER", 1)
    monkeypatch.setattr(divergence, "VALUES_AT_ONCE", 272 * 3)
    check(Runner.load(tiny, config()).compare(documents(), [mask, mask_of(3, 4)])[0])


def test_a_mask_that_forbids_nothing_costs_exactly_nothing(tiny: Path) -> None:
    runner = Runner.load(tiny, config())
    found = runner.compare_one(documents(), ExpertMask.full(runner.num_experts)).summary()
    assert (found.kl_mean, found.kl_p99, found.kl_max, found.top1) == (0.0, 0.0, 0.0, 1.0)
    assert found.nll_full == found.nll_masked and found.num_tokens == sum(LENGTHS) - len(LENGTHS)
    assert found.num_documents == len(LENGTHS) - 1


def test_progress_is_told_of_every_token_of_every_mask(tiny: Path) -> None:
    told: list[int] = []
    Runner.load(tiny, config()).compare(documents(), [mask_of(0, 1)] * 3, told.append)
    assert sum(told) == 3 * sum(LENGTHS)


def test_more_masks_than_the_table_has_rows_are_compared_and_leave_it_empty(tiny: Path) -> None:
    runner = Runner.load(tiny, config())
    short = [documents()[2]]
    found = runner.compare(short, [mask_of(0, 1 + number % 7) for number in range(70)])
    assert torch.equal(found[0].kl, found[69 - 69 % 7].kl) and len(found) == 70
    with pytest.raises(PlanError, match="made for another model"):
        runner.compare(short, [mask_of(0, 1), mask_of(0, 1, layers=(0, 1, 2))])
    with pytest.raises(PlanError, match="keeps 1 experts"):
        runner.compare(short, [mask_of(0)])
    runner.compare(short, [mask_of(0, 1)] * 8)  # the rows of the refused ones are free again


def test_nothing_to_compare_is_an_error(tiny: Path) -> None:
    for nothing in ([], [[5]]):
        with pytest.raises(PlanError, match="no document has two tokens or more"):
            Runner.load(tiny, config()).compare(nothing, [mask_of(0, 1)])


def test_logits_that_are_not_finite_are_an_error_not_a_pass() -> None:
    """A KL that is no number is not above any limit."""
    logits = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    for value in (float("nan"), float("inf")):
        broken = logits.clone()
        broken[1, 4] = value
        for pair in ((logits, broken), (broken, logits)):
            with pytest.raises(PlanError, match="not finite"):
                compare_logits(*pair, torch.tensor([1, 2, 3]))


def test_a_known_divergence() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): KL = log 2 - (log 3) / 2 = log(4/3) / 2, whatever is added."""
    full = torch.tensor([[0.0, 0.0]]) + 7.0
    masked = torch.tensor([[0.25, 0.75]]).log() - 300.0
    found = compare_logits(full, masked, torch.tensor([1]))
    assert float(found["kl"]) == pytest.approx(0.5 * torch.tensor(4 / 3).log().item(), abs=2e-5)
    assert float(found["nll_masked"]) == pytest.approx(-torch.tensor(0.75).log().item(), abs=2e-5)
    assert not bool(found["same_top1"])
