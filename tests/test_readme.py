"""The README's shell lines, typed as written, against a server that serves the bundled demo model."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from scenario_files import write_scenario

from moe_runtime.plan import ExpertMask, LayerMask

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ADDRESS = "127.0.0.1:8000"
MODEL = ROOT / "experts" / "demo" / "model"
# By layer what the README's `moe-experts plan` keeps for credit, of 20 experts; planning again takes minutes.
CREDIT = (
    (1, 7, 9, 10, 11, 14, 16, 17),
    (2, 3, 4, 6, 7, 9, 10, 11, 12, 16, 18, 19),
    (0, 11, 13, 16, 18, 19),
    (4, 6, 7, 9, 10, 12, 13, 14, 15, 16, 17, 19),
)


def _curl_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line for line in joined.splitlines() if line.startswith("curl ")]


def _python_block() -> str:
    return next(
        block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "OpenAI(" in block
    )


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The demo with its credit scenario, as the README's last step before its curl lines serves it."""
    scenarios = tmp_path_factory.mktemp("scenarios")
    mask = ExpertMask(tuple(LayerMask(layer, 20, kept) for layer, kept in enumerate(CREDIT)))
    write_scenario(scenarios, MODEL, "credit", mask)
    command = [sys.executable, "-m", "moe_runtime.server", "--port", "0", "--scenario-dir", str(scenarios)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        ready = re.search(r"http://(127\.0\.0\.1:\d+)/v1", server.stdout.readline())
        assert ready, "the server did not say that it is ready"
        yield ready[1]
        server.terminate()
        assert server.wait(timeout=30) == 0


def test_the_readme_shows_curl_lines() -> None:
    assert len(_curl_commands()) >= 4


@pytest.mark.parametrize("command", _curl_commands())
def test_each_curl_line_of_the_readme_is_answered(command: str, address: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    words = shlex.split(command.replace(ADDRESS, address))
    answer = subprocess.run(
        [*words, "--fail-with-body"], capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert answer.stdout.strip()
    if "Harbor Consumer Loan" in command:  # the fact the README says it shows
        assert "8.93" in answer.stdout.replace('"', "").replace("\\", ""), answer.stdout


def test_the_python_example_of_the_readme_prints_an_answer(address: str) -> None:
    script = _python_block().replace(ADDRESS, address)
    answer = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert "%" in answer.stdout, answer.stdout
