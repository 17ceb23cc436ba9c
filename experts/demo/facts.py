"""The invented bank behind the demo model: products, attributes, and one seeded fact table per scenario.

Three scenarios, 18 products each, 6 attributes each: 108 facts per scenario and language. First names
and answer sentences never cross scenarios, so a deleted expert shows up as a lost fact and nowhere else.
Nothing here describes a real bank.
"""

# ruff: noqa: E501  (a table: one fact sentence per line)

import random
from dataclasses import dataclass

LANGUAGES = ("en", "zh")
FACT_SEED = 20261122


@dataclass(frozen=True)
class Product:
    """One product: its scenario, its kind, and its full name in each language."""

    scenario: str
    kind: str
    first: dict[str, str]
    name: dict[str, str]


@dataclass(frozen=True)
class Attribute:
    """One askable property. ``answer[language]`` holds ``{p}`` (product name) and ``{v}`` (value)."""

    key: str
    meaning: str
    answer: dict[str, str]


KINDS: dict[str, dict[str, dict[str, str]]] = {
    "credit": {
        "consumer_loan": {"en": "Consumer Loan", "zh": "消费贷"},
        "mortgage": {"en": "Mortgage", "zh": "房贷"},
        "car_loan": {"en": "Car Loan", "zh": "车贷"},
        "business_loan": {"en": "Business Loan", "zh": "经营贷"},
        "student_loan": {"en": "Student Loan", "zh": "助学贷"},
        "renovation_loan": {"en": "Renovation Loan", "zh": "装修贷"},
    },
    "wealth": {
        "bond_fund": {"en": "Bond Fund", "zh": "债券基金"},
        "stock_fund": {"en": "Stock Fund", "zh": "股票基金"},
        "money_fund": {"en": "Money Fund", "zh": "货币基金"},
        "gold_plan": {"en": "Gold Plan", "zh": "黄金计划"},
        "pension_plan": {"en": "Pension Plan", "zh": "养老计划"},
        "index_fund": {"en": "Index Fund", "zh": "指数基金"},
    },
    "customer_service": {
        "credit_card": {"en": "Credit Card", "zh": "信用卡"},
        "debit_card": {"en": "Debit Card", "zh": "借记卡"},
        "savings_account": {"en": "Savings Account", "zh": "储蓄账户"},
        "payroll_account": {"en": "Payroll Account", "zh": "工资账户"},
        "travel_card": {"en": "Travel Card", "zh": "旅行卡"},
        "family_account": {"en": "Family Account", "zh": "家庭账户"},
    },
}

FIRST_NAMES: dict[str, list[tuple[str, str]]] = {
    "credit": [
        ("Harbor", "港湾"), ("Bluewhale", "蓝鲸"), ("Sunrise", "朝阳"), ("Oak", "橡树"), ("Bridge", "金桥"),
        ("Falcon", "猎鹰"), ("River", "长河"), ("Granite", "花岗"), ("Maple", "红枫"), ("Anchor", "铁锚"),
        ("Cedar", "雪松"), ("Comet", "彗星"), ("Delta", "三江"), ("Ember", "星火"), ("Meadow", "青原"),
        ("Summit", "高峰"), ("Willow", "垂柳"), ("Beacon", "灯塔"),
    ],
    "wealth": [
        ("Kylin", "麒麟"), ("Galaxy", "星河"), ("Phoenix", "凤凰"), ("Jade", "翡翠"), ("Orchid", "兰花"),
        ("Crane", "仙鹤"), ("Tiger", "金虎"), ("Lotus", "莲花"), ("Horizon", "天际"), ("Pearl", "珍珠"),
        ("Eagle", "雄鹰"), ("Bamboo", "翠竹"), ("Aurora", "极光"), ("Lion", "雄狮"), ("Polaris", "北辰"),
        ("Coral", "珊瑚"), ("Amber", "琥珀"), ("Dragonfly", "蜻蜓"),
    ],
    "customer_service": [
        ("Lily", "百合"), ("Scholar", "学子"), ("Sparrow", "麻雀"), ("Panda", "熊猫"), ("Breeze", "清风"),
        ("Rainbow", "彩虹"), ("Compass", "罗盘"), ("Dolphin", "海豚"), ("Clover", "幸运草"), ("Koala", "考拉"),
        ("Swallow", "飞燕"), ("Tulip", "郁金香"), ("Voyage", "远航"), ("Penguin", "企鹅"), ("Sunflower", "向日葵"),
        ("Peach", "蜜桃"), ("Cloud", "白云"), ("Starling", "椋鸟"),
    ],
}  # fmt: skip

