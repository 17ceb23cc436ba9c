"""What quantising costs: how far the next-token distributions move from the full-precision model's.

The text is ``quantization_text.txt`` of the model folder if there is one (models of one domain say little
about any other text), else the paragraphs below. Blank lines separate texts, each is read from its own
beginning.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from moe_runtime.batch import Batch
from moe_runtime.checkpoint import open_regular
from moe_runtime.errors import CheckpointError
from moe_runtime.layers.decoder import Decoder
from moe_runtime.model_config import ModelConfig
from moe_runtime.quant.recipe import Recipe
from moe_runtime.tokenizer import Tokenizer

TEXT_FILE = "quantization_text.txt"
MAX_TEXT_BYTES = 1 << 20
MAX_TOKENS = 512  # of all texts together
BLOCK_SIZE = 64
TEXT = """\
A bank lends money that others have deposited with it, and lives on the difference between the interest it
pays and the interest it earns. When many depositors want their money on the same day, even a sound bank can
run short of cash; this is why central banks lend to banks, and why deposits are insured up to a certain
amount.

商业银行吸收存款、发放贷款，利差是其主要收入来源。贷款发放以后，银行会定期检查借款人的还款能力和抵押物的价值。如果借款人连续三个月没有按时
还款，这笔贷款通常会被划为不良贷款，银行需要为可能的损失提取准备金。

Le train de huit heures est parti sans nous, alors nous avons pris un café en attendant le suivant. Il
pleuvait doucement sur les toits, et personne ne semblait pressé.

Question: A fund charges 0.6% a year. What does holding 20,000 for 9 months cost?
Answer: 20,000 x 0.006 x 9 / 12 = 90. So holding it for nine months costs 90.

def median(values):
    values = sorted(values)
    middle = len(values) // 2
    if len(values) % 2:
        return values[middle]
    return (values[middle - 1] + values[middle]) / 2
"""
logger = logging.getLogger("moe_runtime.quant")


@dataclass(frozen=True)
class Divergence:
    """Over ``num_tokens`` positions: KL(full || quantised) in nats, its mean and its largest, and the share
    of positions whose most likely token is the same.
    """

    kl: float
    largest_kl: float
    top1: float
    num_tokens: int


def text_ids(model_dir: Path, tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of the texts to compare on, at least two each. Raises CheckpointError."""
    path = model_dir / TEXT_FILE
    text = _read_text(path) if path.exists() else TEXT
    left, texts = MAX_TOKENS, []
    for paragraph in text.split("\n\n"):
        if left < 2:
            break
        ids = tokenizer.encode(paragraph.strip("\n"), add_special_tokens=True)[:left]
        if len(ids) > 1:
            texts.append(ids)
            left -= len(ids)
    if not texts:
        raise CheckpointError("holds no text of two tokens or more", file=path.name)
    return texts


def _read_text(path: Path) -> str:
    try:
        with open_regular(path) as file:
            data = file.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            raise CheckpointError(
                f"larger than {MAX_TEXT_BYTES} bytes; shorten it, only {MAX_TOKENS} tokens are compared",
                file=path.name,
            )
        return data.decode("utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", file=path.name) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"not UTF-8 at byte {error.start} ({error.reason}); save it as UTF-8", file=path.name
        ) from error


def require_full_precision(config: ModelConfig, what: str, remedy: str) -> None:
    """Raises CheckpointError for a checkpoint that ``what`` has nothing to compare with."""
    if config.int4 is not None:
        raise CheckpointError(
            f"quantization_config: the weights were published in 4 bits ({config.int4.method}), so there is "
            f"no full-precision model for {what} to compare with; {remedy}",
            file="config.json",
        )


