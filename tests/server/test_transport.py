"""Below HTTP: broken, slow and oversized requests on a raw socket get an error object or a closed door."""

import json
import socket
import time
from collections.abc import Iterator

import pytest
from serving import MODEL, FakeEngine, Running, read_all, serving

CHAT = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}).encode()


def post(body: bytes, *headers: bytes, path: bytes = b"/v1/chat/completions", length: bool = True) -> bytes:
    lines = [b"POST " + path + b" HTTP/1.1", b"Host: x", b"Content-Type: application/json", *headers]
    if length:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def parse(answer: bytes) -> tuple[int, dict[str, str], bytes]:
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split()[1]), headers, body


def assert_error(answer: bytes, status: int, code: str) -> None:
    assert answer, "the connection was closed without an answer"
    got, headers, body = parse(answer)
    assert (got, json.loads(body)["error"]["code"]) == (status, code), answer
    assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
    assert headers["content-type"] == "application/json"
    assert headers["x-request-id"].startswith("req_")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(
        FakeEngine(), header_timeout=0.3, body_timeout=0.3, max_body_bytes=100_000, max_buffered_bytes=150_000
    ) as running:
        yield running


@pytest.fixture(autouse=True)
def alive_afterwards(server: Running) -> Iterator[None]:
    yield
    answer = server.raw(post(CHAT, b"Connection: close"))
    assert parse(answer)[0] == 200, answer


