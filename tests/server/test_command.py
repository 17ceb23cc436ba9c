"""``moe-serve`` as a process: its help, its one-line refusals, its ready line, its way to stop."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest
from world import tiny_checkpoint

from moe_runtime.errors import ConfigError

COMMAND = [sys.executable, "-m", "moe_runtime.server"]
SHORT = {"model": "served", "prompt": "a", "max_tokens": 1}
LONG = {"model": "served", "prompt": "a", "max_tokens": 1500, "stream": True, "ignore_eos": True}


def run(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *flags], capture_output=True, text=True, timeout=60, check=False)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), max_position_embeddings=2048)


def test_help_is_instant_because_it_imports_nothing_heavy() -> None:
    code = "import sys; from moe_runtime.server.__main__ import parser; parser(); print(*sys.modules)"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "pydantic", "starlette", "uvicorn"} & set(answer.stdout.split())


def test_help_names_the_knobs() -> None:
    answer = run("--help")
    assert answer.returncode == 0
    for flag in ("--model", "--port", "--max-body-bytes", "--drain-seconds", "--max-context"):
        assert flag in answer.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--no-such-flag"], "--no-such-flag"),
        (["--port", "http"], "--port"),
        (["--port", "70000"], "between 0 and 65535"),
        (["--max-body-bytes", "0"], "--max-body-bytes"),
        (["--header-timeout", "nan"], "--header-timeout"),
        (["--block-size", "7"], "--block-size"),
        (["--model", "/no/such/folder"], "no such folder"),
        (["--model", str(Path(__file__).parent)], "config.json"),
        (["--host", "256.1.1.1"], "--host"),
    ],
)
def test_a_wrong_flag_is_one_clear_line_and_status_2(flags: list[str], words: str, model_dir: Path) -> None:
    answer = run("--model", str(model_dir), "--port", "0", *flags)
    assert answer.returncode == 2
    assert words in answer.stderr.splitlines()[-1]
    assert "Traceback" not in answer.stderr
    assert answer.stdout == ""


def test_a_taken_port_is_one_clear_line_and_status_2(model_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        answer = run("--model", str(model_dir), "--port", str(port))
    assert answer.returncode == 2
    assert answer.stderr.startswith(f"moe-serve: cannot listen on 127.0.0.1:{port}: Address already in use")
    assert len(answer.stderr.splitlines()) == 1


def test_a_port_is_claimed_before_the_model_is_loaded() -> None:
    from moe_runtime.server import __main__ as command

    ours = command._listen("127.0.0.1", 0)
    with ours, pytest.raises(ConfigError, match="choose another --port"):
        command._listen("127.0.0.1", ours.getsockname()[1])


def test_too_little_memory_is_one_clear_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_dir: Path
) -> None:
    from moe_runtime.server import __main__ as command

    def fail(*arguments: Any) -> int:
        arguments[-1].close()  # the socket
        raise MemoryError("unable to allocate 900 GiB")

    monkeypatch.setattr(command, "_serve", fail)
    assert command.main(["--model", str(model_dir), "--port", "0"]) == 2
    assert "900 GiB); lower --cache-bytes" in capsys.readouterr().err


def test_a_broken_model_is_one_clear_line_and_status_2(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path)
    (folder / "config.json").write_text("{", encoding="utf-8")
    answer = run("--model", str(folder), "--port", "0")
    assert answer.returncode == 2
    assert "config.json" in answer.stderr
    assert "Traceback" not in answer.stderr


@contextlib.contextmanager
def started(model_dir: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    command = [*COMMAND, "--model", str(model_dir), "--port", "0", "--served-model-name", "served", *flags]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert ready.startswith("moe-serve: served is ready at http://127.0.0.1:"), _rest(process.stderr)
        yield process, int(ready.split("127.0.0.1:")[1].split("/")[0])
    finally:
        process.kill()
        process.communicate()


def _rest(stream: IO[str] | None) -> str:
    return "" if stream is None else stream.read()


@contextlib.contextmanager
def post(port: int, body: dict[str, object]) -> Iterator[http.client.HTTPResponse]:
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        with connection.getresponse() as answer:
            yield answer


def refused(port: int) -> dict[str, str]:
    """Ask until the server drains; the headers of its refusal."""
    for _ in range(500):
        with post(port, SHORT) as answer:
            if answer.status == 503:
                assert json.loads(answer.read())["error"]["code"] == "engine_stopped"
                return dict(answer.headers)
    raise TimeoutError("the server took every request")


def test_a_drain_finishes_what_runs_and_refuses_what_comes(model_dir: Path) -> None:
    with started(model_dir) as (process, port):
        with post(port, LONG) as stream:
            assert stream.readline().startswith(b"data: ")
            process.send_signal(signal.SIGTERM)
            headers = refused(port)
            assert headers["retry-after"] == "1"
            assert headers["connection"] == "close"
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=5)) as probe:
                probe.request("GET", "/health")
                with probe.getresponse() as health:
                    assert health.status == 503
            assert stream.read().endswith(b"data: [DONE]\n\n")
        _, log = process.communicate(timeout=10)
        assert process.returncode == 0, log
        assert "Traceback" not in log
        assert sum("generated=1500 length" in line for line in log.splitlines()) == 1
        assert '"a"' not in log, "no prompt belongs in the log"


def test_a_drain_has_an_end_and_says_so_in_the_stream(model_dir: Path) -> None:
    with started(model_dir, "--drain-seconds", "0") as (process, port):
        with post(port, LONG) as stream:
            assert stream.readline().startswith(b"data: ")
            process.send_signal(signal.SIGTERM)
            rest = stream.read()
        assert b"[DONE]" not in rest
        last = json.loads(rest.strip().split(b"\n\n")[-1].removeprefix(b"data: "))
        assert last["error"]["code"] == "engine_stopped"
        _, log = process.communicate(timeout=10)
        assert process.returncode == 0, log
        assert "Traceback" not in log


def test_a_second_signal_ends_it_at_once(model_dir: Path) -> None:
    with started(model_dir) as (process, port), post(port, LONG) as stream:
        assert stream.readline().startswith(b"data: ")
        process.send_signal(signal.SIGTERM)
        refused(port)
        process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        _, log = process.communicate(timeout=10)
        assert time.monotonic() - begun < 3
        assert process.returncode == 128 + signal.SIGTERM, log
        assert "Traceback" not in log


def test_one_socket_listens_and_nothing_calls_out(model_dir: Path) -> None:
    psutil = pytest.importorskip("psutil")
    with started(model_dir) as (process, port):
        with post(port, SHORT) as answer:
            assert answer.status == 200
            found = psutil.Process(process.pid).net_connections("all")
        listening = [item.laddr.port for item in found if item.status == psutil.CONN_LISTEN]
        assert listening == [port]
        outward = [item for item in found if item.raddr and getattr(item.laddr, "port", 0) not in (0, port)]
        assert outward == []
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=10)
        assert process.returncode == 0
