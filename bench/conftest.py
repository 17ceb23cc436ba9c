"""Options of bench/kernels.py, its rows, and where they are printed and kept. Also lets the files here
import each other, as they do when they are run as scripts.
"""

import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parent))

from common import RESULTS, machine  # noqa: E402
from kernels_cases import DEFAULT_TOKENS, FORMATS, LAYERS, TOKENS, Selection  # noqa: E402
from kernels_report import line, save  # noqa: E402

import moe_runtime._C as _C  # noqa: E402

MODELS = "qwen3: Qwen3-30B-A3B, olmoe: OLMoE-1B-7B, deepseek: DeepSeek-V2-Lite, mixtral: Mixtral-8x7B"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kernels", "rows of bench/kernels.py; lists are comma-separated")
    group.addoption("--shapes", help=f"layers of models, or all; {MODELS} (default qwen3)")
    group.addoption("--formats", help=f"of weights: {', '.join(FORMATS)} (default all)")
    group.addoption("--tokens", help=f"numbers (default {','.join(map(str, DEFAULT_TOKENS))})")
    group.addoption("--threads", help="numbers, or all: as many as the machine allows (default all)")
    group.addoption("--isa", help="instruction sets, best or all (default best)")
    group.addoption(
        "--full",
        action="store_true",
        help=f"every shape and ISA, 1 and all threads, tokens {','.join(map(str, TOKENS))}: hours",
    )
    group.addoption("--compare", action="store_true", help="alternate with torch in bf16")
    group.addoption("--working-set", type=float, default=2.0, help="GB that weights rotate over (default 2)")
    group.addoption("--results", type=Path, default=RESULTS / "kernels.json", help="the JSON file")


def _choices(config: pytest.Config, option: str, known: tuple[str, ...], default: str) -> tuple[str, ...]:
    text = config.getoption(option) or ("all" if config.getoption("full") else default)
    names = known if text == "all" else tuple(text.split(","))
    if unknown := [name for name in names if name not in known]:
        raise pytest.UsageError(
            f"--{option} {unknown[0]}: unknown, expected all or some of {','.join(known)}"
        )
    return names


def _numbers(option: str, text: str) -> tuple[int, ...]:
    if not all(part.isdecimal() and int(part) > 0 for part in text.split(",")):
        raise pytest.UsageError(f"--{option} {text}: expected numbers above 0, separated by commas")
    return tuple(int(part) for part in text.split(","))


def _selection(config: pytest.Config) -> Selection:
    full = config.getoption("full")
    tokens = config.getoption("tokens") or ",".join(map(str, TOKENS if full else DEFAULT_TOKENS))
    most = str(_C.num_threads())
    threads = (config.getoption("threads") or ("1,all" if full else "all")).replace("all", most)
    isas = tuple(_C.supported_isas())
    chosen = config.getoption("isa") or ("all" if full else "best")
    return Selection(
        layers=_choices(config, "shapes", tuple(LAYERS), "qwen3"),
        formats=_choices(config, "formats", tuple(FORMATS), "all"),
        tokens=_numbers("tokens", tokens),
        threads=tuple(dict.fromkeys(_numbers("threads", threads))),
        isas=isas[:1] if chosen == "best" else _choices(config, "isa", isas, "all"),
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", list(_selection(metafunc.config).cases()), ids=str)


@pytest.fixture(scope="session")
def record_row(pytestconfig: pytest.Config) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Prints each row as it comes; keeps all of them in the JSON file, also when the run is cut short."""
    rows: list[dict[str, Any]] = []
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def record(row: dict[str, Any]) -> None:
        rows.append(row)
        with capture.global_and_fixture_disabled():
            print(line(row), flush=True)

    arguments = [str(argument) for argument in pytestconfig.invocation_params.args]
    about = {**machine(), "command": shlex.join(["python", "-m", "pytest", *arguments])}
    with capture.global_and_fixture_disabled():
        print("".join(f"\n{name}: {value}" for name, value in about.items()), flush=True)
    yield record
    if rows:
        save(pytestconfig.getoption("results"), about, rows)
        with capture.global_and_fixture_disabled():
            print(f"\n{len(rows)} rows in {pytestconfig.getoption('results')}")


@pytest.hookimpl(tryfirst=True)
def pytest_report_teststatus(report: pytest.TestReport) -> tuple[str, str, str] | None:
    """A row says more than a dot."""
    return ("passed", "", "") if report.when == "call" and report.passed else None