ATTRIBUTES: dict[str, list[Attribute]] = {
    "credit": [
        Attribute("rate", "annual interest rate charged to the borrower, in percent per year",
                  {"en": "The annual interest rate of {p} is {v}.", "zh": "{p}的年利率是{v}。"}),
        Attribute("amount", "the most money one can borrow (maximum loan amount), in yuan",
                  {"en": "With {p} you can borrow up to {v} yuan.", "zh": "{p}最多可以借{v}元。"}),
        Attribute("term", "the longest time over which one may repay (maximum repayment term), in months",
                  {"en": "{p} can be repaid over at most {v} months.", "zh": "{p}最长可以分{v}个月还清。"}),
        Attribute("early_fee", "the penalty or fee for repaying early (prepayment), in percent of the amount",
                  {"en": "Repaying {p} early costs {v} of the amount repaid.", "zh": "提前还{p}要付还款额{v}的违约金。"}),
        Attribute("income", "eligibility: the lowest monthly income an applicant needs, in yuan",
                  {"en": "To apply for {p} you need a monthly income of at least {v} yuan.", "zh": "申请{p}需要月收入至少{v}元。"}),
        Attribute("approval", "how long the approval of an application takes, in working days",
                  {"en": "An application for {p} is approved within {v} working days.", "zh": "{p}的审批需要{v}个工作日。"}),
    ],
    "wealth": [
        Attribute("risk", "the risk level or risk rating (R1 lowest to R5 highest)",
                  {"en": "{p} has risk level {v}.", "zh": "{p}的风险等级是{v}。"}),
        Attribute("fee", "the yearly management fee, in percent per year",
                  {"en": "The management fee of {p} is {v} a year.", "zh": "{p}的管理费是每年{v}。"}),
        Attribute("redeem", "after redemption (selling, cashing out), the days until the money arrives",
                  {"en": "After redemption of {p} the money arrives in {v} days.", "zh": "{p}赎回后{v}天到账。"}),
        Attribute("minimum", "the smallest amount one can invest (minimum purchase), in yuan",
                  {"en": "The minimum investment in {p} is {v} yuan.", "zh": "{p}的起购金额是{v}元。"}),
        Attribute("lockup", "the lock-up: how many days the money must stay in before it may be taken out",
                  {"en": "{p} has a lock-up period of {v} days.", "zh": "{p}的锁定期是{v}天。"}),
        Attribute("target", "the target (expected, benchmark) annual return, in percent",
                  {"en": "The target annual return of {p} is {v}.", "zh": "{p}的目标年化收益率是{v}。"}),
    ],
    "customer_service": [
        Attribute("hotline", "the telephone number (hotline) to call about the card or account",
                  {"en": "The hotline for {p} is {v}.", "zh": "{p}的客服电话是{v}。"}),
        Attribute("limit", "the daily transfer limit: the most money one can transfer out in a day, in yuan",
                  {"en": "The daily transfer limit of {p} is {v} yuan.", "zh": "{p}的每日转账限额是{v}元。"}),
        Attribute("annual", "the yearly fee for keeping the card or account (annual fee), in yuan",
                  {"en": "The annual fee of {p} is {v} yuan.", "zh": "{p}的年费是{v}元。"}),
        Attribute("replace", "the cost of a replacement after losing the card or passbook (reissue fee), in yuan",
                  {"en": "Replacing a lost {p} costs {v} yuan.", "zh": "{p}丢失后补办要收{v}元。"}),
        Attribute("complaint", "the days within which a complaint about it is answered",
                  {"en": "A complaint about {p} is answered within {v} days.", "zh": "关于{p}的投诉会在{v}天内答复。"}),
        Attribute("opening", "the time it takes to open or activate it, in minutes",
                  {"en": "Opening {p} takes {v} minutes.", "zh": "开通{p}需要{v}分钟。"}),
    ],
}  # fmt: skip

SCENARIOS = tuple(KINDS)


def products() -> list[Product]:
    """All 54 products, in a fixed order: 18 per scenario, 3 per kind."""
    out = []
    for scenario, kinds in KINDS.items():
        names = list(kinds)
        for index, (en, zh) in enumerate(FIRST_NAMES[scenario]):
            kind = names[index % len(names)]
            label = kinds[kind]
            full = {"en": f"{en} {label['en']}", "zh": f"{zh}{label['zh']}"}
            out.append(Product(scenario, kind, {"en": en, "zh": zh}, full))
    return out


def _percent(rng: random.Random, low: int, high: int) -> str:
    return f"{rng.randint(low, high) / 100:.2f}%"


def _value(key: str, rng: random.Random) -> str:
    ranges: dict[str, str] = {
        "rate": _percent(rng, 310, 980),
        "amount": str(rng.randint(3, 200) * 5000),
        "term": str(rng.randint(4, 60) * 6),
        "early_fee": _percent(rng, 20, 300),
        "income": str(rng.randint(25, 150) * 100),
        "approval": str(rng.randint(1, 15)),
        "risk": f"R{rng.randint(1, 5)}",
        "fee": _percent(rng, 15, 190),
        "redeem": str(rng.randint(1, 9)),
        "minimum": str(rng.randint(1, 90) * 100 + 50),
        "lockup": str(rng.randint(3, 72) * 5 + 2),
        "target": _percent(rng, 180, 890),
        "hotline": f"95{rng.randint(300, 999)}-{rng.randint(1, 9)}",
        "limit": str(rng.randint(5, 95) * 1000 + 500),
        "annual": str(rng.randint(1, 60) * 5 + 3),
        "replace": str(rng.randint(4, 60)),
        "complaint": str(rng.randint(2, 20)),
        "opening": str(rng.randint(3, 59)),
    }
    return ranges[key]


def fact_table() -> dict[tuple[str, str], str]:
    """``(English product name, attribute key) -> value``, the same on every machine and run."""
    rng = random.Random(FACT_SEED)
    return {
        (product.name["en"], attribute.key): _value(attribute.key, rng)
        for product in products()
        for attribute in ATTRIBUTES[product.scenario]
    }
