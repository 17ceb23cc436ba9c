"""The vLLM side of peers.py: its engine with a request per sequence; runs in its own environment.

vLLM decides itself what it feeds back, so decode samples at temperature 1 without a seed: over the logits of
random weights that is close to uniform, and no token repeats often enough to keep its experts in cache.
"""

import os
import time
from typing import Any

import torch
import vllm
from vllm import LLM, SamplingParams
from worker import arguments, serve  # type: ignore[import-not-found]

ENVIRONMENT = ("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", "LD_PRELOAD")


class Vllm:
    """Prefix caching is off, so a prompt's cost is never saved by an earlier one."""

    def __init__(self, options: dict[str, Any]) -> None:
        flags: dict[str, Any] = {
            "dtype": "bfloat16",
            "max_model_len": 1024,
            "max_num_seqs": 16,
            "max_num_batched_tokens": 2048,
            "enable_prefix_caching": False,
            "enforce_eager": options["eager"],
            "skip_tokenizer_init": True,
            "distributed_executor_backend": "mp",
        }
        self.engine = LLM(model=str(options["folder"]), **flags).llm_engine
        from vllm.platforms import current_platform

        if options["zen"] != current_platform.is_zen_cpu():
            raise SystemExit(f"asked for zentorch: {options['zen']}, vLLM took {current_platform!r}")
        self.info = {
            "version": vllm.__version__,
            "torch": torch.__version__,
            "platform": type(current_platform).__name__,
            "zentorch": options["zen"],
            "flags": flags | {
                name: os.path.basename(os.environ.get(name, "")) for name in ENVIRONMENT
            },
        }  # fmt: skip
        self.requests = 0

    def _add(self, tokens: list[int], answer: int) -> None:
        params = SamplingParams(temperature=1.0, max_tokens=answer, ignore_eos=True, detokenize=False, n=1)
        self.requests += 1
        self.engine.add_request(str(self.requests), {"prompt_token_ids": tokens}, params)

    def prefill(self, tokens: list[int]) -> float:
        start = time.perf_counter()
        self._add(tokens, 1)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], steps: list[list[int]]) -> list[float]:
        for tokens in prompts:
            self._add(tokens, len(steps) + 4)  # prompts may start in different steps
        seconds: list[float] = []
        last: float | None = None
        lengths: dict[str, int] = {}
        while self.engine.has_unfinished_requests():
            grown = 0
            for output in self.engine.step():
                length = len(output.outputs[0].token_ids)
                if lengths.get(output.request_id, 0):
                    grown += length == lengths[output.request_id] + 1
                lengths[output.request_id] = length
            now = time.perf_counter()
            full = grown == len(prompts)
            if full and last is not None and len(seconds) < len(steps):
                seconds.append(now - last)
            last = now if full else None
        return seconds


if __name__ == "__main__":
    serve(lambda: Vllm(arguments()))
