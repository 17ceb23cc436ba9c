"""Makes moe_runtime importable on a bare machine: no pip, no index, only cmake, ninja and pybind11.

The C++ extension is built into a temporary folder; beside it a package is laid out as the wheel would be,
with links into this repository, and PYTHONPATH points there.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Where the extension does not build, the GPU's kernels can still be measured: the package asks the extension
# for its instruction sets when it is imported, and gets an honest "none".
SUBSTITUTE = '''"""Stands in for a C++ extension that could not be built: importable, refuses every call."""


def supported_isas():
    return []


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*arguments, **options):
        raise RuntimeError(f"the C++ extension could not be built on this machine: no {name}")

    return refuse
'''


def start_build(folder: Path) -> subprocess.Popen[str]:
    """CMake and ninja, in the background; the log in ``folder``/build.log."""
    folder.mkdir(parents=True, exist_ok=True)
    build = folder / "build"
    # A virtual environment's tools may not be on PATH.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=path) or "cmake"
    pybind11 = _answer([sys.executable, "-m", "pybind11", "--cmakedir"])
    configure = [
        cmake, "-S", str(ROOT / "csrc"), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
        f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}",
    ]  # fmt: skip
    script = 'log="$1"; shift; build="$1"; shift; "$@" >"$log" 2>&1 && "$1" --build "$build" >>"$log" 2>&1'
    return subprocess.Popen(
        ["sh", "-c", script, "sh", str(folder / "build.log"), str(build), *configure],
        env={**os.environ, "PATH": path},
        text=True,
        start_new_session=True,
    )


def _answer(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def lay_out(folder: Path) -> tuple[Path, str]:
    """The folder for PYTHONPATH, and what the extension is: its file's name, or why there is none."""
    package = folder / "site" / "moe_runtime"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for part in sorted((ROOT / "moe_runtime").iterdir()):
        if part.name != "__pycache__" and part.suffix != ".so":
            (package / part.name).symlink_to(part)
    for part in ("experts", "server"):
        (package / part).symlink_to(ROOT / part)
    built = sorted((folder / "build").glob("_C*.so"))
    if built:
        (package / built[0].name).symlink_to(built[0])
        return package.parent, built[0].name
    (package / "_C.py").write_text(SUBSTITUTE)
    log = folder / "build.log"
    last = log.read_text(errors="replace").strip().splitlines()[-5:] if log.exists() else ["not built"]
    return package.parent, "not built: " + " | ".join(last)
