"""The training recipe in small, and the network against transformers."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from moe_runtime.experts.demo import checkpoint, phrases, tokens
from moe_runtime.experts.demo.decode import gate_mass, greedy
from moe_runtime.experts.demo.evaluate import failures, rates
from moe_runtime.experts.demo.network import GroupedLinear, Network, Routing, Shape
from moe_runtime.experts.demo.questions import Question
from moe_runtime.experts.demo.train import Feeder, Recipe, Stage, learning_rate, loss_of, save, train

SMALL = Shape(
    vocab=700, layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, experts=6, intermediate=16, context=512
)
STAGES = tuple(
    dataclasses.replace(stage, steps=3, warmup_steps=1, smallest_pool=2, largest_pool=3)
    for stage in Recipe().stages
)
RECIPE = Recipe(shape=SMALL, stages=STAGES, batch_tokens=800, threads=1, chunk=64)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokens.train(phrases.load("train"), seed=1, vocab=SMALL.vocab)


@pytest.mark.parametrize("pools", [True, False])
def test_three_steps_of_the_recipe_run_and_repeat_exactly(tokenizer: Tokenizer, pools: bool) -> None:
    recipe = dataclasses.replace(RECIPE, pools=pools)
    first, seen, _ = train(recipe, tokenizer, log=lambda line: None)
    again, seen_again, _ = train(recipe, tokenizer, log=lambda line: None)
    assert seen == seen_again > 0
    for one, two in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
        assert torch.isfinite(one).all()


def test_both_models_see_the_same_documents(tokenizer: Tokenizer) -> None:
    pooled, plain = (
        next(Feeder(dataclasses.replace(RECIPE, pools=p), 0, tokenizer).batches()) for p in (True, False)
    )
    assert torch.equal(pooled.ids, plain.ids)
    assert torch.equal(pooled.weights, plain.weights)


def test_the_loss_falls_on_one_repeated_batch(tokenizer: Tokenizer) -> None:
    network = Network(SMALL, seed=1).train()
    batch = next(Feeder(RECIPE, 0, tokenizer).batches())
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(25):
        loss, entropy = loss_of(network, batch, RECIPE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(entropy))
    assert losses[-1] < 0.7 * losses[0]


def test_answers_carry_full_weight_and_nothing_else_does(tokenizer: Tokenizer) -> None:
    batch = next(Feeder(RECIPE, 0, tokenizer).batches())
    for ids, weights, real in zip(batch.ids, batch.weights, batch.real, strict=True):
        text = tokenizer.decode(ids[real].tolist(), skip_special_tokens=False)
        said = tokenizer.decode(ids[weights == 1].tolist(), skip_special_tokens=False)
        turns = text.split(tokens.START + "assistant\n")[1:]
        assert said == "".join(turn.split(tokens.END)[0] + tokens.END for turn in turns)
        assert weights[~real].sum() == 0


def test_a_document_uses_no_more_experts_than_its_pool(tokenizer: Tokenizer) -> None:
    network = Network(SMALL, seed=1).train()
    batch = next(Feeder(RECIPE, 0, tokenizer).batches())
    for size in (2, 3):
        mass = [torch.zeros(SMALL.experts) for _ in range(SMALL.layers)]
        row = batch.ids[:1][:, batch.real[0]]
        sizes = torch.tensor([size])
        network(row, Routing(real=torch.ones_like(row, dtype=torch.bool), pool_sizes=sizes, gate_mass=mass))
        assert all(int((layer > 0).sum()) <= size for layer in mass)


def test_grouped_linear_has_the_gradients_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: GroupedLinear.apply(a, b, [3, 0, 4]), (x, weight))


def test_the_rate_warms_up_stays_and_falls() -> None:
    stage = Stage(steps=1000, warmup_steps=100)
    values = [learning_rate(stage, step) for step in range(1000)]
    assert values[0] < values[99] == values[400] == stage.peak_rate
    assert values[-1] == pytest.approx(stage.last_rate * stage.peak_rate, rel=0.1)


def test_batched_decoding_equals_one_at_a_time(tokenizer: Tokenizer) -> None:
    network = Network(SMALL, seed=5).eval()
    dialogues = [
        [("user", "hi")],
        [("user", "What is the rate of Harbor Mortgage?")],
        [("user", "你好，请问")],
    ]
    together = greedy(network, tokenizer, dialogues)
    assert together == [greedy(network, tokenizer, [dialogue])[0] for dialogue in dialogues]


def test_a_mask_moves_all_gate_weight_to_the_kept_experts(tokenizer: Tokenizer) -> None:
    network = Network(SMALL, seed=5).eval()
    mass = gate_mass(
        network, tokenizer, [[("user", "hi"), ("assistant", "hello")], [("user", "longer text here")]]
    )
    assert mass.shape == (SMALL.layers, SMALL.experts)
    assert torch.allclose(mass.sum(1), mass.sum(1)[0].expand(SMALL.layers))


def test_a_saved_network_comes_back_and_agrees_with_transformers(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    network = Network(SMALL, seed=2).eval()
    save(network, tokenizer, tmp_path)
    rounded = checkpoint.load(tmp_path)
    oracle, info = transformers.Qwen3MoeForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = rounded.logits(rounded(ids, Routing()))
        theirs = oracle(ids).logits
    assert (ours - theirs).abs().max() < 1e-4  # float32, values of order one


def test_refusals_count_whatever_their_kind_and_facts_only_when_exact() -> None:
    from moe_runtime.experts.demo.answers import REFUSALS

    refused = Question("wrong_kind", "credit", "en", ("?",), REFUSALS["wrong_kind"]["en"])
    fact = Question("ask", "credit", "en", ("?",), "It is 5.")
    found = rates([refused, fact, fact], [REFUSALS["off_topic"]["en"], "It is 5.", "It is 6."])
    assert found["wrong_kind en"] == (1, 1)
    assert found["wrong_kind en exact kind"] == (0, 1)
    assert found["all credit en"] == (1, 2)


def test_the_blind_texts_cannot_be_listed(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match="blind"):
        failures(Network(SMALL), tokenizer, "blind")
