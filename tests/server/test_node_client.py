"""The official OpenAI client for Node against a real socket."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from serving import ANSWER, MODEL, FakeEngine, serving

from moe_runtime.errors import Overloaded

FOLDER = Path(__file__).parent / "node"


def test_the_node_client_gets_what_the_python_client_gets() -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    if not (FOLDER / "node_modules" / "openai").is_dir():
        pytest.skip("the Node client is not installed: run `npm ci` in tests/server/node")
    engine = FakeEngine(refusals=[Overloaded("the queue is full")])  # its first generating call is a retry
    with serving(engine) as server:
        command = [node, str(FOLDER / "client.mjs"), f"{server.url}/v1", MODEL]
        run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert run.returncode == 0, run.stderr
        assert server.wait_until(lambda: not engine.open)
    seen = json.loads(run.stdout)
    num_tokens = len(ANSWER.encode()) + 1
    assert seen["models"] == [MODEL]
    assert (seen["content"], seen["finish_reason"]) == (ANSWER, "stop")
    assert seen["num_logprobs"] == num_tokens
    assert seen["usage"]["completion_tokens"] == num_tokens
    assert seen["streamed"] == seen["helper"] == ANSWER
    assert seen["last_chunk"]["choices"] == []
    assert seen["last_chunk"]["usage"]["completion_tokens"] == num_tokens
    assert seen["completions"] == ["aThe", "bThe"]
    invalid = {"type": "invalid_request_error", "has_id": True}
    assert seen["errors"] == {
        "bad": {"kind": "BadRequestError", "status": 400, "code": None, "param": "temperature"} | invalid,
        "missing": {"kind": "NotFoundError", "status": 404, "code": "model_not_found", "param": "model"}
        | invalid,
        "tools": {"kind": "BadRequestError", "status": 400, "code": "unsupported_parameter", "param": "tools"}
        | invalid,
    }
    assert engine.refusals == []