BROKEN = {
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "a path in the host": (b"GET /health HTTP/1.1\r\nHost: a/health?x=\r\n\r\n", 400),
    "a NUL in the path": (b"GET /hea\0lth HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    "no version": (b"GET /health\r\n\r\n", 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64 + b"\r\n\r\n", 400),
    "bare line feeds": (b"GET /health HTTP/1.1\nHost: x\n\n", 400),
    "one bare line feed": (b"GET /health HTTP/1.1\r\nA: b\nHost: x\r\n\r\n", 400),
    "a folded line": (b"GET /health HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n", 400),
    "a space before the colon": (b"GET /health HTTP/1.1\r\nHost : x\r\n\r\n", 400),
    "length and chunks": (post(b"0\r\n\r\n", b"Transfer-Encoding: chunked"), 400),
    "two lengths": (post(CHAT, b"Content-Length: 1"), 400),
    "a negative length": (post(CHAT, b"Content-Length: -1", length=False), 400),
    "a length in words": (post(CHAT, b"Content-Length: ten", length=False), 400),
    "a wrong chunk size": (post(b"zz\r\n\r\n", b"Transfer-Encoding: chunked", length=False), 400),
    "an unknown coding": (post(b"", b"Transfer-Encoding: gzip, chunked", length=False), 501),
    "a large header": (b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 70_000 + b"\r\n\r\n", 431),
    "an endless header": (b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 400_000, 431),
    "many headers": (b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 1000 + b"\r\n", 431),
    "crumbs": (post(b"1\r\nx\r\n" * 20_000, b"Transfer-Encoding: chunked", length=False), 400),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_request_gets_an_error_object_and_a_closed_connection(server: Running, name: str) -> None:
    request, status = BROKEN[name]
    assert_error(server.raw(request), status, "invalid_http")


@pytest.mark.parametrize(
    "path", [b"/nope", b"/v1/models/../../etc/passwd", b"/%00", b"/v1//models", b"http://x/y"]
)
def test_unknown_paths_get_404(server: Running, path: bytes) -> None:
    answer = server.raw(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert parse(answer)[0] == 404
    assert json.loads(parse(answer)[2])["error"]["code"] in {"unknown_url", "model_not_found"}


@pytest.mark.parametrize("method", [b"DELETE", b"PUT", b"PATCH", b"OPTIONS", b"TRACE", b"BREW"])
def test_other_methods_get_405_with_the_allowed_ones(server: Running, method: bytes) -> None:
    answer = server.raw(method + b" /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert_error(answer, 405, "method_not_allowed")
    assert parse(answer)[1]["allow"] == "post"


def test_a_declared_oversize_is_refused_unread(server: Running) -> None:
    request = post(b"", b"Content-Length: 10000000000", b"Connection: close", length=False)
    assert_error(server.raw(request), 413, "request_too_large")


def test_an_oversize_in_chunks_is_refused_and_the_client_still_reads_the_answer(server: Running) -> None:
    chunk = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
    request = post(chunk * 32, b"Transfer-Encoding: chunked", b"Connection: close", length=False)
    assert_error(server.raw(request), 413, "request_too_large")


def test_after_413_the_rest_is_read_and_forgotten_and_the_connection_lives_on(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(post(b"x" * 1_000_000)[:-1])
        assert server.wait_until(lambda: len(server.server.server_state.connections) == 1)
        (protocol,) = server.server.server_state.connections
        assert server.wait_until(lambda: "linger" in protocol.timers)
        connection.sendall(b"x")
        assert server.wait_until(lambda: "linger" not in protocol.timers)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"HTTP/1.1 200 OK" in answer


def test_all_bodies_together_have_a_limit(server: Running) -> None:
    half = post(b"x" * 100_000)[:-1]
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as first:
        first.sendall(half)
        assert server.wait_until(lambda: server.service.gate.buffered_bytes > 50_000)
        answer = server.raw(post(b"x" * 99_000, b"Connection: close"))
    assert_error(answer, 503, "overloaded")
    assert parse(answer)[1]["retry-after"] == "1"
    assert server.wait_until(lambda: server.service.gate.buffered_bytes == 0)


def test_a_head_that_trickles_in_gets_408(server: Running) -> None:
    started = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        for byte in b"GET /health HTTP/1.1\r\nHos":
            connection.sendall(bytes([byte]))
        assert_error(read_all(connection), 408, "request_timeout")
    assert time.monotonic() - started < 2


def test_a_trickling_second_head_on_the_same_connection_gets_408(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(b"GET /hea")
        assert_error(read_all(connection), 408, "request_timeout")


def test_a_silent_connection_is_closed(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        assert read_all(connection) == b""


def test_a_body_that_trickles_in_gets_408(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(post(CHAT, b"Connection: close")[:-5])
        assert_error(read_all(connection), 408, "request_timeout")


def test_a_client_that_asks_before_sending_is_told_to_continue(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        request = post(CHAT, b"Expect: 100-continue", b"Connection: close")
        connection.sendall(request.removesuffix(CHAT))
        assert connection.recv(65536).startswith(b"HTTP/1.1 100 ")
        connection.sendall(CHAT)
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_pipelined_requests_are_answered_in_order(server: Running) -> None:
    answer = server.raw(post(CHAT) + post(b"{", b"Connection: close"))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b"HTTP/1.1 400 " in answer


def test_connections_above_the_limit_get_503() -> None:
    with serving(FakeEngine(), max_connections=2) as server:
        held = [socket.create_connection(("127.0.0.1", server.port), timeout=5) for _ in range(2)]
        assert server.wait_until(lambda: len(server.server.server_state.connections) == 2)
        assert_error(server.raw(b""), 503, "overloaded")
        for connection in held:
            connection.close()
        assert server.wait_until(lambda: not server.server.server_state.connections)
        assert server.raw(post(CHAT, b"Connection: close")).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_never_reads_is_cut_off_and_its_request_aborted() -> None:
    engine = FakeEngine(answer="x" * 100_000)
    with serving(engine, write_timeout=0.3) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        body = json.dumps({"model": MODEL, "prompt": "x", "stream": True, "max_tokens": 100_000}).encode()
        connection.sendall(post(body, path=b"/v1/completions"))
        assert server.wait_until(lambda: bool(engine.open))
        assert server.wait_until(lambda: not engine.open)
