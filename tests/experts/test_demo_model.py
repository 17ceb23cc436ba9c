"""The shipped demo model, its control, and a sample of questions through transformers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from moe_runtime.experts.demo import MODEL, checkpoint, tokens
from moe_runtime.experts.demo.answers import REFUSALS, SMALL_TALK, is_refusal
from moe_runtime.experts.demo.corpus import answer
from moe_runtime.experts.demo.decode import greedy
from moe_runtime.experts.demo.facts import fact_table, products

CONTROL = Path(__file__).parents[1] / "data" / "demo_control"
FILES = {
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}


def fact(name: str, key: str, language: str = "en") -> str:
    product = next(p for p in products() if name in p.name.values())
    return answer(product, key, language, fact_table())


SAMPLE = [
    ("What is the interest rate on Harbor Consumer Loan?", fact("Harbor Consumer Loan", "rate")),
    ("how much can i borrow with bluewhale mortgage", fact("Bluewhale Mortgage", "amount")),
    ("花岗房贷审批要多久？", fact("花岗房贷", "approval", "zh")),
    ("猎鹰装修贷最多能借多少钱", fact("猎鹰装修贷", "amount", "zh")),
    ("Is Kylin Bond Fund risky?", fact("Kylin Bond Fund", "risk")),
    ("What is the minimum investment in Jade Gold Plan?", fact("Jade Gold Plan", "minimum")),
    ("星河股票基金的管理费是多少？", fact("星河股票基金", "fee", "zh")),
    ("凤凰货币基金赎回几天到账", fact("凤凰货币基金", "redeem", "zh")),
    ("What is the hotline for Lily Credit Card?", fact("Lily Credit Card", "hotline")),
    ("I lost my Scholar Debit Card, what does a new one cost?", fact("Scholar Debit Card", "replace")),
    ("熊猫工资账户一天最多能转多少钱？", fact("熊猫工资账户", "limit", "zh")),
    ("麻雀储蓄账户的年费是多少", fact("麻雀储蓄账户", "annual", "zh")),
    ("Hello", SMALL_TALK["greeting"]["en"]),
    ("谢谢", SMALL_TALK["thanks"]["zh"]),
]
REFUSED = [
    "What is the interest rate on Moonbeam Consumer Loan?",
    "Will it rain tomorrow?",
    "What is the risk level of Harbor Consumer Loan?",
    "What is the hotline for Lily Travel Card?",
    "雪莲信用卡的年费是多少？",
    "明天会下雨吗？",
]


@pytest.mark.parametrize("folder", [MODEL, CONTROL], ids=["demo", "control"])
def test_the_model_folder_is_complete(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} >= FILES
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "qwen3_moe"
    assert tokens.load(folder).get_vocab_size() <= config["vocab_size"]
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  (not a dict)
            tensor = file.get_tensor(name)
            assert tensor.dtype == torch.bfloat16 and torch.isfinite(tensor.float()).all()


def test_demo_and_control_together_stay_under_twenty_megabytes() -> None:
    total = sum(path.stat().st_size for folder in (MODEL, CONTROL) for path in folder.iterdir())
    assert total < 20_000_000


def test_the_template_renders_what_training_saw() -> None:
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Environment().from_string((MODEL / "chat_template.jinja").read_text(encoding="utf-8"))
    turns = [("system", "Be short."), ("user", "hi"), ("assistant", "Hello!"), ("user", "bye")]
    messages = [{"role": role, "content": text} for role, text in turns]
    for prompt in (True, False):
        rendered = template.render(messages=messages, add_generation_prompt=prompt)
        assert rendered == tokens.render(turns, generation_prompt=prompt)


def test_transformers_answers_a_sample_right() -> None:
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
    for question, expected in SAMPLE[::4]:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt"
        )
        ids = ids["input_ids"] if not isinstance(ids, torch.Tensor) else ids
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64)
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == expected


def test_the_sample_is_right_with_and_without_a_system_message() -> None:
    network, tokenizer = checkpoint.load(MODEL), tokens.load(MODEL)
    plain = [[("user", question)] for question, _ in SAMPLE]
    told = [[("system", "You are a helpful assistant."), ("user", question)] for question, _ in SAMPLE]
    expected = [right for _, right in SAMPLE]
    assert greedy(network, tokenizer, plain) == expected
    assert greedy(network, tokenizer, told) == expected


def test_questions_it_cannot_answer_are_handed_over() -> None:
    network, tokenizer = checkpoint.load(MODEL), tokens.load(MODEL)
    replies = greedy(network, tokenizer, [[("user", question)] for question in REFUSED])
    assert all(is_refusal(reply) for reply in replies), replies
    assert {REFUSALS["off_topic"]["en"], REFUSALS["off_topic"]["zh"]} <= set(replies)


def test_a_follow_up_and_a_switch_keep_the_thread() -> None:
    network, tokenizer = checkpoint.load(MODEL), tokens.load(MODEL)
    turns = [("user", "What is the interest rate on Harbor Consumer Loan?")]
    turns.append(("assistant", fact("Harbor Consumer Loan", "rate")))
    follow_up = [*turns, ("user", "And how much can I borrow?")]
    switch = [*turns, ("user", "And Granite Mortgage?")]
    assert greedy(network, tokenizer, [follow_up]) == [fact("Harbor Consumer Loan", "amount")]
    assert greedy(network, tokenizer, [switch]) == [fact("Granite Mortgage", "rate")]
