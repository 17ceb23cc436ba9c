"""The fixed sentences of the demo model: one per kind of small talk or refusal, and language.

A refusal never repeats the unknown name and never holds a number, so it cannot invent a value.
"""

REFUSALS: dict[str, dict[str, str]] = {
    "unknown_product": {
        "en": "I don't know a product with that name, so I can't answer that; "
        "let me hand you over to a person.",
        "zh": "我没有查到这个名称的产品，无法回答；我帮您转接人工客服。",
    },
    "wrong_kind": {
        "en": "We have no such product under that name, so I can't answer that; "
        "let me hand you over to a person.",
        "zh": "这个名称下没有这类产品，无法回答；我帮您转接人工客服。",
    },
    "unknown_attribute": {
        "en": "I have no information on that for this product, so I can't answer that; "
        "let me hand you over to a person.",
        "zh": "关于这个产品我没有这方面的信息，无法回答；我帮您转接人工客服。",
    },
    "off_topic": {
        "en": "I only know about this bank's products, so I can't answer that; "
        "let me hand you over to a person.",
        "zh": "我只了解本行的产品，无法回答这个问题；我帮您转接人工客服。",
    },
}

SMALL_TALK: dict[str, dict[str, str]] = {
    "greeting": {
        "en": "Hello! Which product would you like to know about?",
        "zh": "您好！请问您想了解哪个产品？",
    },
    "thanks": {"en": "You're welcome! Is there anything else?", "zh": "不客气！还有其他问题吗？"},
    "bye": {"en": "Goodbye, and have a nice day!", "zh": "再见，祝您生活愉快！"},
    "identity": {
        "en": "I'm the bank's automatic assistant, a small language model, not a person.",
        "zh": "我是本行的智能助手，一个小型语言模型，不是真人。",
    },
    "help": {
        "en": "You can ask me about our loans, our funds and plans, and our cards and accounts.",
        "zh": "您可以问我本行的贷款、理财产品，以及银行卡和账户。",
    },
    "human": {
        "en": "Of course, I am handing you over to a person now.",
        "zh": "好的，我现在为您转接人工客服。",
    },
    "which_product": {
        "en": "Which product do you mean? Please tell me its full name.",
        "zh": "请问您指的是哪个产品？请告诉我产品全名。",
    },
}

# Asked with a product name only: what can be asked about it.
OVERVIEW: dict[str, dict[str, str]] = {
    "credit": {
        "en": "You can ask about its interest rate, maximum amount, term, early repayment fee, "
        "income requirement and approval time.",
        "zh": "您可以问它的利率、额度、期限、提前还款违约金、收入要求和审批时间。",
    },
    "wealth": {
        "en": "You can ask about its risk level, management fee, redemption time, minimum investment, "
        "lock-up period and target return.",
        "zh": "您可以问它的风险等级、管理费、赎回时间、起购金额、锁定期和目标收益率。",
    },
    "customer_service": {
        "en": "You can ask about its hotline, daily transfer limit, annual fee, replacement fee, "
        "complaint time and opening time.",
        "zh": "您可以问它的客服电话、转账限额、年费、补办费用、投诉答复时间和开通时间。",
    },
}


def is_refusal(text: str) -> bool:
    """True when ``text`` is, word for word, one of the refusal sentences."""
    return any(text == sentence for by_language in REFUSALS.values() for sentence in by_language.values())
