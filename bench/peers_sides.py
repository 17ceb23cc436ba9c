"""Who is compared with whom: every side of peers.py as a command with its environment, and the groups.

A side is one engine with one format of weights. A group is what fits into memory together and is alternated.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers_environments as environments  # type: ignore[import-not-found]

GGUF_OF = {"bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0", "q4_k": "Q4_K_S"}


@dataclass(frozen=True)
class Bits:
    """Stored bits per weight, scales included: what a step has to read."""

    layers: float  # attention and experts
    head: float
    router: float


# Ours: the router in the checkpoint's bfloat16, a float32 scale per row, for int4 a float16 scale per group.
# llama.cpp's default files: the router in float32, and the head of the 4-bit ones in Q6_K.
BITS = {
    "bf16": Bits(16.0, 16.0, 16.0),
    "int8": Bits(8.02, 8.02, 16.0),
    "int4": Bits(4.14, 4.14, 16.0),
    "int4-g32": Bits(4.52, 4.52, 16.0),
    "llama bf16": Bits(16.0, 16.0, 32.0),
    "llama q8_0": Bits(8.5, 8.5, 32.0),
    "llama q4_0": Bits(4.5, 6.5625, 32.0),
    "llama q4_k": Bits(4.5, 6.5625, 32.0),
}
# int4 has 128 weights per scale; int4-g32 has 32, as many as llama.cpp's formats.
GROUPS = {
    "bf16": ["transformers-grouped_mm", "llama-bf16", "ours-bf16"],
    "bf16-eager": ["transformers-eager", "ours-bf16"],
    "vllm": ["vllm-bf16", "ours-bf16", "ours-int8", "ours-int4"],
    "vllm-zen": ["vllm-zen-bf16", "ours-bf16"],
    "int8": ["llama-q8_0", "ours-int8"],
    "int4": ["llama-q4_0", "llama-q4_k", "ours-int4", "ours-int4-g32"],
    "avx2": ["llama-avx2-q4_0", "llama-avx2-q4_k", "ours-avx2-int4", "ours-avx2-int4-g32"],
}
HTTP_GROUPS = {
    "http-int4": ["vllm-bf16", "llama-q4_0", "llama-q4_k", "ours-int4"],
    "http-int8": ["vllm-bf16", "llama-q8_0", "ours-int8"],
    "http-bf16": ["vllm-bf16", "llama-bf16", "ours-bf16"],
}


@dataclass(frozen=True)
class Place:
    """What every side needs to know: the checkpoint, the work folder, threads and compile jobs."""

    checkpoint: Path
    work: Path
    threads: int
    jobs: int


@dataclass(frozen=True)
class Side:
    """A way to start an engine; the ``bits`` of its weights give its memory bound."""

    name: str
    command: list[str]
    environment: dict[str, str]
    bits: Bits

    @property
    def ours(self) -> bool:
        return self.name.startswith("ours")


def offline_child(name: str, place: Place) -> Side:
    """The side as a process of peer_sides/ that takes orders; its environment is made if it is not there."""
    engine, _, rest = name.partition("-")
    options: dict[str, Any] = {"folder": str(place.checkpoint), "threads": place.threads}
    variables = {"OMP_NUM_THREADS": str(place.threads)}
    if engine == "ours":
        python, script = Path(sys.executable), "ours.py"
        rest, extra = _our_variables(rest)
        variables |= extra
        quantize, group = _quantize(rest)
        options |= {"quantize": quantize, "group": group, "packed": str(place.work / "packed")}
    elif engine == "llama":
        python, script = environments.llama_python(place.work, place.jobs), "llama.py"
        build, rest = _llama_build(rest)
        library = str(environments.llama_library(place.work, build))
        variables |= {"LLAMA_CPP_LIB_PATH": library, "LD_LIBRARY_PATH": library}
        options["avx512"] = build == "native"
        options["folder"] = str(_gguf(place, rest))
        rest = f"llama {rest}"
    elif engine == "transformers":
        python, script = environments.transformers_python(place.work), "hf_transformers.py"
        options["experts"], rest = rest, "bf16"
    else:
        python, script = environments.vllm_python(place.work), "vllm_engine.py"
        zen = rest.startswith("zen")
        options |= {"eager": not rest.endswith("compiled"), "zen": zen}
        # The engine in the child itself: every step is then timed where it happens. Workers stay processes.
        variables |= _vllm_variables(place, zen=zen) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        rest = "bf16"
    command = [str(python), str(environments.SIDES / script), json.dumps(options)]
    return Side(name, command, variables, BITS[rest])


def http_server(name: str, place: Place, port: int, served_name: str, streams: int) -> Side:
    """The side as an OpenAI server on ``port``."""
    engine, _, rest = name.partition("-")
    variables = {"OMP_NUM_THREADS": str(place.threads)}
    at = ["--host", "127.0.0.1", "--port", str(port)]
    threads = str(place.threads)
    if engine == "ours":
        rest, extra = _our_variables(rest)
        command = [sys.executable, "-m", "moe_runtime.server", "--model", str(place.checkpoint), *at]
        command += ["--served-model-name", served_name, "--threads", threads]
        command += ["--packed-dir", str(place.work / "packed")]
        quantize, group = _quantize(rest)
        command += ["--quantize", quantize, "--quantize-group", str(group)]
        return Side(name, command, variables | extra, BITS[rest])
    if engine == "llama":
        build, rest = _llama_build(rest)
        environments.llama_python(place.work, place.jobs)
        binary = environments.llama_library(place.work, build) / "llama-server"
        command = [str(binary), "-m", str(_gguf(place, rest)), *at, "--alias", served_name]
        command += ["-t", threads, "-tb", threads, "-np", str(streams), "-c", str(1024 * streams)]
        command += ["-b", "2048", "-ub", "2048", "--no-cache-prompt", "--cache-ram", "0", "--no-ui"]
        return Side(name, command, variables, BITS[f"llama {rest}"])
    program = environments.vllm_python(place.work).parent / "vllm"
    command = [str(program), "serve", str(place.checkpoint), *at, "--served-model-name", served_name]
    command += ["--dtype", "bfloat16", "--max-model-len", "1024", "--max-num-seqs", str(max(16, streams))]
    command += ["--max-num-batched-tokens", "2048", "--no-enable-prefix-caching"]
    command += [] if rest.endswith("compiled") else ["--enforce-eager"]
    variables |= _vllm_variables(place, zen=rest.startswith("zen"))
    return Side(name, command, variables, BITS["bf16"])


def write_packed_file(side: Side) -> None:
    """Start ours once without an order: it ends when the file that the next start maps is written."""
    environment = os.environ | side.environment
    subprocess.run(side.command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, check=True)


def _quantize(rest: str) -> tuple[str, int]:
    kind, _, group = rest.partition("-g")
    return ("none" if kind == "bf16" else kind), int(group or 128)


def _our_variables(rest: str) -> tuple[str, dict[str, str]]:
    if rest.startswith("avx2-"):
        return rest.removeprefix("avx2-"), {"MOE_FORCE_ISA": "avx2"}
    return rest, {}


def _llama_build(rest: str) -> tuple[str, str]:
    return ("avx2", rest.removeprefix("avx2-")) if rest.startswith("avx2-") else ("native", rest)


def _gguf(place: Place, form: str) -> Path:
    name = GGUF_OF[form]
    folder: Path = environments.gguf(place.work, place.checkpoint, place.jobs, *{name} - {"BF16"})
    return folder / f"{name}.gguf"


def _vllm_variables(place: Place, *, zen: bool) -> dict[str, str]:
    """What vLLM's manual recommends for a CPU: bound threads, Intel's OpenMP and tcmalloc preloaded."""
    cpus = sorted(os.sched_getaffinity(0))[: place.threads]
    preload = [str(place.work / "vllm" / "lib" / "libiomp5.so"), environments.tcmalloc()]
    variables = {
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
        "LD_PRELOAD": ":".join(path for path in preload if path),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return variables | ({"PYTHONPATH": str(place.work / "vllm-zentorch")} if zen else {})
