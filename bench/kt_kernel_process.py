"""kt-kernel in an environment and a process of its own, for versus_kt_kernel.py."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KT_KERNEL, GGUF = "0.7.2", "0.19.0"


def environment(work: Path) -> Path:
    """The python of an environment with kt-kernel, without the CUDA build of torch that it asks for."""
    folder = work / "kt-kernel"
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        constraints = HERE.parent / "constraints.txt"
        subprocess.run([*install, "-c", constraints, "torch", "numpy", "safetensors", "pyyaml"], check=True)
        subprocess.run([*install, "--no-deps", f"kt-kernel=={KT_KERNEL}", f"gguf=={GGUF}"], check=True)
        (folder / ".ready").touch()
    return python


class KtKernel:
    """A process with kt-kernel, stopped except while it answers, as its idle workers spin."""

    def __init__(self, python: Path, folder: Path, order: dict[str, Any]) -> None:
        self.log = folder / f"{order['backend']}-{order['workers']}.log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [python, HERE / "kt_kernel_worker.py", json.dumps({**order, "folder": str(folder)})],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip
        self.variant = self._answer()["variant"]

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"kt-kernel ended with exit code {self._process.wait()}; see {self.log}")
        self._process.send_signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.send_signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
