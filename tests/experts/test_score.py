"""Scores: each formula on numbers that can be checked by hand, and on the experts that fool one of them."""

import pytest
import torch
from planted import DOMAINS, Tensors, kind_of, planted_checkpoint, say
from sums_by_hand import by_hand, shape_of, statistics_of

from moe_runtime.config import EngineConfig
from moe_runtime.errors import ConfigError, PlanError
from moe_runtime.experts.corpus import Corpus, Text
from moe_runtime.experts.corpus_text import Rendered
from moe_runtime.experts.profile import profile
from moe_runtime.experts.prune import super_experts
from moe_runtime.experts.score import SCORES, scores_of, unseen_by
from moe_runtime.experts.statistics import ScenarioStatistics

SMALL = EngineConfig(max_batch_tokens=64, block_size=8, packed_file=False)


def test_every_score_is_its_formula() -> None:
    found = by_hand(
        [[4, 0]], gate=[[2.0, 0]], norm=[[12.0, 0]], norm_squared=[[40.0, 0]], gate_norm=[[6.0, 0]],
        gate_norm_turn=[[1.5, 0]],
    )  # fmt: skip
    found.outputs[0, 0] = torch.tensor([4.0, 8.0, 0.0, 0.0])  # mean (1, 2): 40 - 4 * 5 = 20 is left
    expected = {
        "frequency": 4.0, "gate_weight": 2.0, "ean": 12.0, "reap": 1.5, "reap_sum": 6.0, "easy_ep": 1.5,
        "mone": 20.0,
    }  # fmt: skip
    got = {name: SCORES[name](found, 0) for name in expected}
    assert {name: float(score[0, 0]) for name, score in got.items()} == expected
    assert all(float(score[0, 1]) == 0.0 and score.dtype == torch.float64 for score in got.values())


def test_the_random_score_is_the_seed_s_alone_and_looks_random() -> None:
    few, many = by_hand([[1] * 500] * 8), by_hand([[9] * 500] * 8)
    first = SCORES["random"](few, 1)
    assert torch.equal(first, SCORES["random"](many, 1))
    assert not torch.equal(first, SCORES["random"](few, 2))
    # 4000 uniform numbers: their mean is within 5 standard errors of 1/2.
    assert abs(float(first.mean()) - 0.5) < 5 * (1 / 12 / 4000) ** 0.5
    assert float(first.min()) >= 0.0 and float(first.max()) < 1.0 and len(first.unique()) == 4000


def test_a_mix_of_scenarios_weighs_them_alike_however_long_their_texts_are() -> None:
    shape = shape_of(1, 3)
    long, short = by_hand([[900, 100, 0]]), by_hand([[0, 2, 8]])
    statistics = statistics_of(shape, long=long, short=short)
    mixed = scores_of("frequency", statistics, ["long", "short"])
    assert torch.allclose(mixed, torch.tensor([[0.9, 0.3, 0.8]], dtype=torch.float64), atol=1e-15, rtol=0)
    assert torch.equal(scores_of("frequency", statistics, ["long"])[0], long.counts[0].double())
    assert unseen_by("ean", statistics, ["long"]).tolist() == [[False, False, True]]
    assert not unseen_by("ean", statistics, ["long", "short"]).any()
    assert not unseen_by("random", statistics, ["long"]).any()


def test_unknown_names_are_refused() -> None:
    statistics = statistics_of(shape_of(1, 3), credit=by_hand([[1, 1, 1]]))
    with pytest.raises(ConfigError, match="--score 'magic': must be one of frequency"):
        scores_of("magic", statistics, ["credit"])
    with pytest.raises(PlanError, match="no statistics of scenario 'wealth'; there are: credit"):
        scores_of("reap", statistics, ["wealth"])


def order(score: str, sums: ScenarioStatistics) -> list[int]:
    """The planted domain's experts in the first layer, best first."""
    values = SCORES[score](sums, 0)[0]
    return sorted(DOMAINS["credit"], key=lambda expert: (-float(values[expert]), expert))


@pytest.fixture(scope="module")
def fooling(tmp_path_factory: pytest.TempPathFactory) -> ScenarioStatistics:
    """Expert 0 serves nearly every token and says next to nothing; expert 6 serves few and says much."""

    def change(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if name.endswith("experts.0.down_proj.weight"):
                tensor.mul_(1e-4)
            if name.endswith("experts.6.down_proj.weight"):
                tensor.mul_(300.0)

    folder = planted_checkpoint(tmp_path_factory.mktemp("fooling") / "model", change=change)
    # Kind 0 prefers experts 0 and 2, kind 3 chooses 6 and 0.
    often = [letter for letter in "abcdefghijklm" if kind_of(letter) == 0]
    rare = [letter for letter in "abcdefghijklm" if kind_of(letter) == 1]
    letters = "".join(often) * 12 + "".join(rare)
    texts = [say("credit", 40, seed, letters) for seed in range(20)]
    corpus = Corpus(
        "credit",
        tuple(Text(str(number), Rendered(tuple(text.encode()))) for number, text in enumerate(texts)),
    )
    return profile(folder, [corpus], SMALL).of("credit")


def test_which_experts_fool_which_score(fooling: ScenarioStatistics) -> None:
    counts = fooling.counts[0].tolist()
    busy = max(DOMAINS["credit"], key=lambda expert: counts[expert])
    assert busy == 0 and 0 < counts[6] < counts[0] / 5
    # Frequency and gate weight are fooled by the busy expert that says nothing; what looks at outputs is not.
    for score in ("frequency", "gate_weight"):
        assert order(score, fooling)[0] == 0
    for score in ("ean", "reap", "reap_sum", "easy_ep", "mone"):
        seen = [expert for expert in order(score, fooling) if counts[expert]]
        assert seen[-1] == 0 and seen[0] == 6


def test_a_rare_expert_of_large_outputs_is_what_means_see_and_sums_forget() -> None:
    """100 tokens of length 1 against 2 of length 10: REAP divides by the count, the sums do not."""
    found = by_hand(
        [[100, 2]], gate=[[50.0, 1.0]], norm=[[100.0, 20.0]], gate_norm=[[50.0, 10.0]],
        gate_norm_turn=[[5.0, 1.0]], norm_squared=[[100.0, 200.0]],
    )  # fmt: skip
    best = {name: int(SCORES[name](found, 0)[0].argmax()) for name in SCORES if name != "random"}
    assert best == {
        "frequency": 0, "gate_weight": 0, "ean": 0, "reap": 1, "reap_sum": 0, "easy_ep": 0, "mone": 1,
    }  # fmt: skip


def test_an_output_along_the_residual_stream_counts_for_reap_and_not_for_easy_ep() -> None:
    """The expert only makes the stream longer, which the next norm takes back: 1 - cos is 0."""
    found = by_hand([[50, 50]], gate_norm=[[80.0, 20.0]], gate_norm_turn=[[0.0, 3.0]])
    assert int(SCORES["reap_sum"](found, 0)[0].argmax()) == 0
    assert int(SCORES["easy_ep"](found, 0)[0].argmax()) == 1


def test_a_super_expert_is_an_outlier_and_a_model_without_outliers_has_none(
    fooling: ScenarioStatistics,
) -> None:
    assert torch.nonzero(super_experts(fooling.peak))[:, 1].unique().tolist() == [6]
    even = torch.linspace(1.0, 5.0, 40).double().view(2, 20)
    assert not super_experts(even).any()
    assert not super_experts(torch.zeros(2, 20).double()).any()
    even[1, 7] = 80.0
    assert torch.nonzero(super_experts(even)).tolist() == [[1, 7]]