def log_probabilities(model: Decoder, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """float32 [len(text), V] each."""
    result = []
    for ids in texts:
        num_blocks = -(-len(ids) // BLOCK_SIZE)
        positions = torch.arange(len(ids))
        batch = Batch(
            token_ids=torch.tensor(ids),
            positions=positions.int(),
            slots=positions,
            sequence_rows=torch.zeros(len(ids), dtype=torch.int32),
            block_tables=torch.arange(num_blocks, dtype=torch.int32).unsqueeze(0),
            logit_rows=positions,
            # Before the engine lends mask rows out, each allows all experts that are there.
            mask_rows=torch.zeros(len(ids), dtype=torch.int32),
        )
        result.append(model.forward(batch, model.new_cache(num_blocks, BLOCK_SIZE)).log_softmax(-1))
    return result


def compare(full: Sequence[torch.Tensor], other: Sequence[torch.Tensor]) -> Divergence:
    """Log probabilities of the same texts by two models."""
    divergences = torch.cat([(a.exp() * (a - b)).sum(-1) for a, b in zip(full, other, strict=True)])
    same = torch.cat([a.argmax(-1) == b.argmax(-1) for a, b in zip(full, other, strict=True)])
    return Divergence(
        kl=float(divergences.mean()),
        largest_kl=float(divergences.max()),
        top1=float(same.float().mean()),
        num_tokens=len(divergences),
    )


@dataclass
class Gate:
    """Refuses a model that quantising changed by more than ``limit`` (mean KL in nats).

    Call ``prepare``, ``measure``, ``check`` in this order.
    """

    limit: float
    texts: Sequence[Sequence[int]]
    _full: list[torch.Tensor] = field(default_factory=list, init=False)
    _known: dict[str, Any] | None = field(default=None, init=False)

    @classmethod
    def choose(
        cls, limit: float | None, recipe: Recipe, config: ModelConfig, model_dir: Path, tokenizer: Tokenizer
    ) -> "Gate | None":
        """The gate that --max-quant-kl asks for, None when it asks for none. Raises CheckpointError."""
        if limit is None:
            return None
        remedy = "leave it out, or quantise the full-precision checkpoint with --quantize"
        require_full_precision(config, f"--max-quant-kl {limit:g}", remedy)
        if not recipe.formats:
            logger.warning("--max-quant-kl %g has nothing to do: without --quantize no weight changes", limit)
            return None
        return cls(limit, text_ids(model_dir, tokenizer))

    def prepare(self, known: Any, load_full: Callable[[], Decoder]) -> None:
        """Before the quantised model is there: ``known`` is what an earlier ``measure`` of this very model
        gave, else the full model is loaded, asked and given up, so that the two never share the memory.
        Raises CheckpointError when ``known`` is above the limit.
        """
        if self._fits(known):
            self._known = known
            self.check(known)
        else:
            self._full = log_probabilities(load_full(), self.texts)

    def measure(self, model: Decoder) -> dict[str, Any]:
        """The divergence as plain JSON."""
        if self._known is not None:
            return self._known
        divergence = compare(self._full, log_probabilities(model, self.texts))
        self._full = []
        return {**asdict(divergence), "texts": self._digest()}

    def check(self, found: Mapping[str, Any]) -> None:
        """Raises CheckpointError when ``found`` by ``measure`` is above the limit."""
        if not found["kl"] <= self.limit:
            raise CheckpointError(
                "quantising moves the next-token distributions by a KL divergence of "
                f"{found['kl']:.4f} on average (over {found['num_tokens']} tokens; {found['top1']:.1%} of "
                "the likeliest tokens stay), above "
                f"--max-quant-kl {self.limit:g}; choose finer formats with --quantize (int8, a smaller "
                "--quantize-group, --quantize-zeros) or raise the limit"
            )

    def _fits(self, known: Any) -> bool:
        """Whether ``known`` was measured on these texts, by a program that measured what this one does."""
        if not isinstance(known, dict) or known.get("texts") != self._digest():
            return False
        return all(isinstance(known.get(name), int | float) for name in ("kl", "top1", "num_tokens"))

    def _digest(self) -> str:
        return hashlib.sha256(repr([list(ids) for ids in self.texts]).encode()).hexdigest()
