"""The transformers side of peers.py, bfloat16; runs in its own environment."""

import time
from typing import Any

import torch
import transformers
from worker import arguments, serve  # type: ignore[import-not-found]


class Transformers:
    """A dynamic cache and SDPA attention; ``experts`` is grouped_mm or eager."""

    def __init__(self, options: dict[str, Any]) -> None:
        torch.set_num_threads(options["threads"])
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            options["folder"],
            dtype=torch.bfloat16,
            local_files_only=True,
            experts_implementation=options["experts"],
        ).eval()
        self.cache: Any = None
        self.info = {
            "version": transformers.__version__,
            "torch": torch.__version__,
            "flags": {
                "dtype": "bfloat16",
                "experts_implementation": options["experts"],
                "attn_implementation": self.model.config._attn_implementation,
                "torch threads": torch.get_num_threads(),
                "mode": "inference_mode, dynamic cache, logits_to_keep=1",
            },
            "torch cpu capability": torch.backends.cpu.get_cpu_capability(),
        }

    @torch.inference_mode()
    def _forward(self, tokens: list[list[int]]) -> None:
        out = self.model(
            input_ids=torch.tensor(tokens), past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        self.cache = out.past_key_values
        out.logits[:, -1].argmax(-1)

    def prefill(self, tokens: list[int]) -> float:
        self.cache = None
        start = time.perf_counter()
        self._forward([tokens])
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], steps: list[list[int]]) -> list[float]:
        self.cache = None
        self._forward(prompts)
        seconds = []
        for tokens in steps:
            start = time.perf_counter()
            self._forward([[token] for token in tokens])
            seconds.append(time.perf_counter() - start)
        return seconds


if __name__ == "__main__":
    serve(lambda: Transformers(arguments()))
