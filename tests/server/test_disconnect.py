"""A client that leaves takes its request with it: streaming or not, in prefill and in decode."""

import json
import socket

import pytest
from serving import MODEL, FakeEngine, serving

PHASES = {"prefill": {"prefill": 30.0}, "decode": {"delay": 0.05, "answer": "x" * 1000}}


@pytest.mark.parametrize("num_prompts", [1, 3])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("phase", PHASES)
def test_the_request_is_aborted(phase: str, stream: bool, num_prompts: int) -> None:
    engine = FakeEngine(**PHASES[phase])  # type: ignore[arg-type]
    body = {"model": MODEL, "prompt": ["hi"] * num_prompts, "stream": stream, "max_tokens": 1000}
    data = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += b"Content-Length: %d\r\n\r\n" % len(data)
    with serving(engine) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(head + data)
            assert server.wait_until(lambda: len(engine.open) == num_prompts)
            if stream and phase == "decode":
                assert connection.recv(65536)
        assert server.wait_until(lambda: not engine.open, 2), "still running after the client left"
        assert server.wait_until(lambda: server.service.gate.open_requests == 0)


def test_leaving_while_the_body_is_sent_leaves_nothing_behind() -> None:
    engine = FakeEngine()
    with serving(engine) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 10000\r\n\r\n" + b"x" * 500
            )
            assert server.wait_until(lambda: server.service.gate.buffered_bytes == 500)
        assert server.wait_until(lambda: server.service.gate.buffered_bytes == 0)
        assert engine.submitted == []
