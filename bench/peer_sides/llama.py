"""The llama.cpp side of peers.py, through llama-cpp-python's C API and llama.cpp's own batches.

The high-level class of llama-cpp-python serves one sequence at a time, so it is not used.
"""

import ctypes
import time
from typing import Any

import llama_cpp
import numpy as np
from worker import arguments, serve  # type: ignore[import-not-found]

MAX_SEQUENCES = 16
CONTEXT_PER_SEQUENCE = 1024


class LlamaCpp:
    """One context with a KV stream per sequence; the library says in ``log`` where it put the weights."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.log: list[str] = []
        self._callback = llama_cpp.llama_log_callback(
            lambda _level, text, _data: self.log.append(text.decode())
        )
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        model_params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(options["folder"]).encode(), model_params)
        if not self.model:
            raise SystemExit("".join(self.log))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = MAX_SEQUENCES * CONTEXT_PER_SEQUENCE
        params.n_batch = params.n_ubatch = 2048
        params.n_seq_max = MAX_SEQUENCES
        params.n_threads = params.n_threads_batch = options["threads"]
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise SystemExit("".join(self.log))
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(2048, 0, 1)
        self.info = self._describe(params)
        if not options["avx512"] and "AVX512" in self.info["system_info"]:
            raise SystemExit(f"not the AVX2 build: {self.info['system_info']}")

    def _describe(self, params: Any) -> dict[str, Any]:
        placed = [line.strip() for line in "".join(self.log).splitlines() if "buffer size" in line]
        return {
            "version": f"llama-cpp-python {llama_cpp.__version__}",
            "system_info": llama_cpp.llama_print_system_info().decode().strip(),
            "model": self._text(llama_cpp.llama_model_desc),
            "weight_bytes": llama_cpp.llama_model_size(self.model),
            "parameters": llama_cpp.llama_model_n_params(self.model),
            "buffers": placed,
            "flags": {
                name: getattr(params, name)
                for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_threads", "n_threads_batch",
                             "flash_attn_type", "type_k", "type_v", "kv_unified")
            } | {"load_mode": "auto (mmap)", "use_extra_bufts (repack)": True},
        }  # fmt: skip

    def _text(self, function: Any) -> str:
        buffer = ctypes.create_string_buffer(256)
        function(self.model, buffer, 256)
        return buffer.value.decode()

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> None:
        """One llama_decode of (token, position, sequence, logits wanted), and argmax of each logits row."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for index, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[index] = token
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = wanted
        code = llama_cpp.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama_decode gives {code}: {''.join(self.log[-5:])}")
        for index, row in enumerate(rows):
            if row[3]:
                logits = llama_cpp.llama_get_logits_ith(self.context, index)
                np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax()

    def _prompts(self, prompts: list[list[int]]) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self._decode(
            [
                (token, position, sequence, position == len(tokens) - 1)
                for sequence, tokens in enumerate(prompts)
                for position, token in enumerate(tokens)
            ]
        )

    def prefill(self, tokens: list[int]) -> float:
        start = time.perf_counter()
        self._prompts([tokens])
        return time.perf_counter() - start

    def decode(self, prompts: list[list[int]], steps: list[list[int]]) -> list[float]:
        length = len(prompts[0])
        self._prompts(prompts)
        seconds = []
        for index, tokens in enumerate(steps):
            start = time.perf_counter()
            self._decode([(token, length + index, row, True) for row, token in enumerate(tokens)])
            seconds.append(time.perf_counter() - start)
        return seconds


if __name__ == "__main__":
    serve(lambda: LlamaCpp(arguments()))
