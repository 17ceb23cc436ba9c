"""Batched greedy decoding with the training network: thousands of questions in minutes on two cores."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from moe_runtime.experts.demo import tokens
from moe_runtime.experts.demo.network import Network, Routing

BATCH = 128
LONGEST_ANSWER = 72
BLOCKED = -1e9

Turns = Sequence[tuple[str, str]]


def greedy(
    network: Network, tokenizer: Tokenizer, dialogues: Sequence[Turns], keep: Tensor | None = None
) -> list[str]:
    """The assistant's next turn for each dialogue; ``keep`` [layers, E] leaves only some experts."""
    prompts = [tokenizer.encode(tokens.render(d, generation_prompt=True)).ids for d in dialogues]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    out = [""] * len(prompts)
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        for index, ids in zip(
            chosen, _answers(network, tokenizer, [prompts[i] for i in chosen], keep), strict=True
        ):
            out[index] = tokenizer.decode(ids)
    return out


@torch.inference_mode()
def _answers(
    network: Network, tokenizer: Tokenizer, prompts: list[list[int]], keep: Tensor | None
) -> list[list[int]]:
    pad, end = tokens.token_id(tokenizer, tokens.PAD), tokens.token_id(tokenizer, tokens.END)
    length = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[pad] * (length - len(p)) + p for p in prompts])
    real = torch.tensor([[False] * (length - len(p)) + [True] * len(p) for p in prompts])
    past: list[list[Tensor]] = [[] for _ in range(network.shape.layers)]
    # Left padding: rotary positions are relative, so only the mask has to know. A padding row sees itself.
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    allowed = (causal & real.unsqueeze(1)) | torch.eye(length, dtype=torch.bool)
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, BLOCKED).unsqueeze(1)
    answers: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for _ in range(LONGEST_ANSWER):
        hidden = network(ids, Routing(keep=keep), mask, past)
        chosen = network.logits(hidden[:, -1]).argmax(-1)
        for row, token in enumerate(chosen.tolist()):
            done[row] = done[row] or token in (end, pad)
            if not done[row]:
                answers[row].append(token)
        if all(done):
            break
        ids = chosen.unsqueeze(1)
        real = torch.cat((real, torch.ones(len(prompts), 1, dtype=torch.bool)), dim=1)
        mask = torch.zeros(real.shape).masked_fill(~real, BLOCKED)[:, None, None]
    return answers


@torch.inference_mode()
def gate_mass(network: Network, tokenizer: Tokenizer, dialogues: Sequence[Turns]) -> Tensor:
    """[layers, E]: the gate weight each expert received over the dialogues' tokens."""
    pad = tokens.token_id(tokenizer, tokens.PAD)
    total = [torch.zeros(network.shape.experts) for _ in range(network.shape.layers)]
    rows = sorted((tokenizer.encode(tokens.render(d)).ids for d in dialogues), key=len)
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        length = len(part[-1])
        ids = torch.tensor([row + [pad] * (length - len(row)) for row in part])
        network(ids, Routing(real=ids != pad, gate_mass=total))
    return torch.stack(total)
