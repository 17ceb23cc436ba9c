"""The package installs as one distribution: engine, experts, server, extension."""

import importlib
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = (
    "moe_runtime",
    "moe_runtime.experts",
    "moe_runtime.server",
    "moe_runtime.server.app",
    "moe_runtime._C",
)
# Where each package of the wheel lies in the repository, as pyproject.toml has it.
FOLDERS = {"moe_runtime": "moe_runtime", "moe_runtime/experts": "experts", "moe_runtime/server": "server"}
FOREIGN = {"tests", "bench", "csrc", "build", "control", "demo_control", "__pycache__"}

IMPORT_FROM = """
import importlib, sys
wheel, libraries, *names = sys.argv[1:]
sys.path[:0] = [wheel]
sys.path.append(libraries)
for name in names:
    file = importlib.import_module(name).__file__
    assert file.startswith(wheel), file
"""


def test_the_parts_and_the_extension_import_under_one_name() -> None:
    for name in NAMES:
        assert importlib.import_module(name).__name__ == name


@pytest.mark.slow
def test_a_wheel_holds_all_that_runs_and_nothing_else(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path)
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        archive.extractall(tmp_path / "unpacked")

    assert {name.split("/")[0] for name in names} == {"moe_runtime", "moe_runtime-0.1.0.dist-info"}
    assert not [name for name in names if FOREIGN & set(name.split("/"))]
    extensions = [name for name in names if name.endswith(".so")]
    assert [name.split(".")[0] for name in extensions] == ["moe_runtime/_C"]
    assert sources_in_the_repository() - names == set()
    assert "moe_runtime/server/app.py" in names
    if (ROOT / "experts" / "demo" / "model").exists():
        assert "moe_runtime/experts/demo/model/model.safetensors" in names
    import_from(tmp_path / "unpacked", outside=tmp_path)


def build_wheel(folder: Path) -> Path:
    """Build with the tools of this environment, asking no index, beside the checkout's own build folder."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-index"]
    command += ["--no-build-isolation", "--no-deps", "--wheel-dir", str(folder)]
    command += ["--config-settings", f"build-dir={folder / 'build'}", str(ROOT)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    [wheel] = folder.glob("*.whl")
    return wheel


def sources_in_the_repository() -> set[str]:
    """Tracked Python files of the three packages, by their names in the wheel."""
    listing = subprocess.run(["git", "ls-files", *FOLDERS.values()], cwd=ROOT, capture_output=True, text=True)
    tracked = [
        name for name in listing.stdout.splitlines() if name.endswith(".py") and (ROOT / name).exists()
    ]
    packages = {folder: package for package, folder in FOLDERS.items()}
    return {f"{packages[name.split('/')[0]]}/{name.split('/', 1)[1]}" for name in tracked}


def import_from(unpacked: Path, *, outside: Path) -> None:
    """Import every part in an interpreter that sees ``unpacked`` and the libraries alone: without ``site`` it
    reads no .pth files, so the editable install of the checkout cannot help.
    """
    libraries = sysconfig.get_paths()["purelib"]
    command = [sys.executable, "-I", "-S", "-c", IMPORT_FROM, str(unpacked), libraries, *NAMES]
    done = subprocess.run(command, cwd=outside, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
